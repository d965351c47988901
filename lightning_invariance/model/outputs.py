"""The tensors in what a module or a function returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor


def tensors_of(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an output that can be measured, with its place: ``""``, ``"[0]"``, ``"[1][key]"``, ….

    These are the floating-point tensors that are not empty. Quantised tensors are dequantised; of complex ones the real
    and the imaginary part are given.
    """
    for place, tensor in all_tensors_of(output):
        if not tensor.numel():
            continue
        if tensor.is_quantized:
            yield place, tensor.dequantize()
        elif tensor.is_complex():
            yield f"{place}[real]", tensor.real
            yield f"{place}[imag]", tensor.imag
        elif tensor.is_floating_point():
            yield place, tensor


def all_tensors_of(output: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in an output, as it is, with its place.

    Looks into mappings, sequences, dataclasses, namespaces, and objects that carry a ``tensor``.
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
