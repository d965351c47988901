"""The sums of one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.accumulators.base import N_SAMPLES, Accumulator, States, check_states, started
from lightning_invariance.engine.influence import Influence
from lightning_invariance.engine.influence_on_mean import InfluenceOnMean


@dataclass
class Tally:
    """An accumulator with its states for one layer.

    Attributes:
        accumulator: what is summed.
        states: the sums.
        n_samples: how many rows they hold.
    """

    accumulator: Accumulator
    states: States
    n_samples: int = 0

    def counted(self) -> States:
        """The states with the number of rows."""
        return {**self.states, N_SAMPLES: torch.tensor(self.n_samples)}


@dataclass
class Layer:
    """One layer: its accumulators with their states.

    Attributes:
        shape: of its activation.
        channel_axis: which axis of the activation holds the channels.
        order: the axes of the activation in the order in which its values are added, so that they need not be copied
            where channels come last in memory; empty for the order of the activation.
        first: the accumulators of the first pass, each once.
        second: those of a second pass.
        metrics: metrics that are no :class:`Measure`, by name.
        influences: of samples on measures, by name of the measure.
    """

    shape: tuple[int, ...]
    channel_axis: int = 0
    order: tuple[int, ...] = ()
    first: list[Tally] = field(default_factory=list)
    second: list[Tally] = field(default_factory=list)
    metrics: dict[str, Metric] = field(default_factory=dict)
    influences: dict[str, Influence | InfluenceOnMean] = field(default_factory=dict)

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

    def in_shape(self, values: Tensor) -> Tensor:
        """Values ``(..., *ordered_shape)``, or flat ones, that were computed from the sums, in :attr:`shape`.

        Others have no axes of positions, such as those of channels, and are returned as they are. These are never as
        many as the activations: where a channel has one position, :attr:`order` is empty.
        """
        own = self.ordered_shape
        if self.order and values.shape == (math.prod(own),):
            return self.in_shape(values.view(own)).flatten()
        if not self.order or values.shape[-len(own) :] != own:
            return values
        leading = values.ndim - len(own)
        axes = [*range(leading), *(leading + self.order.index(axis) for axis in range(len(own)))]
        return values.permute(axes).contiguous()

    @property
    def waiting(self) -> list[Influence | InfluenceOnMean]:
        """The influences to which rows of this pass are added."""
        return [influence for influence in self.influences.values() if influence.waits]

    def tally_of(self, accumulator: Accumulator) -> Tally | None:
        """The tally whose states hold those of an accumulator; None where there is none."""
        tallies = (*self.first, *self.second)
        return next((tally for tally in tallies if tally.accumulator.includes(accumulator)), None)

    def begin_second_pass(self, accumulators: Sequence[Accumulator], begun: States, device: torch.device) -> None:
        """Begin a second pass of some accumulators, each of which exists once, with some states.

        Raises:
            ValueError: If an equal accumulator has begun with other states.
        """
        for accumulator in accumulators:
            check_states(accumulator, {**accumulator.empty(), **begun}, "second_pass")
            own = {name: begun[name] for name in accumulator.empty() if name in begun}
            known = self.tally_of(accumulator)
            if known is None:
                self.second.append(Tally(accumulator, {**started(accumulator, device), **own}))
            elif not all(torch.allclose(v, known.states[name], 0, 0, equal_nan=True) for name, v in own.items()):
                raise ValueError(
                    f"Expected second passes of equal accumulators to begin with equal states, but those of"
                    f" {accumulator!r} differ: give it a field for each argument that `second_pass` uses."
                )


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
