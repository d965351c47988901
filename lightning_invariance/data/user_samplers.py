"""Find the samples of a dataset that the sampler of a DataLoader selects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_invariance.random_state import isolated_random_state


def indices_of(loader: DataLoader[Any], seed: int) -> list[Any] | None:
    """Return the indices of the samples of a loader over all processes, in its order; None for the whole dataset.

    A custom batch sampler is iterated. The distributed sampler that Lightning wraps around a sampler is unwrapped.
    Random samplers draw equal samples at every call, and their generators keep their states.

    Raises:
        ValueError: If a sampler has no length.
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
    """Unwrap a sampler from distributed ones; None if these select from the whole dataset."""
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
    """Seed the generators of a sampler and of samplers within it, and restore their states afterwards."""
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
