"""Inputs of ``Measure.value``: the sums of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.rows import States


@dataclass(frozen=True)
class Sums(Mapping[str, Tensor]):
    """The states of the accumulators that a measure needs, for one layer, by name.

    Attributes:
        states: name → tensor.
        n_samples: number of rows.
        n_transformations: number of columns.
        activation_shape: shape of one activation of the layer, without the batch axis.
        channel_axis: axis of ``activation_shape`` that holds the channels.
    """

    states: States
    n_samples: int
    n_transformations: int
    activation_shape: tuple[int, ...]
    channel_axis: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.states[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def n_channels(self) -> int:
        """Number of channels; 1 for an activation without axes."""
        return self.activation_shape[self.channel_axis] if self.activation_shape else 1

    def channels_first(self) -> Sums:
        """These states with the shape of an activation whose channels come first."""
        shape = list(self.activation_shape)
        if self.channel_axis:
            shape.insert(0, shape.pop(self.channel_axis))
        return replace(self, activation_shape=tuple(shape), channel_axis=0)

    def shaped(self, values: Tensor) -> Tensor:
        """Reshape ``(activations,)`` to the shape of the activation."""
        return values.view(self.activation_shape)


def dead_of(accumulators: Sequence[Accumulator], sums: Sums) -> Tensor | None:
    """Which activations never changed, bool of the activation's shape; None if no accumulator knows."""
    for accumulator in accumulators if sums.n_samples else ():
        dead = accumulator.dead(sums.states)
        if dead is not None:
            shape = sums.activation_shape
            if dead.numel() == torch.Size(shape).numel():
                return dead.view(shape)
            of_channels = [1] * len(shape)
            of_channels[sums.channel_axis] = -1
            return dead.view(of_channels).expand(shape)
    return None
