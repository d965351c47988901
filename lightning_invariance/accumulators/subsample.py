"""A random choice of samples for each column, the same in any order, batches, processes and order of merging."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, Context, Rows, States
from lightning_invariance.accumulators.distances import Distance
from lightning_invariance.accumulators.grouped_pairs import GroupedPairs

#: The key of an empty place.
EMPTY = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Subsample(Accumulator):
    """The values of some samples, for pairs of samples within columns.

    Each sample has a random key for each column, a hash of the sample's number and the column's; each column keeps the
    samples with the smallest keys. Columns keep different samples, which makes the mean over columns far more precise
    than keeping whole rows would. A sample without a number is named by its values and by how many came before: by its
    values alone samples with equal ones would be kept, or not, together.

    - ``keys`` ``(m, samples)`` in int64, on the CPU, and ``kept`` ``(m, samples, k)``: keys and values.
    - ``flawed`` ``(k,)``: whether an activation was NaN or infinite for any sample, kept or not.

    Attributes:
        samples: how many each column keeps.
        expected: how many samples there will be, numbered from 0; 0 where that is not known.
    """

    samples: int
    expected: int = 0

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
        """Replace the samples of larger keys."""
        x = rows.flat
        if not states["keys"].numel():
            m, k = x.shape[1:]
            states["keys"] = torch.full((m, self.samples), EMPTY)
            states["kept"] = torch.zeros(m, self.samples, k, dtype=x.dtype, device=x.device)
            states["flawed"] = torch.zeros(k, dtype=torch.bool, device=x.device)
        if not x.is_cpu or not x.sum().isfinite():  # reading the sum from another device would synchronise
            states["flawed"] = states["flawed"] | ~x.isfinite().flatten(0, 1).all(0)
        choice = self._choice(states["keys"], rows)
        if len(choice.columns):
            states["keys"][choice.columns, choice.places] = choice.keys
            columns, places, samples = (each.to(x.device, non_blocking=True) for each in choice[:3])
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

    def prepared(self, context: Context) -> Accumulator:
        """With the number of samples: those that would leave again later then never enter."""
        return replace(self, expected=context.n_samples or 0)

    def _choice(self, keys: Tensor, rows: Rows) -> Choice:
        """Which rows enter; computed once for all layers that have seen the same samples."""
        if rows.indices is None:
            arrived = torch.arange(rows.before, rows.before + len(rows.flat))
            return choose(keys, keys_of(indices_of_contents(rows.flat).cpu() ^ _mixed(arrived), len(keys)))
        before, choice = rows.block_memo.get(self, (None, None))
        if before is None or not torch.equal(before, keys):
            candidates = keys_of(rows.indices, len(keys))
            if self.expected:
                last = last_key(self.expected, len(keys), self.samples)
                candidates = torch.where(candidates <= last, candidates, EMPTY)
            choice = choose(keys, candidates)
            rows.block_memo[self] = keys.clone(), choice
        found: Choice = choice
        return found


@dataclass(frozen=True)
class ColumnPairs(Subsample):
    """What distances within columns are made of: all samples where they come in runs, a choice where they do not.

    Attributes:
        samples: how many a group holds, or each column keeps.
        expected: how many samples there will be; 0 where that is not known.
        distance: see :func:`~lightning_invariance.accumulators.distances.distance_between`.
        over: ``"activation"`` or ``"channel"``.
    """

    distance: Distance = "abs"
    over: str = "activation"

    any_channel_axis = True

    @property
    def least_run(self) -> int:
        """A group."""
        return self.samples

    def prepared(self, context: Context) -> Accumulator:
        """Pairs in groups where samples come in runs."""
        if context.run < self.samples or context.n_samples is None:
            return super().prepared(context)
        return GroupedPairs(self.distance, self.over, self.samples, context.run, context.n_samples)


class Choice(NamedTuple):
    """Which samples enter, and whose places they take; each ``(changes,)``.

    Attributes:
        columns: of the ST matrix.
        places: among those that the column keeps.
        samples: positions in the block.
        keys: their keys.
    """

    columns: Tensor
    places: Tensor
    samples: Tensor
    keys: Tensor


def keys_of(indices: Tensor, columns: int) -> Tensor:
    """A random number, the same at every call, for each sample and column: ``(columns, samples)``."""
    column = torch.arange(columns, device=indices.device)
    return _mixed(_mixed(indices.long())[None, :] + column[:, None]) & EMPTY


@lru_cache(maxsize=16)
def last_key(n: int, columns: int, places: int) -> Tensor:
    """The largest key that each column keeps in the end, of the samples 0 to n − 1: ``(columns, 1)``."""
    return keys_of(torch.arange(n), columns).kthvalue(min(n, places), dim=1, keepdim=True).values


def indices_of_contents(x: Tensor) -> Tensor:
    """Numbers that tell the rows of ``x`` (n, m, k) apart by what they hold; equal rows have equal numbers."""
    bits = x.flatten(1).contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    weights = _mixed(torch.arange(1, bits.shape[1] + 1, device=x.device))
    return torch.stack([(row.long() * weights).sum() for row in bits])


def choose(keys: Tensor, candidates: Tensor) -> Choice:
    """Which candidates have smaller keys than what is kept, and whose places they take.

    Args:
        keys: ``(columns, places)`` of what is kept; :data:`EMPTY` for an empty place.
        candidates: ``(columns, samples)`` keys of new samples.
    """
    places = keys.shape[1]
    everything = torch.cat([keys, candidates], dim=1)
    stays = torch.zeros_like(everything, dtype=torch.bool)
    stays.scatter_(1, everything.argsort(dim=1, stable=True)[:, :places], True)
    columns, leaving = (~stays[:, :places]).nonzero(as_tuple=True)
    _, entering = stays[:, places:].nonzero(as_tuple=True)
    return Choice(columns, leaving, entering, candidates[columns, entering])


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64 bits without visible pattern."""
    z = z + -0x61C8864680B583EB
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & (1 << 33) - 1)
