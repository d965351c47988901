"""Functions of batches by label, and their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

BatchFunction: TypeAlias = Callable[..., Tensor]

#: Label → function, or functions, whose names become labels.
Functions: TypeAlias = Mapping[str, BatchFunction] | Sequence[BatchFunction]


def applied(label: str, function: BatchFunction, x: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
    """Call a function, with the input size only if it declares ``takes_input_size``."""
    of_what = described(x)
    try:
        return function(x, input_size) if getattr(function, "takes_input_size", False) else function(x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"Expected transformation {label!r} to transform a batch {of_what}, but it raised"
            f" {type(error).__name__}: {error}"
        ) from error


def described(x: Any) -> str:
    """Shape, type and device of a tensor; the type of anything else."""
    return f"{tuple(x.shape)} of {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


def named(functions: Functions, argument: str) -> dict[str, BatchFunction]:
    """Label → function; the labels of a sequence are the names of its functions, numbered if repeated."""
    if isinstance(functions, Mapping):
        known = dict(functions)
    else:
        known = {}
        for function in functions:
            name = getattr(function, "__name__", None) or repr(function)
            label, repeat = name, 1
            while label in known:
                repeat += 1
                label = f"{name} {repeat}"
            known[label] = function
    for label, function in known.items():
        if not callable(function):
            raise TypeError(f"Expected argument `{argument}` to hold callables, but {label!r} is {function!r}.")
    return known


def matched(inverses: Functions, labels: list[str]) -> list[BatchFunction]:
    """The inverses in the order of the labels."""
    if not isinstance(inverses, Mapping) and len(inverses) == len(labels):
        inverses = dict(zip(labels, inverses, strict=True))
    known = named(inverses, "inverses")
    if set(known) != set(labels):
        raise ValueError(
            f"Expected argument `inverses` to have one function for each of {labels}, but got {list(known)}."
        )
    return [known[label] for label in labels]
