"""Base class of transformation sets, and sets made of any functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

BatchFunction: TypeAlias = Callable[..., Tensor]

#: Label → function, or functions that are labelled by their names.
Functions: TypeAlias = Mapping[str, BatchFunction] | Sequence[BatchFunction]


class Transformation:
    """One transformation of a set, as ``transformations[3]`` gives it.

    Attributes:
        label: short text for axes and tables, such as ``"22.5°"``.
        parameters: the numbers behind the label, such as ``{"angle": 22.5}``.
    """

    def __init__(self, single: TransformationSet) -> None:
        self._single = single
        self.label = single.labels[0]
        self.parameters = {name: values[0] for name, values in single.parameters.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """Transform a batch ``(batch, ...)`` into a batch of the same length."""
        return self._single(x)[:, 0]

    def of_maps(self, maps: Tensor, input_size: tuple[int, int] | None = None) -> Tensor:
        """Transform feature maps; see :meth:`TransformationSet.of_maps`."""
        return self._single.of_maps(maps, input_size)[:, 0]

    def inverse(self, x: Tensor, input_size: tuple[int, int] | None = None) -> Tensor:
        """Map a transformed batch back; see :meth:`TransformationSet.inverse`."""
        return self._single.inverse(x.unsqueeze(1), input_size)[:, 0]

    def __repr__(self) -> str:
        return f"Transformation({self.label})"


class TransformationSet(ABC, Sequence[Transformation]):
    """An ordered set of m transformations that act on batches: the columns of the ST matrix.

    ``t(x)`` applies all of them to a batch ``(batch, ...)`` in one call, on the batch's device, and returns
    ``(batch, m, ...)``. ``t.inverse(st)`` maps column j of ``(batch, m, ...)`` back by the inverse of transformation j.
    ``t[3]`` is one :class:`Transformation`, ``t[:4]`` a smaller set.

    Ready-made sets are :func:`rotations`, :func:`scales`, :func:`translations`, :func:`quarter_turns` and
    :func:`flips`; :func:`combine` multiplies sets; :meth:`from_callables` makes a set of any functions.

    A subclass gives :meth:`_apply` and :meth:`_select`, and :meth:`_invert` where ``invertible`` is true.

    Attributes:
        labels: a short text for each transformation.
        parameters: numbers for the axes of plots, one list of length m for each parameter, such as
            ``{"angle": [0.0, 22.5, ...]}``.
        invertible: whether :meth:`inverse` can be called.
        identity: position of the transformation that changes nothing; None where the set knows of none.
    """

    invertible: bool = True
    identity: int | None = None

    def __init__(self, labels: Sequence[str], parameters: Mapping[str, Sequence[float]] | None = None) -> None:
        if not labels:
            raise ValueError("Expected at least one transformation, but got none.")
        self.labels = list(labels)
        self.parameters = {name: [float(v) for v in values] for name, values in (parameters or {}).items()}
        for name, values in self.parameters.items():
            if len(values) != len(self.labels):
                raise ValueError(
                    f"Expected {len(self.labels)} values of parameter `{name}`, one a transformation,"
                    f" but got {len(values)}."
                )

    @staticmethod
    def from_callables(
        transformations: Functions,
        inverses: Functions | None = None,
        parameters: Mapping[str, Sequence[float]] | None = None,
        identity: str | None = None,
    ) -> TransformationSet:
        """Make a set of functions from batch to batch, for any modality.

        Args:
            transformations: label → function, or a sequence of functions that are labelled by their names. Each takes
                a batch ``(batch, ...)`` and returns a batch; all must return the same shape. The transforms of
                ``torchvision.transforms.v2`` are such functions.
            inverses: the same labels (or order) → function that maps a transformed batch back. Without them the
                set has no inverse.
            parameters: numbers for the axes of plots, one list of length m for each parameter.
            identity: the label of the function that changes nothing, if there is one: responses are the changes from
                it. Without one they are those from the mean over the transformations.

        Raises:
            ValueError: If there is no transformation, the inverses do not match the transformations, or there is no
                such label.
            TypeError: If something is not callable.

        Example:
            >>> import torch
            >>> t = TransformationSet.from_callables({"same": lambda x: x, "half": lambda x: x / 2}, identity="same")
            >>> t(torch.ones(1, 2))
            tensor([[[1.0000, 1.0000],
                     [0.5000, 0.5000]]])
        """
        return CallableSet(transformations, inverses, parameters, identity)

    def __call__(self, x: Tensor, input_size: tuple[int, int] | None = None) -> Tensor:
        """Apply every transformation to a batch: ``(batch, ...)`` → ``(batch, m, ...)``.

        Args:
            x: inputs, or feature maps, ``(batch, ...)``.
            input_size: as for :meth:`inverse`, where ``x`` holds feature maps.
        """
        return self._apply(x, input_size)

    def of_maps(self, maps: Tensor, input_size: tuple[int, int] | None = None) -> Tensor:
        """Apply every transformation to feature maps: ``(batch, ..., height, width)`` → ``(batch, m, ...)``.

        Unlike for images, what comes from outside is zero, whatever a set fills these with.

        Args:
            maps: feature maps.
            input_size: as for :meth:`inverse`.
        """
        return self(maps, input_size or (maps.shape[-2], maps.shape[-1]))

    def inverse(self, st: Tensor, input_size: tuple[int, int] | None = None) -> Tensor:
        """Map every column of ``(batch, m, ...)`` back by the inverse of its transformation.

        Args:
            st: transformed inputs, or feature maps of them, of shape ``(batch, m, ...)``.
            input_size: height and width of the network's input where ``st`` holds feature maps of another size: a
                shift by d pixels of the input is a shift by d·(map width)/(input width) pixels of the map. By
                default the size of ``st`` itself.

        Raises:
            ValueError: If the set has no inverses or ``st`` does not have m columns.
        """
        if not self.invertible:
            raise ValueError(f"Expected transformations with inverses, but {self!r} has none.")
        if st.ndim < 2 or st.shape[1] != len(self):
            raise ValueError(f"Expected `st` of shape (batch, {len(self)}, ...), but got {tuple(st.shape)}.")
        return self._invert(st, input_size)

    @abstractmethod
    def _apply(self, x: Tensor, input_size: tuple[int, int] | None) -> Tensor:
        """``(batch, ...)`` → ``(batch, m, ...)``."""

    def select(self, columns: Sequence[int]) -> TransformationSet:
        """The set of some of its transformations, by position, in this order."""
        return self._select(list(columns))

    @abstractmethod
    def _select(self, columns: list[int]) -> TransformationSet:
        """The set of these transformations, in this order."""

    def _invert(self, st: Tensor, input_size: tuple[int, int] | None) -> Tensor:
        """Column-wise inverse of ``(batch, m, ...)``."""
        raise ValueError(f"Expected transformations with inverses, but {self!r} has none.")

    def is_random(self, x: Tensor) -> bool:
        """Whether the transformations make something else of a batch the second time."""
        return False

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """What tells the set from others: sets of one class and one signature are equal, and transform alike.

        A subclass may leave it as it is; its sets are then equal to themselves only.
        """
        return (*self.labels, id(self))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, TransformationSet) and self.signature == other.signature

    def __hash__(self) -> int:
        return hash(self.signature)

    def _selected_parameters(self, columns: list[int]) -> dict[str, list[float]]:
        return {name: [values[j] for j in columns] for name, values in self.parameters.items()}

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Transformation: ...
    @overload
    def __getitem__(self, index: slice) -> TransformationSet: ...
    def __getitem__(self, index: int | slice) -> Transformation | TransformationSet:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return Transformation(self.select([range(len(self))[index]]))

    def __iter__(self) -> Iterator[Transformation]:
        return (self[j] for j in range(len(self)))

    def __repr__(self) -> str:
        shown = self.labels if len(self) <= 6 else [*self.labels[:3], "…", self.labels[-1]]
        return f"{type(self).__name__}({len(self)}: {', '.join(shown)})"


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


def combined_parameters(sets: Sequence[TransformationSet], columns: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """The parameters of all products; of two sets that use one name, the later is numbered."""
    parameters: dict[str, list[float]] = {}
    for position, transformations in enumerate(sets):
        for name, values in transformations.parameters.items():
            unique = name if name not in parameters else f"{name} {position + 1}"
            parameters[unique] = [values[column[position]] for column in columns]
    return parameters


def _applied(function: BatchFunction, x: Tensor, input_size: tuple[int, int] | None) -> Tensor:
    """Call a function of a batch; functions of users are not given a size."""
    return function(x, input_size) if getattr(function, "takes_input_size", False) else function(x)


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
