"""The accumulators of one layer and their sums: the only place that calls an accumulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, check_states, started
from lightning_invariance.accumulators.rows import N_SAMPLES, Rows, States
from lightning_invariance.accumulators.sums import Sums, dead_of
from lightning_invariance.messages import given


class LayerState:
    """The distinct accumulators of one layer and their sums, during one or two passes over the rows.

    Args:
        accumulators: accumulators of the first pass.
        shape: shape of one activation.
        channel_axis: axis of the activation that holds the channels.
        order: the axes of the activation in the order of its memory, so that channels-last values need no copy; empty
            for the order of ``shape``.
        n_transformations: number of columns.
        device: device of the sums, by default the CPU.

    Attributes:
        shape: see Args. So are ``channel_axis``, ``order`` and ``n_transformations``.
        n_samples: number of rows in the first pass.
        in_second_pass: whether the second pass has begun.
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
        self._rows = 0  # in the current pass
        self.in_second_pass = False
        # Accumulators that accept half precision see the values before they are converted to float32.
        self._active = sorted(distinct(accumulators), key=lambda accumulator: not accumulator.takes_half)
        home = torch.device("cpu") if device is None else device
        self._states = {accumulator: started(accumulator, home) for accumulator in self._active}

    @property
    def active(self) -> bool:
        """Whether any accumulator needs the rows of the current pass."""
        return bool(self._active)

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        return sum(state.nbytes for states in self._states.values() for state in states.values())

    def add(self, rows: Rows) -> None:
        """Add rows of activations whose axes are in :attr:`order`."""
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
                check_states(accumulator, states, "add")  # later calls run the code of the first
        self._count(self._rows + rows.values.shape[0])

    def check(self) -> None:
        """Raise if a state violates the contract of :class:`Accumulator`."""
        for accumulator in self._active:
            check_states(accumulator, self._states[accumulator], "add")

    def begin_second_pass(self, begun: Iterable[tuple[Accumulator, States]], device: torch.device) -> None:
        """Replace the active accumulators by the accumulators of the second pass.

        Args:
            begun: accumulators, each with the states that it starts from; other states start empty.
            device: device of the states that start empty.

        Raises:
            ValueError: If two equal accumulators start from different states.
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
        """The sums of some accumulators; accumulators of a second pass that has not begun are omitted."""
        states: States = {}
        n_samples = 0
        for accumulator in accumulators:
            holder = self._holder_of(accumulator)
            if holder is not None:
                states.update({name: self._states[holder][name] for name in accumulator.empty()})
                n_samples = self._rows if holder in self._active else self.n_samples
        return Sums(states, n_samples, self.n_transformations, self.ordered_shape, self.ordered_channel_axis)

    def dead(self) -> Tensor | None:
        """Which activations never changed, bool of :attr:`shape`, on the CPU; None if no accumulator knows."""
        for accumulator in self._states:
            if (found := dead_of([accumulator], self.sums([accumulator]))) is not None:
                return self.in_shape(found, by_activation=True).cpu()
        return None

    def states(self, numbered: bool = True) -> States:
        """The sums of the current pass and ``n_samples``, as one dict.

        Args:
            numbered: whether names are like ``"0.row_spread"``, since accumulators may have states of equal names.
        """
        states = {key: self._states[a][name] for a, keys in self._keys(numbered) for name, key in keys.items()}
        return {**states, N_SAMPLES: torch.tensor(self._rows)}

    def load(self, states: Mapping[str, Tensor], numbered: bool = True) -> None:
        """Replace the sums of the current pass by :meth:`states` of a layer with equal accumulators."""
        for accumulator, keys in self._keys(numbered):
            self._states[accumulator].update({name: states[key] for name, key in keys.items()})
        self._count(int(states[N_SAMPLES]))

    def merged(self, a: States, b: States, numbered: bool = True) -> States:
        """Merge two dicts of :meth:`states`, either of which may have no rows."""
        found: States = {}
        for accumulator, keys in self._keys(numbered):
            own, other = ({name: each[key] for name, key in keys.items()} for each in (a, b))
            both = merged(accumulator, {**own, N_SAMPLES: a[N_SAMPLES]}, {**other, N_SAMPLES: b[N_SAMPLES]})
            found.update({key: both[name] for name, key in keys.items()})
        return {**found, N_SAMPLES: a[N_SAMPLES] + b[N_SAMPLES]}

    def _keys(self, numbered: bool) -> list[tuple[Accumulator, dict[str, str]]]:
        """For each accumulator of the current pass, state → its name in :meth:`states`."""
        active = enumerate(self._active)
        return [(a, {name: f"{i}.{name}" if numbered else name for name in a.empty()}) for i, a in active]

    def _holder_of(self, accumulator: Accumulator) -> Accumulator | None:
        """The accumulator whose states include the states of another one, if there is one."""
        return next((own for own in self._states if own.includes(accumulator)), None)

    def _count(self, rows: int) -> None:
        self._rows = rows
        if not self.in_second_pass:
            self.n_samples = rows

    @property
    def ordered_shape(self) -> tuple[int, ...]:
        """The shape of the activation with its axes in :attr:`order`."""
        return tuple(self.shape[axis] for axis in self.order) if self.order else self.shape

    @property
    def ordered_channel_axis(self) -> int:
        """Position of the channel axis in :attr:`order`."""
        return self.order.index(self.channel_axis) if self.order else self.channel_axis

    def in_order(self, st: Tensor) -> Tensor:
        """``(rows, columns, *shape)`` → ``(rows, columns, *ordered_shape)``."""
        return st.permute(0, 1, *(2 + axis for axis in self.order)) if self.order else st

    def in_shape(self, values: Tensor, by_activation: bool) -> Tensor:
        """Restore the axes of values computed from the sums: ``(..., *ordered_shape)`` → ``(..., *shape)``.

        Args:
            values: the values.
            by_activation: whether their last axes are axes of the activation; all others are returned as they are.
        """
        if not self.order or not by_activation:
            return values
        leading = values.ndim - len(self.shape)
        return values.movedim([*range(leading, values.ndim)], [leading + axis for axis in self.order]).contiguous()


def memory_order(activation: Tensor, channel_axis: int) -> tuple[int, ...]:
    """The axes of an activation in the order of its memory, if only the channel axis is in another place; else empty.

    Measures of maps need the other axes in their order. Later blocks with another memory order are copied.
    """
    if activation.is_contiguous():
        return ()
    order = tuple(sorted(range(activation.ndim), key=activation.stride, reverse=True))
    others = [axis for axis in order if axis != channel_axis]
    return order if others == sorted(others) and activation.permute(order).is_contiguous() else ()


def merged(accumulator: Accumulator, a: States, b: States) -> States:
    """Merge two states with ``n_samples``, either of which may have no rows."""
    if not int(a[N_SAMPLES]) or not int(b[N_SAMPLES]):
        full = a if int(a[N_SAMPLES]) else b
        return {name: state.clone() for name, state in full.items()}
    states = accumulator.merge(a, b)
    if not isinstance(states, dict):
        raise TypeError(f"Expected {type(accumulator).__name__}.merge to return a dict, but got {given(states)}.")
    check_states(accumulator, states, "merge")
    return {**states, N_SAMPLES: a[N_SAMPLES] + b[N_SAMPLES]}


def distinct(accumulators: Sequence[Accumulator]) -> list[Accumulator]:
    """The accumulators that no other accumulator includes."""
    kept: list[Accumulator] = []
    for accumulator in accumulators:
        if not any(other.includes(accumulator) for other in kept):
            kept = [other for other in kept if not accumulator.includes(other)]
            kept.append(accumulator)
    return kept
