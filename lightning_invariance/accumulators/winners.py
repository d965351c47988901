"""Agreement of transformations on the channel with the largest value, such as the predicted class."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, add_to
from lightning_invariance.accumulators.mapped_back import identity_of
from lightning_invariance.accumulators.rows import Context, Rows, States


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


@dataclass(frozen=True)
class Confidences(Accumulator):
    r"""``confidences`` ``(1,)``: agreement with the identity, weighted by probabilities, summed over samples.

    For each transformation but the identity :math:`\sqrt{p\,p_t}`, where p and p_t are the probabilities of the winner
    under the identity and under t, or 0 if another channel wins. A sample adds the mean over transformations and
    positions.

    Attributes:
        probabilities: whether values are probabilities; otherwise softmax over the channels makes them some.
        reference: the column of the identity.
    """

    probabilities: bool = False
    reference: int = 0

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"confidences": torch.zeros(0, dtype=torch.float64)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the values of rows."""
        add_to(states, confidences=self.shares(rows, states)["confidences"].sum(0))

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {"confidences": a["confidences"] + b["confidences"]}

    def prepared(self, context: Context) -> Accumulator:
        """With the column of the identity."""
        return replace(self, reference=identity_of(context.transformations))

    def shares(self, rows: Rows, totals: States) -> States:
        """The value of each sample."""
        maps = rows.maps.double()
        largest = maps.max(2)
        log = largest.values.log() if self.probabilities else largest.values - maps.logsumexp(2)
        own, wins = slice(self.reference, self.reference + 1), largest.indices
        found = torch.where(wins == wins[:, own], ((log + log[:, own]) / 2).exp(), 0.0)
        found = torch.where(largest.values.isnan() | largest.values[:, own].isnan(), torch.nan, found)
        others = [j for j in range(found.shape[1]) if j != self.reference]
        return {"confidences": found[:, others].flatten(1).mean(1, keepdim=True)}


def agreements(maps: Tensor) -> Tensor:
    """The fraction of pairs with one winner: (n, m, channels, positions) → ``(n,)``."""
    n, m, channels, positions = maps.shape
    largest = maps.max(2)  # on the CPU several times as fast as argmax over an axis that is not the last
    wins = torch.zeros(n, channels, positions, dtype=torch.int32, device=maps.device)
    wins.scatter_add_(1, largest.indices, wins.new_ones(1).expand(n, m, positions))
    equal = (wins * (wins - 1)).sum(1)
    found = equal.double().mean(1) / (m * (m - 1))
    return torch.where(largest.values.isnan().flatten(1).any(1), torch.nan, found)
