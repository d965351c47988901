"""Accumulators of one layer with their sums: the only place that calls an accumulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import (
    N_SAMPLES,
    Accumulator,
    Rows,
    States,
    check_states,
    merged,
    started,
)
from lightning_invariance.accumulators.sums import Sums, dead_of
from lightning_invariance.messages import given


class LayerState:
    """Accumulators of one layer, each of which exists once, with their sums, in one or two passes over the rows.

    Args:
        accumulators: of the first pass.
        shape: of the activation.
        channel_axis: which axis of the activation holds the channels.
        order: the axes of the activation in the order in which its values lie in memory, so that they need not be
            copied where channels come last; empty for the order of the activation.
        n_transformations: number of columns.
        device: where the sums are.

    Attributes:
        shape: see Args. So are ``channel_axis``, ``order`` and ``n_transformations``.
        n_samples: number of rows, as counted in the first pass.
        in_second_pass: whether a second pass over the same rows has begun.
    """

    def __init__(
        self,
        accumulators: Sequence[Accumulator],
        shape: tuple[int, ...] = (),
        channel_axis: int = 0,
        order: tuple[int, ...] = (),
        n_transformations: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.shape, self.channel_axis, self.order = shape, channel_axis, order
        self.n_samples, self.n_transformations = 0, n_transformations
        self._rows = 0  # in the pass at hand
        self.in_second_pass = False
        # Those that take half precision come first, before values are widened.
        self._active = sorted(distinct(accumulators), key=lambda accumulator: not accumulator.takes_half)
        home = torch.device("cpu") if device is None else device
        self._states = {accumulator: started(accumulator, home) for accumulator in self._active}
        self._n_of = dict.fromkeys(self._active, 0)

    @property
    def active(self) -> bool:
        """Whether any accumulator takes rows in the pass at hand."""
        return bool(self._active)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(state.nbytes for states in self._states.values() for state in states.values())

    def add(self, rows: Rows) -> None:
        """Add rows, whose activations have their axes in :attr:`order`."""
        rows.before = self._rows
        for accumulator in self._active:
            if not accumulator.takes_half:
                rows.widen()
            states = self._states[accumulator]
            if (returned := accumulator.add(states, rows)) is not None:
                raise TypeError(
                    f"Expected {type(accumulator).__name__}.add to change `states` in place and to return None, but got"
                    f" {given(returned)}: write `states.update(...)`."
                )
            if not rows.before:
                check_states(accumulator, states, "add")  # later rows are added in the same way
        self._count(self._rows + rows.values.shape[0])

    def check(self) -> None:
        """Raise where a state is not what :class:`Accumulator` asks for."""
        for accumulator in self._active:
            check_states(accumulator, self._states[accumulator], "add")

    def begin_second_pass(self, begun: Iterable[tuple[Accumulator, States]], device: torch.device) -> None:
        """Let other accumulators take the rows of a second pass.

        Args:
            begun: accumulators, each with some states that it begins with.
            device: where the other states are.

        Raises:
            ValueError: If an equal accumulator has begun with other states.
        """
        self._active, self.in_second_pass = [], True
        for accumulator, states in begun:
            check_states(accumulator, {**accumulator.empty(), **states}, "second_pass")
            own = {name: states[name] for name in accumulator.empty() if name in states}
            known = self._holder_of(accumulator)
            if known is None:
                self._states[accumulator] = {**started(accumulator, device), **own}
                self._active.append(accumulator)
            elif any(not torch.allclose(v, self._states[known][name], 0, 0, True) for name, v in own.items()):
                raise ValueError(
                    f"Expected second passes of equal accumulators to begin with equal states, but the states of"
                    f" {accumulator!r} differ: give it a field for each argument that `second_pass` uses."
                )
        self._count(0)

    def sums(self, accumulators: Iterable[Accumulator]) -> Sums:
        """The sums of some accumulators; without accumulators of a second pass that has not begun."""
        states: States = {}
        n_samples = 0
        for accumulator in accumulators:
            holder = self._holder_of(accumulator)
            if holder is not None:
                states.update({name: self._states[holder][name] for name in accumulator.empty()})
                n_samples = self._n_of[holder]
        return Sums(states, n_samples, self.n_transformations, self.ordered_shape, self.ordered_channel_axis)

    def dead(self) -> Tensor | None:
        """Which activations never changed, bool of :attr:`shape`, on the CPU; None where no accumulator tells."""
        for accumulator in self._states:
            if (found := dead_of([accumulator], self.sums([accumulator]))) is not None:
                return self.in_shape(found, by_activation=True).cpu()
        return None

    def states(self, numbered: bool = True) -> States:
        """The sums of the pass at hand, and ``n_samples``, as one dict.

        Args:
            numbered: whether names are ``"0.row_spread"``, since several accumulators may have a state of one name.
        """
        states = {key: self._states[a][name] for key, a, name in self._keys(numbered)}
        return {**states, N_SAMPLES: torch.tensor(self._rows)}

    def load(self, states: Mapping[str, Tensor], numbered: bool = True) -> None:
        """Replace the sums of the pass at hand by :meth:`states` of a layer with the same accumulators."""
        for key, accumulator, name in self._keys(numbered):
            self._states[accumulator][name] = states[key]
        self._count(int(states[N_SAMPLES]))

    def merged(self, a: States, b: States, numbered: bool = True) -> States:
        """The :meth:`states` after the rows of two of them, either of which may have none."""
        found: States = {}
        for i, accumulator in enumerate(self._active):
            keys = {name: f"{i}.{name}" if numbered else name for name in accumulator.empty()}
            parts = ({name: each[key] for name, key in keys.items()} | {N_SAMPLES: each[N_SAMPLES]} for each in (a, b))
            both = merged(accumulator, *parts)
            found.update({key: both[name] for name, key in keys.items()})
        return {**found, N_SAMPLES: a[N_SAMPLES] + b[N_SAMPLES]}

    def _keys(self, numbered: bool) -> list[tuple[str, Accumulator, str]]:
        """The names of the states of the pass at hand, with the accumulator and its own name of each."""
        active = enumerate(self._active)
        return [(f"{i}.{name}" if numbered else name, a, name) for i, a in active for name in a.empty()]

    def _holder_of(self, accumulator: Accumulator) -> Accumulator | None:
        """The accumulator whose states hold the sums of another one; None where there is none."""
        return next((own for own in self._states if own.includes(accumulator)), None)

    def _count(self, rows: int) -> None:
        self._rows = rows
        if not self.in_second_pass:
            self.n_samples = rows
        self._n_of.update(dict.fromkeys(self._active, rows))

    @property
    def ordered_shape(self) -> tuple[int, ...]:
        """The shape of the activation with its axes in :attr:`order`."""
        return tuple(self.shape[axis] for axis in self.order) if self.order else self.shape

    @property
    def ordered_channel_axis(self) -> int:
        """Which of the axes in :attr:`order` holds the channels."""
        return self.order.index(self.channel_axis) if self.order else self.channel_axis

    def in_order(self, st: Tensor) -> Tensor:
        """``(rows, columns, *shape)`` → ``(rows, columns, *ordered_shape)``."""
        return st.permute(0, 1, *(2 + axis for axis in self.order)) if self.order else st

    def in_shape(self, values: Tensor, by_activation: bool) -> Tensor:
        """Values that were computed from the sums, in :attr:`shape`.

        Args:
            values: ``(..., *ordered_shape)``, or any others.
            by_activation: whether their last axes are the axes of the activation.
        """
        if not self.order or not by_activation:
            return values
        leading = values.ndim - len(self.shape)
        axes = [*range(leading), *(leading + self.order.index(axis) for axis in range(len(self.shape)))]
        return values.permute(axes).contiguous()


def memory_order(activation: Tensor, channel_axis: int) -> tuple[int, ...]:
    """The axes of an activation in the order of its values in memory, where that differs by the place of the channels.

    Empty otherwise: measures of maps need the other axes in their order. A later block that lies otherwise in memory is
    copied.
    """
    if activation.is_contiguous():
        return ()
    order = tuple(sorted(range(activation.ndim), key=activation.stride, reverse=True))
    others = [axis for axis in order if axis != channel_axis]
    return order if others == sorted(others) and activation.permute(order).is_contiguous() else ()


def distinct(accumulators: Sequence[Accumulator]) -> list[Accumulator]:
    """The accumulators without those that another one includes."""
    kept: list[Accumulator] = []
    for accumulator in accumulators:
        if not any(other.includes(accumulator) for other in kept):
            kept = [other for other in kept if not accumulator.includes(other)]
            kept.append(accumulator)
    return kept
