"""A random choice of samples that is the same whatever the order in which they come, and from how many processes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

#: The key of an empty place.
EMPTY = torch.iinfo(torch.int64).max


def keys_of(indices: Tensor, columns: int) -> Tensor:
    """A random number, the same at every call, for each sample and column: ``(columns, samples)``."""
    column = torch.arange(columns, device=indices.device)
    return _mixed(_mixed(indices.long())[None, :] + column[:, None]) & EMPTY


@lru_cache(maxsize=16)
def last_key(n: int, columns: int, places: int) -> Tensor:
    """The largest key that each column keeps in the end, of the samples 0 to n − 1: ``(columns, 1)``."""
    return keys_of(torch.arange(n), columns).kthvalue(min(n, places), dim=1, keepdim=True).values


def indices_of_contents(x: Tensor) -> Tensor:
    """Numbers that tell the rows of ``x`` (n, m, k) apart by what they hold: equal for equal rows only, by chance."""
    bits = x.flatten(1).contiguous().view(torch.int64 if x.dtype == torch.float64 else torch.int32)
    weights = _mixed(torch.arange(1, bits.shape[1] + 1, device=x.device))
    return torch.stack([(row.long() * weights).sum() for row in bits])


def choose(keys: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which candidates have smaller keys than what is kept, and whose places they take.

    Args:
        keys: ``(columns, places)`` of what is kept; :data:`EMPTY` for an empty place.
        candidates: ``(columns, samples)`` keys of new samples.

    Returns:
        Columns, places, new samples and their keys, each ``(changes,)``.
    """
    places = keys.shape[1]
    everything = torch.cat([keys, candidates], dim=1)
    stays = torch.zeros_like(everything, dtype=torch.bool)
    stays.scatter_(1, everything.argsort(dim=1, stable=True)[:, :places], True)
    columns, leaving = (~stays[:, :places]).nonzero(as_tuple=True)
    _, entering = stays[:, places:].nonzero(as_tuple=True)
    return columns, leaving, entering, candidates[columns, entering]


def _mixed(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64 bits without visible pattern."""
    z = z + -0x61C8864680B583EB
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & (1 << 33) - 1)
