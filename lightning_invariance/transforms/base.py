"""Base class of transformation sets, and sets of arbitrary functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from hashlib import blake2b
from typing import overload

import torch
from torch import Tensor

from lightning_invariance.random_state import isolated_random_state
from lightning_invariance.transforms.functions import BatchFunction, Functions, applied, described, matched, named


class Transformation:
    """One transformation of a set, such as ``transformations[3]``.

    Attributes:
        label: short text for axes and tables, such as ``"22.5°"``.
        parameters: numbers for the axes of plots, such as ``{"angle": 22.5}``.
    """

    def __init__(self, single: TransformationSet) -> None:
        self._single = single
        self.label = single.labels[0]
        self.parameters = {name: values[0] for name, values in single.parameters.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """Transform a batch ``(batch, ...)``."""
        return self._single(x)[:, 0]

    def points(self, xy: Tensor, size: tuple[int, ...]) -> Tensor:
        """Move positions as the transformation moves pixels; see :meth:`TransformationSet.points`."""
        return self._single.points(xy, size)[0]

    def turned(self, vectors: Tensor, axis: int, inverse: bool = False) -> Tensor:
        """Turn vectors ``(batch, ...)``; see :meth:`TransformationSet.turned`, also for the axis."""
        return self._single.turned(vectors.unsqueeze(1), axis, inverse)[:, 0]

    def of_maps(self, maps: Tensor, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Transform feature maps; see :meth:`TransformationSet.of_maps`."""
        return self._single.of_maps(maps, input_size)[:, 0]

    def inverse(self, x: Tensor, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Apply the inverse to a transformed batch; see :meth:`TransformationSet.inverse`."""
        return self._single.inverse(x.unsqueeze(1), input_size)[:, 0]

    def __repr__(self) -> str:
        return f"Transformation({self.label})"


class TransformationSet(ABC, Sequence[Transformation]):
    """An ordered set of m transformations that act on batches: the columns of the ST matrix.

    ``t(x)`` applies all of them to a batch ``(batch, ...)`` in one call, on the batch's device, and returns
    ``(batch, m, ...)``. ``t.inverse(st)`` applies the inverse of transformation j to column j of ``(batch, m, ...)``.
    ``t[3]`` is one :class:`Transformation`, ``t[:4]`` a smaller set.

    Make a set with :func:`rotations`, :func:`scales`, :func:`translations`, :func:`quarter_turns`, :func:`flips`,
    :meth:`from_callables` for any functions, or :func:`combine` for products of sets. A subclass overrides
    :meth:`_apply` and :meth:`_select`, and :meth:`_invert` if it is ``invertible``.

    Attributes:
        labels: a short text for each transformation.
        parameters: numbers for the axes of plots, one list of length m for each parameter, such as
            ``{"angle": [0.0, 22.5, ...]}``.
        invertible: whether :meth:`inverse` is defined.
        identity: position of the identity transformation; None without a known identity.
        map_axes: least number of axes of a feature map along which positions move, such as 2 for images.
        input_vectors: axes of the input along which vectors stand that turn, such as coordinates of points.
    """

    invertible: bool = True
    identity: int | None = None
    map_axes: int = 1
    input_vectors: tuple[int, ...] = ()

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
        seed: int | None = None,
    ) -> TransformationSet:
        """Make a set of functions from batch to batch, for any modality.

        Args:
            transformations: label → function, or a sequence of functions, whose names become labels. Each takes a batch
                ``(batch, ...)`` and returns a batch of one shape, as transforms of ``torchvision.transforms.v2`` do.
            inverses: label → inverse function, or a sequence in the order of ``transformations``. By default the set
                has no inverses.
            parameters: numbers for the axes of plots, one list of length m for each parameter.
            identity: label of the identity, if there is one: responses are changes from it, and otherwise from the
                mean over the transformations.
            seed: for functions that draw random numbers: each is called for one sample at a time, ``(1, ...)``, with
                the generators of torch, numpy and ``random`` seeded from this seed, the sample's content and the label.
                So every sample gets numbers of its own, the same in every evaluation, batch size and process.

        Raises:
            ValueError: If there is no transformation, the inverses do not match the transformations, or ``identity`` is
                no label.
            TypeError: If a function is not callable.

        Example:
            >>> import torch
            >>> t = TransformationSet.from_callables({"same": lambda x: x, "half": lambda x: x / 2}, identity="same")
            >>> t(torch.ones(1, 2))
            tensor([[[1.0000, 1.0000],
                     [0.5000, 0.5000]]])
        """
        return CallableSet(transformations, inverses, parameters, identity, seed)

    def __call__(self, x: Tensor, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Apply every transformation to a batch: ``(batch, ...)`` → ``(batch, m, ...)``.

        ``input_size``, see :meth:`inverse`, is for feature maps only.
        """
        return self._apply(x, input_size)

    def of_maps(self, maps: Tensor, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Apply every transformation to feature maps: ``(batch, ..., height, width)`` → ``(batch, m, ...)``.

        Pixels from outside the frame are zero, even if the set fills images with another value. For ``input_size``
        see :meth:`inverse`.
        """
        return self(maps, input_size or tuple(maps.shape[1:]))

    def inverse(self, st: Tensor, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Apply the inverse of transformation j to column j of ``(batch, m, ...)``.

        Args:
            st: transformed inputs, or their feature maps, ``(batch, m, ...)``.
            input_size: shape of the network's input, or its last axes such as height and width, if feature maps have
                another size: a shift by d pixels of the input is a shift by d·(map width)/(input width) pixels of the
                map. By default the size of ``st``.

        Raises:
            ValueError: If the set has no inverses or ``st`` does not have m columns.
        """
        if not self.invertible:
            raise ValueError(f"Expected transformations with inverses, but {self!r} has none.")
        if st.ndim < 2 or st.shape[1] != len(self):
            raise ValueError(f"Expected `st` of shape (batch, {len(self)}, ...), but got {tuple(st.shape)}.")
        return self._invert(st, input_size)

    @abstractmethod
    def _apply(self, x: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        """``(batch, ...)`` → ``(batch, m, ...)``."""

    def select(self, columns: Sequence[int]) -> TransformationSet:
        """A set of the transformations at these positions, in this order."""
        return self._select(list(columns))

    @abstractmethod
    def _select(self, columns: list[int]) -> TransformationSet:
        """:meth:`select` of at least one column."""

    def _invert(self, st: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        """The inverse of every column of ``(batch, m, ...)``."""
        raise ValueError(f"Expected transformations with inverses, but {self!r} has none.")

    def is_random(self, x: Tensor) -> bool:
        """Whether a second call with the same batch returns other values."""
        return False

    def fits(self, activation_shape: tuple[int, ...], input_size: tuple[int, ...]) -> bool:
        """Whether activations are feature maps, whose positions move as the input's: they have as many axes as it.

        Inputs ``(tokens,)`` have no axis of channels; their layers ``(tokens, channels)`` are feature maps, too.
        """
        return len(activation_shape) == max(1 + self.map_axes, len(input_size))

    def points(self, xy: Tensor, size: tuple[int, ...]) -> Tensor:
        """Move positions, such as keypoints or corners of boxes, as the transformations move pixels: ``(m, ..., 2)``.

        Args:
            xy: ``(..., 2)``: x to the right and y down, in pixels; (0, 0) is the centre of the first pixel. For volumes
                ``(..., 3)``.
            size: of the image: height and width.
        """
        raise ValueError(f"Expected transformations of images or volumes, but got {self!r}.")

    def why_not(self, positions: tuple[int, ...], input_size: tuple[int, ...]) -> str:
        """Why feature maps with so many positions along each axis cannot be mapped back; empty if they can."""
        return ""

    def turned(self, vectors: Tensor, axis: int, inverse: bool = False) -> Tensor:
        """Turn vectors ``(batch, m, ...)`` that stand along an axis as transformation j turns the input, or back."""
        raise ValueError(f"Expected transformations that turn vectors, but {self!r} does not.")

    def products(self) -> Tensor:
        """The position in the set of "transformation j, then transformation i", ``(m, m)``; −1 where it is not there.

        By default only products with the identity are known.
        """
        found = torch.full((len(self), len(self)), -1)
        if self.identity is not None:
            found[self.identity] = found[:, self.identity] = torch.arange(len(self))
        return found

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """Identifies the set: sets of one class with equal signatures are equal, and must transform equally.

        By default a set is equal only to itself.
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
        seed: int | None = None,
    ) -> None:
        self._seed = seed
        known = named(transformations, "transformations")
        super().__init__(list(known), parameters)
        if identity is not None and identity not in known:
            raise ValueError(f"Expected argument `identity` to be one of the labels {[*known]}, but got {identity!r}.")
        self.identity = None if identity is None else self.labels.index(identity)
        self._functions = list(known.values())
        self._inverses = None if inverses is None else matched(inverses, list(known))
        self.invertible = self._inverses is not None

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """The labels, the functions, and the position of the identity."""
        return (*self.labels, *self._functions, *(self._inverses or ()), self.identity, self._seed)

    def _apply(self, x: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        # Each function gets a copy, which it may change in place.
        functions = zip(self.labels, self._functions, strict=True)
        call = applied if self._seed is None else self._applied_to_each
        return self._stack([call(label, function, x.clone(), input_size) for label, function in functions], x)

    def _applied_to_each(
        self, label: str, function: BatchFunction, x: Tensor, input_size: tuple[int, ...] | None
    ) -> Tensor:
        """Call a function for each sample, with random generators seeded from the sample, the label and the seed."""
        found = []
        for sample in torch.split(x, 1):
            values = sample.detach().cpu().double() + 0.0  # equal for all types, and for both zeros
            key = blake2b(values.contiguous().numpy().tobytes(), digest_size=7)
            key.update(f"{self._seed} {label}".encode())
            with isolated_random_state(int.from_bytes(key.digest(), "big")):
                found.append(applied(label, function, sample, input_size))
        return torch.cat(found) if found else applied(label, function, x, input_size)

    def is_random(self, x: Tensor) -> bool:
        """Whether a second call of the functions with this batch returns other values."""
        return not torch.equal(self(x), self(x))

    def _invert(self, st: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        inverses = zip(self.labels, self._inverses or [], strict=True)
        mapped = [applied(label, f, st[:, j].clone(), input_size) for j, (label, f) in enumerate(inverses)]
        return self._stack(mapped, st)

    def _select(self, columns: list[int]) -> CallableSet:
        labels = [self.labels[j] for j in columns]
        inverses = self._inverses and {label: self._inverses[j] for label, j in zip(labels, columns, strict=True)}
        functions = {label: self._functions[j] for label, j in zip(labels, columns, strict=True)}
        same = None if self.identity not in columns else self.labels[self.identity or 0]
        found = type(self)(functions, inverses, self._selected_parameters(columns), same, self._seed)
        found.input_vectors = self.input_vectors
        return found

    def _stack(self, results: list[Tensor], x: Tensor) -> Tensor:
        first = results[0]
        for label, result in zip(self.labels, results, strict=True):
            kept = isinstance(result, Tensor) and len(result) == len(x) and result.device == x.device
            if not kept or result.shape != first.shape or result.dtype != first.dtype:
                raise ValueError(
                    "Expected every transformation to return a batch of one shape and type on the device of the input,"
                    f" but of a batch {described(x)} {self.labels[0]!r} made {described(first)} and {label!r} made"
                    f" {described(result)}."
                )
        return torch.stack(results, dim=1)
