"""Transformations given as functions, for any modality."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.transforms.base import Transformation, TransformationSet

BatchFunction = Callable[..., Tensor]
Functions = Mapping[str, BatchFunction] | Sequence[BatchFunction]


class CallableSet(TransformationSet):
    """See :meth:`TransformationSet.from_callables`."""

    def __init__(
        self,
        transformations: Functions,
        inverses: Functions | None = None,
        parameters: Mapping[str, Sequence[float]] | None = None,
        identity: str | None = None,
    ) -> None:
        named = _named(transformations, "transformations")
        super().__init__(list(named), parameters)
        if identity is not None and identity not in named:
            raise ValueError(f"Expected argument `identity` to be one of the labels {[*named]}, but got {identity!r}.")
        self.identity = None if identity is None else self.labels.index(identity)
        self._functions = list(named.values())
        self._inverses: list[BatchFunction] | None = None
        if inverses is not None:
            self._inverses = _matched(inverses, list(named))
        self.invertible = self._inverses is not None

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """The labels and the functions, and which of them is the identity."""
        return (*self.labels, *self._functions, *(self._inverses or ()), self.identity)

    def _apply(self, x: Tensor, input_size: tuple[int, int] | None) -> Tensor:
        # Each gets a batch of its own, which it may change in place.
        return self._stack([_applied(function, x.clone(), input_size) for function in self._functions], x)

    def is_random(self, x: Tensor) -> bool:
        """Whether the functions make something else of a batch the second time."""
        return not torch.equal(self(x), self(x))

    def _invert(self, st: Tensor, input_size: tuple[int, int] | None) -> Tensor:
        inverses = self._inverses or []
        mapped = [_applied(inverse, st[:, j].clone(), input_size) for j, inverse in enumerate(inverses)]
        return self._stack(mapped, st)

    def _select(self, columns: list[int]) -> CallableSet:
        labels = [self.labels[j] for j in columns]
        inverses = self._inverses and {label: self._inverses[j] for label, j in zip(labels, columns, strict=True)}
        functions = {label: self._functions[j] for label, j in zip(labels, columns, strict=True)}
        same = None if self.identity not in columns else self.labels[self.identity or 0]
        return CallableSet(functions, inverses, self._selected_parameters(columns), same)

    def _stack(self, results: list[Tensor], x: Tensor) -> Tensor:
        first = results[0]
        for label, result in zip(self.labels, results, strict=True):
            if not isinstance(result, Tensor) or result.shape != first.shape or len(result) != len(x):
                raise ValueError(
                    f"Expected every transformation to return a batch of one shape, but of an input batch"
                    f" {tuple(x.shape)} {self.labels[0]!r} made {_shape_of(first)} and {label!r} made"
                    f" {_shape_of(result)}."
                )
            if result.dtype != first.dtype or result.device != x.device:
                raise ValueError(
                    f"Expected every transformation to return batches of one type on the device of the input, but of"
                    f" {x.dtype} on {x.device} {self.labels[0]!r} made {first.dtype} on {first.device}, and {label!r}"
                    f" made {result.dtype} on {result.device}."
                )
        return torch.stack(results, dim=1)


class Chain:
    """Members of sets applied one after the other (a class, so that sets of it can be pickled).

    Args:
        members: in the order in which they are applied.
        inverse: whether each maps back.
    """

    def __init__(self, members: Sequence[Transformation], inverse: bool = False) -> None:
        self.members, self.inverse = list(members), inverse

    def __call__(self, x: Tensor, input_size: tuple[int, int] | None = None) -> Tensor:
        """Apply all of them; to feature maps where the size of the network's input is given."""
        for member in self.members:
            if self.inverse:
                x = member.inverse(x, input_size)
            else:
                x = member(x) if input_size is None else member.of_maps(x, input_size)
        return x


def _applied(function: BatchFunction, x: Tensor, input_size: tuple[int, int] | None) -> Tensor:
    """A function of a batch; those of users are told no size."""
    return function(x, input_size) if isinstance(function, Chain) else function(x)


def _shape_of(result: Any) -> Any:
    return tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__


def _named(functions: Functions, argument: str) -> dict[str, BatchFunction]:
    """Label → function; functions that come in a sequence are labelled by their names."""
    if isinstance(functions, Mapping):
        named = dict(functions)
    else:
        named = {}
        for function in functions:
            name = getattr(function, "__name__", None) or repr(function)
            label, repeat = name, 1
            while label in named:
                repeat += 1
                label = f"{name} {repeat}"
            named[label] = function
    for label, function in named.items():
        if not callable(function):
            raise TypeError(f"Expected argument `{argument}` to hold callables, but {label!r} is {function!r}.")
    return named


def _matched(inverses: Functions, labels: list[str]) -> list[BatchFunction]:
    """The inverses in the order of the labels."""
    if not isinstance(inverses, Mapping) and len(inverses) == len(labels):
        inverses = dict(zip(labels, inverses, strict=True))
    named = _named(inverses, "inverses")
    if set(named) != set(labels):
        raise ValueError(
            f"Expected argument `inverses` to have one function for each of {labels}, but got {list(named)}."
        )
    return [named[label] for label in labels]
