"""A digest of the arguments of accumulators: states with different digests must not be merged."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.transforms import TransformationSet


def configuration_of(accumulators: Iterable[Accumulator]) -> Tensor:
    """Eight numbers ``(8,)`` that depend on every argument of the accumulators, and are equal in every process.

    Lambdas, nested functions and objects of unknown classes are distinguished by their identity.
    """
    digest = hashlib.sha256(_described(tuple(accumulators)).encode()).digest()
    return torch.tensor([int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)])


def _described(value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_described, value))})"
    if dataclasses.is_dataclass(value):
        return f"{kind}({', '.join(_described(getattr(value, part.name)) for part in dataclasses.fields(value))})"
    if isinstance(value, TransformationSet):
        return f"{kind}{_described(value.signature)}"
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.tolist()}"
    if isinstance(value, FunctionType | BuiltinFunctionType) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    return f"{kind} at {id(value)}"
