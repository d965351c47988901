"""Which samples of its dataset a DataLoader gives: those of its sampler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_invariance.random_state import isolated_random_state


def indices_of(loader: DataLoader[Any], seed: int) -> list[Any] | None:
    """The indices of the samples that a loader gives over all processes, in its order; None for all samples.

    A batch sampler of the user's is asked for its batches. What Lightning put around a sampler to distribute it is
    taken off. Random samplers draw the same samples at every call; their generators are what they were before.

    Raises:
        ValueError: If a sampler does not end.
    """
    batches = loader.batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        if isinstance(inner := getattr(batches, "sampler", None), DistributedSampler):
            dataset: Any = loader.dataset
            whole: Any = copy(batches)
            batches, whole.sampler = whole, _undistributed(inner) or SequentialSampler(dataset)
        return [index for batch in _all_of(batches, seed) for index in batch]
    sampler = _undistributed(getattr(batches, "sampler", None) if batches is not None else loader.sampler)
    if sampler is None or type(sampler) is SequentialSampler:
        return None
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return None
    return _all_of(sampler, seed)


def _undistributed(sampler: Any) -> Any:
    """The sampler that is divided over processes; None where that is the whole dataset in order."""
    while isinstance(sampler, DistributedSampler):
        sampler = getattr(sampler.dataset, "_sampler", None)
    return sampler


def _all_of(sampler: Iterable[Any], seed: int) -> list[Any]:
    if not isinstance(sampler, Sized):
        raise ValueError(
            f"Expected argument `data` to have a sampler with a length, but got {type(sampler).__name__}: pass a"
            " dataset of the samples to measure instead."
        )
    with isolated_random_state(seed), _seeded_generators(sampler, seed):
        return list(sampler)


@contextmanager
def _seeded_generators(sampler: Any, seed: int) -> Iterator[None]:
    """Seed the generator of a sampler, and of samplers within it, and put back their states afterwards."""
    found, samplers = [], [sampler]
    while samplers:
        each = samplers.pop()
        samplers += [inner for name in ("sampler", "base_sampler") if (inner := getattr(each, name, None)) is not None]
        found += [each.generator] if isinstance(getattr(each, "generator", None), torch.Generator) else []
    states = [generator.get_state() for generator in found]
    try:
        for generator in found:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)
