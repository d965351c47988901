"""A random choice of samples for each column, independent of order, batches, processes and merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.distances import Distance
from lightning_invariance.accumulators.grouped_pairs import GroupedPairs
from lightning_invariance.accumulators.rows import Context, Rows, States

#: The key of an empty place.
EMPTY = torch.iinfo(torch.int64).max

#: New samples, each ``(changes,)``: column of the ST matrix, place in that column, position in the block, and key.
Choice: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class ColumnPairs(Accumulator):
    """Pairs of samples within columns: of all samples, in groups, if samples come in runs; else of a random choice.

    :meth:`prepared` returns :class:`GroupedPairs` if samples come in runs. Otherwise each sample has a random key for
    each column, a hash of the numbers of sample and column; each column keeps the samples with the smallest keys.
    Columns keep different samples, which makes the mean over columns far more precise than whole rows would. Samples
    without numbers are numbered by their values and the number of samples before them: by values alone, equal samples
    would be kept, or not, together.

    - ``keys`` ``(m, samples)`` in int64, on the CPU, and ``kept`` ``(m, samples, k)``: keys and values.
    - ``flawed`` ``(k,)``: whether an activation was NaN or infinite for any sample, kept or not.

    Attributes:
        samples: number of samples that each column keeps, or in a group.
        distance: see :func:`~lightning_invariance.accumulators.distances.distance_between`.
        over: ``"activation"``, ``"channel"`` or ``"layer"``.
    """

    samples: int
    distance: Distance = "abs"
    over: str = "activation"

    cpu_states = ("keys",)
    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {
            "keys": torch.zeros(0, 0, dtype=torch.long),
            "kept": torch.zeros(0, 0, 0),
            "flawed": torch.zeros(0, dtype=torch.bool),
        }

    def add(self, states: States, rows: Rows) -> None:
        """Replace kept samples by samples with smaller keys."""
        x = rows.flat
        if not states["keys"].numel():
            m, k = x.shape[1:]
            states["keys"] = torch.full((m, self.samples), EMPTY)
            states["kept"] = torch.zeros(m, self.samples, k, dtype=x.dtype, device=x.device)
            states["flawed"] = torch.zeros(k, dtype=torch.bool, device=x.device)
        if not x.is_cpu or not x.sum().isfinite():  # to read the sum from a GPU would synchronise
            states["flawed"] = states["flawed"] | ~x.isfinite().flatten(0, 1).all(0)
        columns, places, samples, keys = self._choice(states["keys"], rows)
        if len(columns):
            states["keys"][columns, places] = keys
            columns, places, samples = (each.to(x.device, non_blocking=True) for each in (columns, places, samples))
            states["kept"][columns, places] = x[samples, columns].to(states["kept"].dtype)

    def merge(self, a: States, b: States) -> States:
        """The samples with the smallest keys of both."""
        keys, kept = torch.cat([a["keys"], b["keys"]], 1), torch.cat([a["kept"], b["kept"]], 1)
        order = keys.argsort(dim=1, stable=True)[:, : self.samples]
        columns = torch.arange(len(keys))[:, None]
        return {
            "keys": keys.gather(1, order),
            "kept": kept[columns.to(kept.device), order.to(kept.device)],
            "flawed": a["flawed"] | b["flawed"],
        }

    @property
    def least_run(self) -> int:
        """The size of a group."""
        return self.samples

    def prepared(self, context: Context) -> Accumulator:
        """Form groups if samples come in runs."""
        if context.run < self.samples or context.n_samples is None:
            return self
        return GroupedPairs(self.distance, self.over, self.samples, context.run, context.n_samples)

    def _choice(self, keys: Tensor, rows: Rows) -> Choice:
        """Choose rows to keep, once for all layers that run for these samples."""
        if rows.indices is None:
            arrived = torch.arange(rows.before, rows.before + len(rows.flat))
            return choose(keys, keys_of(indices_of_contents(rows.flat).cpu() ^ mixed(arrived), len(keys)))
        before, choice = rows.block_memo.get(self, (None, None))
        if before is None or not torch.equal(before, keys):
            choice = choose(keys, keys_of(rows.indices, len(keys)))
            rows.block_memo[self] = keys.clone(), choice
        found: Choice = choice
        return found


def keys_of(indices: Tensor, columns: int) -> Tensor:
    """Hash each pair of sample and column to a key: ``(columns, samples)``."""
    column = torch.arange(columns, device=indices.device)
    return mixed(mixed(indices.long())[None, :] + column[:, None]) & EMPTY


def indices_of_contents(x: Tensor) -> Tensor:
    """Hash the values of each row of ``x`` (n, m, k): equal rows have equal numbers."""
    bits = x.flatten(1).contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    weights = mixed(torch.arange(1, bits.shape[1] + 1, device=x.device))
    return torch.stack([(row.long() * weights).sum() for row in bits])


def choose(keys: Tensor, candidates: Tensor) -> Choice:
    """Choose candidates whose keys are smaller than kept keys, and their places.

    Args:
        keys: ``(columns, places)``: the kept keys; :data:`EMPTY` for an empty place.
        candidates: ``(columns, samples)``: the keys of new samples.
    """
    places = keys.shape[1]
    everything = torch.cat([keys, candidates], dim=1)
    stays = torch.zeros_like(everything, dtype=torch.bool)
    stays.scatter_(1, everything.argsort(dim=1, stable=True)[:, :places], True)
    columns, leaving = (~stays[:, :places]).nonzero(as_tuple=True)
    _, entering = stays[:, places:].nonzero(as_tuple=True)
    return columns, leaving, entering, candidates[columns, entering]


def mixed(z: Tensor) -> Tensor:
    """Mix 64 bits with the finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection without pattern."""
    z = z + -0x61C8864680B583EB
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & (1 << 33) - 1)
