"""Contexts in which a model is evaluated: eval mode, device, one evaluation at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_invariance.model.snapshot import Snapshot, is_sharded

#: Allows one evaluation at a time: the eager stance and the random generators belong to the whole process, and hooks
#: see every forward pass of a model.
ONE_AT_A_TIME = threading.RLock()

#: Methods of a LightningModule that act on its trainer.
ON_TRAINER = ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[Snapshot]:
    """Put every module into eval mode, with no gradients and no logs; the state before, which is put back afterwards.

    Modules that do more in ``train`` than to set a flag are asked to undo it.
    """
    before = Snapshot(model)
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    whole_parts = [module for module in model.modules() if is_sharded(module) and hasattr(module, "reshard")]
    shards: list[tuple[Any, list[type]]] = [(module, _types_of(module)) for module in whole_parts]
    try:
        for module in model.modules():
            if "LightningModule" in (cls.__name__ for cls in type(module).__mro__):
                vars(module).update(dict.fromkeys(ON_TRAINER, _nothing))
        for parameter, _ in before.parameters:
            parameter.grad = None
        _to_eval(model)
        yield before
    finally:
        for module, training in modes:
            if training and _does_more(module):
                module.train()
        before.restore(thorough=True)
        for module, types in shards:  # the outermost module keeps whole parameters until the next backward pass
            if types != _types_of(module):
                module.reshard()


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer with values; the CPU for a model without any."""
    tensors = (t for found in (model.parameters(), model.buffers()) for t in found)
    tensor = next((t for t in tensors if not t.is_meta), None)
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


def _types_of(module: nn.Module) -> list[type]:
    """The types of the parameters, which are other ones while these are whole."""
    return [type(parameter) for parameter in module.parameters()]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, whatever is given."""


def _does_more(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule) and type(module).train is not nn.Module.train


def _to_eval(module: nn.Module) -> None:
    """Like ``module.eval()``, but frozen parts of it, which have no mode, are passed over."""
    if _does_more(module) or type(module).eval is not nn.Module.eval:
        module.eval()
        return
    if hasattr(module, "training"):
        module.training = False
    for child in module.children():
        _to_eval(child)
