"""The tensors in the output of a module or a function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor


def tensors_of(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the measurable tensors in an output, with their places: ``""``, ``"[0]"``, ``"[1][key]"``, ….

    Measurable tensors are not empty and floating-point; quantised tensors are dequantised, and complex tensors split
    into real and imaginary parts.
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
