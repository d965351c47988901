"""Find the samples of a dataset that the sampler of a DataLoader selects, or that it must be iterated as it is."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_invariance.model.snapshot import Snapshot
from lightning_invariance.random_state import isolated_random_state

#: Options of a loader that do not say which samples it gives.
OPTIONS = ("num_workers", "timeout", "worker_init_fn", "multiprocessing_context")


def indices_of(loader: DataLoader[Any], seed: int) -> Sequence[Any] | None:
    """Return the indices of the samples of a loader over all processes, in its order.

    None if the loader must be iterated as it is: it overrides ``__iter__``, its dataset is iterable, it makes its own
    batches, or its sampler has no length. The distributed sampler that Lightning wraps around a sampler is unwrapped.
    Random samplers draw equal samples at every call, and their generators keep their states.
    """
    dataset: Any = loader.dataset
    is_plain = type(loader).__iter__ is DataLoader.__iter__ and type(loader.batch_sampler) is BatchSampler
    if not is_plain or isinstance(dataset, IterableDataset):
        return None
    sampler: Any = _undistributed(getattr(loader.batch_sampler, "sampler", None))
    if sampler is None or type(sampler) is SequentialSampler:
        return range(len(dataset))
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return range(len(dataset))
    if not hasattr(sampler, "__len__"):
        return None
    with isolated_random_state(seed, Snapshot(sampler, copies=False).generators):
        return list(islice(sampler, len(sampler)))


def as_it_is(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader with the batches of a loader, whose workers are its own.

    It gives the batches of all processes where Lightning has wrapped a distributed sampler around a sampler.
    """
    dataset: Any = loader.dataset
    batches = loader.batch_sampler
    holder: Any = loader if batches is None else batches
    inner = getattr(holder, "sampler", None)
    if type(loader).__iter__ is DataLoader.__iter__ and isinstance(inner, DistributedSampler):
        options: dict[str, Any] = {name: getattr(loader, name) for name in ("collate_fn", *OPTIONS)}
        whole = _undistributed(inner) or SequentialSampler(dataset)
        if batches is None:
            return DataLoader(dataset, batch_size=None, sampler=whole, **options)
        anew: Any = copy(batches)
        anew.sampler = whole
        return DataLoader(dataset, batch_sampler=anew, **options)
    found = copy(loader)
    found._iterator = None
    return found


def _undistributed(sampler: Any) -> Any:
    """Unwrap a sampler from distributed ones; None if these select from the whole dataset."""
    while isinstance(sampler, DistributedSampler):
        sampler = getattr(sampler.dataset, "_sampler", None)
    return sampler
