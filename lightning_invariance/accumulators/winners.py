"""Agreement of transformations on the channel with the largest value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, add_to
from lightning_invariance.accumulators.rows import Rows, States


@dataclass(frozen=True)
class Winners(Accumulator):
    """``agreements`` ``(1,)``: the fraction of pairs of transformations with one winner, summed over samples.

    The winner is the channel with the largest value at a position of a feature map, the first of several. The fraction
    of a sample is the mean over positions. A sample with a NaN makes the sum NaN.
    """

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"agreements": torch.zeros(0, dtype=torch.float64)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the fractions of rows."""
        add_to(states, agreements=agreements(rows.maps)[:, None].sum(0))

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {"agreements": a["agreements"] + b["agreements"]}

    def shares(self, rows: Rows, totals: States) -> States:
        """The fraction of each sample."""
        return {"agreements": agreements(rows.maps)[:, None]}


def agreements(maps: Tensor) -> Tensor:
    """The fraction of pairs with one winner: (n, m, channels, positions) → ``(n,)``."""
    n, m, channels, positions = maps.shape
    largest = maps.max(2)  # on the CPU several times as fast as argmax over an axis that is not the last
    wins = torch.zeros(n, channels, positions, dtype=torch.int32, device=maps.device)
    wins.scatter_add_(1, largest.indices, wins.new_ones(1).expand(n, m, positions))
    equal = (wins * (wins - 1)).sum(1)
    found = equal.double().mean(1) / (m * (m - 1))
    return torch.where(largest.values.isnan().flatten(1).any(1), torch.nan, found)
