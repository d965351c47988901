"""Contexts that restore the state of a model after an evaluation."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_invariance.messages import some

#: Allows one evaluation at a time: the eager stance and the random generators belong to the whole process, and hooks
#: see every forward pass of a model.
ONE_AT_A_TIME = threading.RLock()

#: Largest size in bytes of parameters that are copied before an evaluation. In larger models changes are only detected.
LARGEST_COPY = 2**29


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and restore the mode of each afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without any."""
    tensor = next((t for tensors in (model.parameters(), model.buffers()) for t in tensors), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Move the model to a device, and back afterwards."""
    before = device_of(model)
    if before == device:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


@contextmanager
def unchanged_tensors(model: nn.Module) -> Iterator[None]:
    """Restore buffers and parameters afterwards, which forward may change.

    Raises:
        RuntimeError: If forward changed a parameter of a model that is too large to be copied.
    """
    parameters = {name: p for name, p in model.named_parameters() if not is_lazy(p)}
    buffers = {name: b for name, b in model.named_buffers() if not is_lazy(b)}
    size = sum(parameter.nbytes for parameter in parameters.values())
    tensors = {**buffers, **(parameters if size <= LARGEST_COPY else {})}
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    versions = {name: version_of(tensor) for name, tensor in parameters.items()}
    try:
        yield
    finally:
        for name, unchanged in _equal(tensors, copies).items():
            _restore(model, name, tensors[name], None if unchanged else copies[name])
    changed = [name for name in parameters if name not in copies and version_of(parameters[name]) != versions[name]]
    if changed:
        raise RuntimeError(
            f"Expected forward to leave parameters as they are, but it changed {some(changed)}: measure a copy of the"
            " model."
        )


def _equal(tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> dict[str, bool]:
    """By name, whether a tensor equals its copy; results are read once per device, since reading synchronises."""
    found: dict[str, bool] = {}
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for name, copy in copies.items():
        tensor = tensors[name]
        if tensor.is_cpu or tensor.layout != torch.strided or tensor.shape != copy.shape:
            found[name] = torch.equal(tensor, copy)
        else:
            flags.setdefault(copy.device, {})[name] = (tensor == copy).all()
    for of_device in flags.values():
        found |= zip(of_device, torch.stack([*of_device.values()]).tolist(), strict=True)
    return found


def _restore(model: nn.Module, name: str, tensor: Tensor, copy: Tensor | None) -> None:
    """Put a tensor back to its name in the model, with the values of a copy unless that is None."""
    place, _, attribute = name.rpartition(".")
    owner = model.get_submodule(place)
    if not isinstance(owner, torch.jit.ScriptModule) and getattr(owner, attribute, None) is not tensor:
        own: dict[str, Any] = owner._buffers if attribute in owner._buffers else owner._parameters
        own[attribute] = tensor  # forward assigned another tensor
    if copy is not None:
        with torch.no_grad():
            tensor.copy_(copy)


def version_of(tensor: Tensor) -> int:
    """Number of in-place changes of a tensor; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version
