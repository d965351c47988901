"""Distances within the columns of the ST matrix, of the pairs in groups of samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, Group, GroupShare, Rows, States
from lightning_invariance.accumulators.distances import Distance, row_distances
from lightning_invariance.distributed import groups_of

#: What ``groups`` counts, in this order: the waiting group's number and its rows, Σ P, Σ P² and groups added.
NUMBER, WAITING, PAIRS, SQUARED_PAIRS, ADDED = range(5)


@dataclass(frozen=True)
class GroupedPairs(Accumulator):
    r"""The distances of all ordered pairs of samples that share a group, summed over columns: :math:`D_g` of group g.

    Each process has all samples of a group, one after the other and in a random order, so that groups are a random
    choice that does not depend on batches. The rows of one group wait for its last; everything else is sums.

    - ``column_distances``, ``column_squares``, ``column_products`` ``(k,)``, or ``(channels,)`` for
      ``over="channel"``: :math:`\sum_g D_g`, :math:`\sum_g D_g^2`, :math:`\sum_g D_g P_g` in float64, with the numbers
      of pairs :math:`P_g = m s_g (s_g - 1)` of groups of :math:`s_g` samples.
    - ``waiting`` ``(m, samples, channels, positions)``: the rows of the last group.
    - ``groups`` ``(5,)`` in int64, on the CPU: see above.
    - Values that are NaN or infinite make the sums of their activation NaN or infinite.

    Attributes:
        distance: see :func:`~lightning_invariance.accumulators.distances.distance_between`.
        over: ``"activation"`` or ``"channel"``.
        samples: how many a group holds at most.
        run: how many samples, one after the other, a process takes at most; no less than ``samples``.
        expected: how many samples there will be.
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
        sums = ("column_distances", "column_squares", "column_products")
        return {
            **{name: torch.zeros(0, dtype=torch.float64) for name in sums},
            "waiting": torch.zeros(0, 0, 0, 0),
            "groups": torch.zeros(0, dtype=torch.long),
        }

    def add(self, states: States, rows: Rows) -> None:
        """Let rows wait for their group, and add the groups that are complete."""
        x = rows.maps if self.over == "channel" else rows.flat[..., None]
        if not states["groups"].numel():
            m, *shape = x.shape[1:]
            zeros = torch.zeros(shape[0], dtype=torch.float64, device=x.device)
            states.update(column_distances=zeros, column_squares=zeros, column_products=zeros)
            states["waiting"] = x.new_zeros(m, min(self.samples, self.expected), *shape)
            states["groups"] = torch.zeros(5, dtype=torch.long)
        row = 0
        for part in self.groups(rows):
            known, waiting = states["groups"][:PAIRS].tolist()
            if waiting and known != part.number:  # not every sample of the last group reached this layer
                states.update(self.added(states))
                waiting = 0
            states["waiting"][:, waiting : waiting + part.rows] = x[row : row + part.rows].transpose(0, 1)
            row += part.rows
            states["groups"][:PAIRS] = torch.tensor([part.number, waiting + part.rows])
            if waiting + part.rows == part.size:
                states.update(self.added(states))

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both, of which at most one still waits for others."""
        both = [a, b]
        if all(int(states["groups"][WAITING]) for states in both):
            both = [{**states, **self.added(states)} for states in both]
        first = next((states for states in both if int(states["groups"][WAITING])), both[0])
        summed = ("column_distances", "column_squares", "column_products")
        groups = both[0]["groups"] + both[1]["groups"]
        groups[NUMBER] = first["groups"][NUMBER]
        return {
            **{name: both[0][name] + both[1][name] for name in summed},
            "waiting": first["waiting"],
            "groups": groups,
        }

    def group_of(self, indices: Tensor) -> Tensor:
        """The number of the group of each sample."""
        return groups_of(indices, self.expected, self.run, self.samples)[0]

    def groups(self, rows: Rows) -> list[Group]:
        """The groups of a block, one after the other; computed once for all layers that have seen these samples."""
        indices = rows.indices
        if indices is None:
            raise ValueError("Expected argument `indices` for measures that were prepared for runs of samples.")
        known, parts = rows.block_memo.get(self, (None, []))
        if known is None or not torch.equal(known, indices):
            groups, sizes = groups_of(indices, self.expected, self.run, self.samples)
            counts = Counter(zip(groups.tolist(), sizes.tolist(), strict=True))
            parts = [Group(number, size, count) for (number, size), count in counts.items()]
            rows.block_memo[self] = indices, parts
        found: list[Group] = parts
        return found

    def share_of_group(self, states: States, totals: States) -> GroupShare | None:
        """What the group that was just added adds to the sum of distances, which begins anew; None while it waits."""
        counts, all_counts = states["groups"], totals["groups"].tolist()
        if int(counts[WAITING]):
            return None
        distances, pairs = states["column_distances"], int(counts[PAIRS])
        states["column_distances"], counts[PAIRS] = torch.zeros_like(distances), 0
        return GroupShare({"column_distances": distances[None]}, pairs / all_counts[PAIRS], all_counts[ADDED])

    def added(self, states: States) -> States:
        """The sums with those of the group that waits, whether or not it is complete."""
        groups = states["groups"].clone()
        waiting = int(groups[WAITING])
        groups[WAITING] = 0
        if not waiting:
            return {"groups": groups}
        values = states["waiting"][:, :waiting]
        found = row_distances(values, self.distance, self.over)
        pairs = len(values) * waiting * (waiting - 1)  # none of a single sample, whose distance to itself may be NaN
        groups += torch.tensor([0, 0, pairs, pairs**2, pairs > 0])
        return {
            "column_distances": states["column_distances"] + found,
            "column_squares": states["column_squares"] + found.square(),
            "column_products": states["column_products"] + found * pairs,
            "groups": groups,
        }


def mean_and_error(states: States) -> tuple[Tensor, Tensor]:
    r"""The mean distance of two samples :math:`R = \sum_g D_g / \sum_g P_g`, and its standard error.

    For G groups of samples that were drawn at random it is
    :math:`\sqrt{\frac{G}{G - 1} \sum_g (D_g - R P_g)^2} / \sum_g P_g`; NaN for a single group.
    """
    pairs, squared_pairs, n = states["groups"][PAIRS:].tolist()
    if not pairs:
        nan = torch.full_like(states["column_distances"], torch.nan)
        return nan, nan
    mean = states["column_distances"] / pairs
    squares = states["column_squares"] - 2 * mean * states["column_products"] + mean.square() * squared_pairs
    return mean, (squares.clamp_min(0) * (n / (n - 1) if n > 1 else torch.nan)).sqrt() / pairs
