"""What a measure makes its value of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, States


@dataclass(frozen=True)
class Sums(Mapping[str, Tensor]):
    """What a measure makes its value of: the states of the accumulators it needs, for one layer, by name.

    Attributes:
        states: name → tensor.
        n_samples: number of rows.
        n_transformations: number of columns.
        activation_shape: of the layer.
    """

    states: States
    n_samples: int
    n_transformations: int
    activation_shape: tuple[int, ...]

    def __getitem__(self, name: str) -> Tensor:
        return self.states[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)

    def shaped(self, values: Tensor) -> Tensor:
        """``(activations,)`` in the activation's shape."""
        return values.view(self.activation_shape)


def quotient(transformation: Tensor, sample: Tensor) -> Tensor:
    """What a normalised measure divides, with the paper's special cases: 0/0 is 1 (a dead activation), x/0 is inf.

    Args:
        transformation: how much an activation varies with the transformation.
        sample: how much it varies with the sample, of the same shape.
    """
    dead = (transformation == 0) & (sample == 0)
    return torch.where(dead, 1.0, transformation / sample)


def dead_of(accumulators: Sequence[Accumulator], sums: Sums) -> Tensor | None:
    """Which activations never changed, bool of the activation's shape; None where no accumulator tells."""
    for accumulator in accumulators if sums.n_samples else ():
        dead = accumulator.dead(sums.states)
        if dead is not None:
            shape = sums.activation_shape
            of_channels = dead.numel() != torch.Size(shape).numel()
            return dead.view(-1, *[1] * (len(shape) - 1)).expand(shape) if of_channels else dead.view(shape)
    return None
