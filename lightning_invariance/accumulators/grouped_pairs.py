"""Distances within the columns of the ST matrix, between samples of one group."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.distances import Distance, row_distances
from lightning_invariance.accumulators.influences import Group, GroupShare
from lightning_invariance.accumulators.rows import Rows, States
from lightning_invariance.data.rank_shares import groups_of

#: Positions in the state ``groups``: number and rows of the incomplete group, Σ P, Σ P², and number of added groups.
NUMBER, WAITING, PAIRS, SQUARED_PAIRS, ADDED = range(5)

#: The states that are sums over groups.
SUMS = ("column_distances", "column_squares", "column_products")


@dataclass(frozen=True)
class GroupedPairs(Accumulator):
    r"""The distances :math:`D_g` of all ordered pairs of samples of group g, summed over columns.

    One process gets all samples of a group, consecutively. Their order is random, so that groups are a random choice
    that does not depend on batches. Rows are kept until their group is complete; everything else is sums.

    - ``column_distances``, ``column_squares``, ``column_products`` ``(k,)``, or ``(channels,)`` for
      ``over="channel"``: :math:`\sum_g D_g`, :math:`\sum_g D_g^2`, :math:`\sum_g D_g P_g` in float64, with the numbers
      of pairs :math:`P_g = m s_g (s_g - 1)` of groups of :math:`s_g` samples.
    - ``waiting`` ``(m, samples, channels, positions)``: the rows of the incomplete group.
    - ``groups`` ``(5,)`` in int64, on the CPU: see :data:`NUMBER` and the constants after it.
    - Values that are NaN or infinite make the sums of their activation NaN or infinite.

    Attributes:
        distance: see :func:`~lightning_invariance.accumulators.distances.distance_between`.
        over: ``"activation"``, ``"channel"`` or ``"layer"``.
        samples: largest number of samples in a group.
        run: largest number of consecutive samples that a process gets; at least ``samples``.
        expected: number of samples in all.
    """

    distance: Distance
    over: str
    samples: int
    run: int
    expected: int

    cpu_states = ("groups",)
    in_groups = True
    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {
            **{name: torch.zeros(0, dtype=torch.float64) for name in SUMS},
            "waiting": torch.zeros(0, 0, 0, 0),
            "groups": torch.zeros(0, dtype=torch.long),
        }

    def add(self, states: States, rows: Rows) -> None:
        """Keep rows until their group is complete, then add its distances."""
        x = rows.vectors(self.over)
        if not states["groups"].numel():
            m, *shape = x.shape[1:]
            states.update(dict.fromkeys(SUMS, torch.zeros(shape[0], dtype=torch.float64, device=x.device)))
            states["waiting"] = x.new_zeros(m, min(self.samples, self.expected), *shape)
            states["groups"] = torch.zeros(5, dtype=torch.long)
        row = 0
        for part in self.groups(rows):
            known, waiting = states["groups"][:PAIRS].tolist()
            if waiting and known != part.number:  # the layer did not run for all samples of the last group
                states.update(self.added(states))
                waiting = 0
            states["waiting"][:, waiting : waiting + part.rows] = x[row : row + part.rows].transpose(0, 1)
            row += part.rows
            states["groups"][:PAIRS] = torch.tensor([part.number, waiting + part.rows])
            if waiting + part.rows == part.size:
                states.update(self.added(states))

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both, with at most one incomplete group."""
        both = [a, b]
        if all(int(states["groups"][WAITING]) for states in both):
            both = [{**states, **self.added(states)} for states in both]
        first = next((states for states in both if int(states["groups"][WAITING])), both[0])
        groups = both[0]["groups"] + both[1]["groups"]
        groups[NUMBER] = first["groups"][NUMBER]
        sums = {name: both[0][name] + both[1][name] for name in SUMS}
        return {**sums, "waiting": first["waiting"], "groups": groups}

    def group_of(self, indices: Tensor) -> Tensor:
        """The number of the group of each sample."""
        return groups_of(indices, self.expected, self.run, self.samples)[0]

    def groups(self, rows: Rows) -> list[Group]:
        """The groups of consecutive rows, computed once for all layers that run for these samples."""
        indices = rows.indices
        if indices is None:
            raise ValueError("Expected argument `indices` for measures that were prepared for runs of samples.")
        if self not in rows.block_memo:
            groups, sizes = groups_of(indices, self.expected, self.run, self.samples)
            counts = Counter(zip(groups.tolist(), sizes.tolist(), strict=True))
            rows.block_memo[self] = [Group(number, size, count) for (number, size), count in counts.items()]
        found: list[Group] = rows.block_memo[self]
        return found

    def share_of_group(self, states: States, totals: States) -> GroupShare | None:
        """Return the distances of the group last added to ``states``, and reset them; None until it is complete."""
        counts, all_counts = states["groups"], totals["groups"].tolist()
        if int(counts[WAITING]):
            return None
        distances, pairs = states["column_distances"], int(counts[PAIRS])
        states["column_distances"], counts[PAIRS] = torch.zeros_like(distances), 0
        return GroupShare({"column_distances": distances[None]}, pairs / all_counts[PAIRS], all_counts[ADDED])

    def added(self, states: States) -> States:
        """The changed states after adding the incomplete group as it is."""
        groups = states["groups"].clone()
        waiting = int(groups[WAITING])
        groups[WAITING] = 0
        if not waiting:
            return {"groups": groups}
        values = states["waiting"][:, :waiting]
        found = row_distances(values, self.distance, self.over)
        pairs = len(values) * waiting * (waiting - 1)  # 0 for a single sample
        groups += torch.tensor([0, 0, pairs, pairs**2, pairs > 0])
        return {
            "column_distances": states["column_distances"] + found,
            "column_squares": states["column_squares"] + found.square(),
            "column_products": states["column_products"] + found * pairs,
            "groups": groups,
        }


def mean_and_error(states: States) -> tuple[Tensor, Tensor]:
    r"""The mean distance of two samples :math:`R = \sum_g D_g / \sum_g P_g`, and its standard error.

    The standard error for G random groups of samples is
    :math:`\sqrt{\frac{G}{G - 1} \sum_g (D_g - R P_g)^2} / \sum_g P_g`; NaN for a single group.
    """
    pairs, squared_pairs, n = states["groups"][PAIRS:].tolist()
    if not pairs:
        nan = torch.full_like(states["column_distances"], torch.nan)
        return nan, nan
    mean = states["column_distances"] / pairs
    squares = states["column_squares"] - 2 * mean * states["column_products"] + mean.square() * squared_pairs
    return mean, (squares.clamp_min(0) * (n / (n - 1) if n > 1 else torch.nan)).sqrt() / pairs
