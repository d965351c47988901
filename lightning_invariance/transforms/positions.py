"""Shifts of signals and sequences, and permutations of points and tokens."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from lightning_invariance.messages import check_int
from lightning_invariance.transforms.base import TransformationSet


class PositionSet(TransformationSet):
    """Base of the sets that move the positions along one axis of signals, sequences or points.

    Feature maps are ``(batch, channels, positions)``. Inputs with more axes are moved, but their layers are no feature
    maps, since the axis of a layer is not known then.

    Args:
        axis: axis of a batch, not 0.
        labels, parameters: see :class:`TransformationSet`.
    """

    def __init__(self, axis: int, labels: Sequence[str], parameters: dict[str, list[float]] | None = None) -> None:
        if axis == 0:
            raise ValueError("Expected argument `axis` to be an axis of positions, but 0 is the axis of the batch.")
        super().__init__(labels, parameters)
        self.axis = axis

    def _axis_of(self, x: Tensor, input_size: tuple[int, ...] | None, leading: int) -> int:
        """The axis of ``x`` that moves, counted from the end, with so many axes before the axes of a sample."""
        if input_size is not None:
            if x.ndim != leading + 2:
                raise ValueError(f"Expected feature maps (batch, ..., channels, positions), but got {tuple(x.shape)}.")
            return -1
        axis = self.axis if self.axis < 0 else self.axis - 1 + leading - x.ndim
        if not -(x.ndim - leading) <= axis <= -1:
            raise ValueError(f"Expected inputs with an axis {self.axis}, along which they move, got {tuple(x.shape)}.")
        return axis

    def _length_of_input(self, input_size: tuple[int, ...]) -> int:
        axis = self.axis if self.axis < 0 else self.axis - 1
        return input_size[axis] if -len(input_size) <= axis < len(input_size) else input_size[-1]

    def fits(self, activation_shape: tuple[int, ...], input_size: tuple[int, ...]) -> bool:
        """Whether activations, and inputs, have one axis of positions."""
        return len(activation_shape) == 2 and len(input_size) <= 2

    def turned(self, vectors: Tensor, axis: int, inverse: bool = False) -> Tensor:
        """Vectors move, but do not turn."""
        return vectors

    def _apply(self, x: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        axis = self._axis_of(x, input_size, 1)
        moved = [self._moved(x, j, axis, input_size, inverse=False) for j in range(len(self))]
        return torch.stack(moved, 1)

    def _invert(self, st: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        axis = self._axis_of(st, input_size, 2)
        columns = enumerate(st.unbind(1))
        return torch.stack([self._moved(x, j, axis, input_size, inverse=True) for j, x in columns], 1)

    @abstractmethod
    def _moved(self, x: Tensor, j: int, axis: int, input_size: tuple[int, ...] | None, inverse: bool) -> Tensor:
        """Transformation j, or its inverse, along an axis of ``x``; ``input_size`` is None for inputs."""


class ShiftSet(PositionSet):
    """See :func:`shifts`."""

    def __init__(self, steps: Sequence[float], axis: int, fill: float | None) -> None:
        super().__init__(axis, [f"{step:+g}" if step else "0" for step in steps], {"shift": list(steps)})
        self.steps, self.fill = list(steps), fill
        self.identity = self.steps.index(0) if 0 in self.steps else None

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """The steps, the axis and the fill."""
        return (*self.steps, self.axis, self.fill)

    def products(self) -> Tensor:
        """See :meth:`TransformationSet.products`; the length, after which circular shifts repeat, is not known."""
        places = {round(step, 9): j for j, step in enumerate(self.steps)}
        return torch.tensor([[places.get(round(a + b, 9), -1) for b in self.steps] for a in self.steps])

    def _select(self, columns: list[int]) -> ShiftSet:
        return ShiftSet([self.steps[j] for j in columns], self.axis, self.fill)

    def _moved(self, x: Tensor, j: int, axis: int, input_size: tuple[int, ...] | None, inverse: bool) -> Tensor:
        step = -self.steps[j] if inverse else self.steps[j]
        if input_size is not None:  # steps are in positions of the input
            step *= x.shape[axis] / self._length_of_input(input_size)
        whole = math.floor(step + 1e-9)
        part = step - whole
        fill = self.fill if input_size is None else None if self.fill is None else 0.0
        low = _shifted(x, whole, axis, fill)
        if part < 1e-9:
            return low
        if not x.is_floating_point():
            raise ValueError(f"Expected shifts of {x.dtype} by whole positions, but got {step:g}.")
        return low.lerp(_shifted(x, whole + 1, axis, fill), part)


def _shifted(x: Tensor, step: int, axis: int, fill: float | None) -> Tensor:
    """Shift by whole positions: circular without a fill."""
    moved, length = x.roll(step, axis), x.shape[axis]
    if fill is not None and step:
        entered = min(abs(step), length)
        moved.narrow(axis, 0 if step > 0 else length - entered, entered).fill_(fill)
    return moved


def shifts(steps: Sequence[float], axis: int = -1, fill: float | None = None) -> ShiftSet:
    """Shifts along one axis of signals ``(batch, channels, time)`` or sequences ``(batch, tokens)``.

    On feature maps of another length a shift is scaled: by 4 of 64 positions is by 2 of 32. Between positions, values
    are interpolated.

    Args:
        steps: by how many positions of the input, towards higher indices; 0 is the identity.
        axis: which axis of a batch moves; write -2 for sequences ``(batch, tokens, features)``.
        fill: value that enters where others leave, such as 0 or the number of a padding token; measures with ``mask``
            leave these positions out. By default shifts are circular.

    Raises:
        ValueError: If there is no step, one is not finite or occurs twice, or ``axis`` is 0.

    Example:
        >>> import torch
        >>> shifts([0, 1], fill=0)(torch.tensor([[[1, 2, 3]]])).tolist()
        [[[[1, 2, 3]], [[0, 1, 2]]]]
    """
    known = list(steps) if isinstance(steps, Iterable) else []
    numbers = [step for step in known if isinstance(step, Real) and math.isfinite(step)]
    if not known or len({*numbers}) < len(known):
        raise ValueError(f"Expected argument `steps` to hold different finite numbers, but got {steps!r}.")
    if fill is not None and not math.isfinite(fill):
        raise ValueError(f"Expected argument `fill` to be a finite number or None, but got {fill!r}.")
    return ShiftSet(known, axis, fill)


class PermutationSet(PositionSet):
    """See :func:`permutations`."""

    def __init__(self, numbers: Sequence[int], axis: int, seed: int) -> None:
        super().__init__(axis, [f"permutation {j}" if j else "identity" for j in numbers])
        self.numbers, self.seed = list(numbers), seed
        self.identity = self.numbers.index(0) if 0 in self.numbers else None

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """The numbers, the axis and the seed."""
        return (*self.numbers, self.axis, self.seed)

    def why_not(self, positions: tuple[int, ...], input_size: tuple[int, ...]) -> str:
        """The positions must be those that are permuted."""
        length = self._length_of_input(input_size)
        return "" if positions == (length,) else f"{positions[0]} positions are not the {length} that are permuted"

    def _select(self, columns: list[int]) -> PermutationSet:
        return PermutationSet([self.numbers[j] for j in columns], self.axis, self.seed)

    def _moved(self, x: Tensor, j: int, axis: int, input_size: tuple[int, ...] | None, inverse: bool) -> Tensor:
        length = x.shape[axis]
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.numbers[j])
        order = torch.randperm(length, generator=generator) if self.numbers[j] else torch.arange(length)
        return x.index_select(axis, (order.argsort() if inverse else order).to(x.device))


def permutations(n: int = 8, axis: int = 1, seed: int = 0) -> PermutationSet:
    """The identity and n − 1 random permutations of points ``(batch, points, ...)`` or tokens ``(batch, tokens)``.

    They depend on ``seed`` and on the number of points alone.

    Args:
        n: number of permutations, with the identity.
        axis: which axis of a batch is permuted; write -1 for points ``(batch, coordinates, points)``.
        seed: another one draws other permutations.

    Raises:
        ValueError: If ``n`` is less than 1, or ``axis`` is 0.

    Example:
        >>> import torch
        >>> x = torch.arange(6.0).view(1, 3, 2)
        >>> t = permutations(3)
        >>> bool((t.inverse(t(x)) == x[:, None]).all())
        True
    """
    return PermutationSet(range(check_int("n", n)), axis, seed)
