"""The tensors in the output of a module or a function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TRANSFORMED = "transformed: runs inside torch.func (vmap, grad, jvp, ...), where an output holds other samples, too"
NESTED = "nested: samples of several lengths in one tensor"
SPARSE = "sparse: holds no value for every position"
MASKED = "masked: some values are undefined"
NO_VALUES = "meta: holds no values"


def tensors_of(output: Any) -> Iterator[tuple[str, Tensor | str]]:
    """Iterate over the floating-point tensors in an output, or why they cannot be measured, with their places.

    Places are ``""``, ``"[0]"``, ``"[1][key]"``, …. Subclasses of tensors become plain, quantised tensors are
    dequantised, and complex tensors split into real and imaginary parts. Empty tensors are passed over.
    """
    for place, tensor in all_tensors_of(output):
        if (reason := why_not(tensor)) is not None:
            yield place, reason
            continue
        tensor = plain(tensor)
        if not tensor.numel():
            continue
        if tensor.is_quantized:
            yield place, tensor.dequantize()
        elif tensor.is_complex():
            yield f"{place}[real]", tensor.real
            yield f"{place}[imag]", tensor.imag
        elif tensor.is_floating_point():
            yield place, tensor.to_dense() if tensor.is_mkldnn else tensor


def plain(tensor: Tensor) -> Tensor:
    """A tensor without what a subclass, such as an image with metadata, does beside its values."""
    computes_itself = type(tensor).__torch_dispatch__ != Tensor.__torch_dispatch__  # its values are elsewhere
    return tensor if type(tensor) is Tensor or computes_itself else tensor.as_subclass(Tensor)


def why_not(tensor: Tensor) -> str | None:
    """Why a tensor cannot be measured; None where it can."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return TRANSFORMED
    if isinstance(tensor, torch.masked.MaskedTensor):
        return MASKED
    if tensor.is_nested:
        return NESTED
    if tensor.layout != torch.strided and not tensor.is_mkldnn:
        return SPARSE
    return NO_VALUES if tensor.is_meta else None


def all_tensors_of(output: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Iterate over all tensors in an output, with their places.

    Looks into mappings, sequences, dataclasses, namespaces, and objects with an attribute ``tensor``.
    """
    if isinstance(output, Tensor):
        yield place, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from all_tensors_of(value, f"{place}[{key}]")
    elif isinstance(output, list | tuple):
        for position, value in enumerate(output):
            yield from all_tensors_of(value, f"{place}[{position}]")
    elif isinstance(getattr(output, "tensor", None), Tensor):
        yield place, output.tensor
    elif isinstance(output, SimpleNamespace) or (is_dataclass(output) and not isinstance(output, type)):
        for key, value in vars(output).items():
            yield from all_tensors_of(value, f"{place}[{key}]")
