"""Divide samples among ranks in runs, so that neighbours in the random order meet on one rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where samples stand; each ``(samples,)`` in int64.

    Attributes:
        runs: numbers of their runs.
        positions: within the run.
        sizes: of the run.
    """

    runs: Tensor
    positions: Tensor
    sizes: Tensor


def places_of(indices: Tensor, n: int, length: int) -> Places:
    """The runs of some samples: ⌈n / length⌉ runs of nearly the same size.

    Args:
        indices: ``(samples,)``: numbers of samples in ``[0, n)``.
        n: how many there are.
        length: of a run at most.
    """
    count = -(-n // length)
    runs = indices * count // n
    first, after = (-(-run * n // count) for run in (runs, runs + 1))
    return Places(runs, indices - first, after - first)


def groups_of(indices: Tensor, n: int, length: int, samples: int) -> tuple[Tensor, Tensor]:
    """Groups of nearly the same size within runs: the group of each sample, and how many samples it holds.

    Args:
        indices: ``(samples,)``: numbers of samples.
        n: how many there are.
        length: of a run at most.
        samples: in a group at most.
    """
    runs, positions, sizes = places_of(indices, n, length)
    counts = -(-sizes // samples)
    group = positions * counts // sizes
    first, after = (-(-each * sizes // counts) for each in (group, group + 1))
    return runs * length + group, after - first


def share_of(n: int, length: int, rank: int, world_size: int) -> Tensor:
    """The numbers of the samples, of 0 to n − 1, that a process takes: every ``world_size``-th run."""
    indices = torch.arange(n)
    return indices[places_of(indices, n, length).runs % world_size == rank]
