"""Choose samples from a dataset or loader, and yield the part of this process in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from lightning_invariance.data.batches import Samples, input_of, label_of, target_of
from lightning_invariance.data.fingerprints import Fingerprint, fingerprint_of, keys_of
from lightning_invariance.data.rank_shares import share_of
from lightning_invariance.data.user_samplers import OPTIONS, as_it_is, indices_of
from lightning_invariance.messages import given
from lightning_invariance.model.snapshot import Snapshot
from lightning_invariance.random_state import isolated_random_state


class Source:
    """Chooses samples from a dataset or loader, and yields the part of this process in batches.

    Samples of a map-style dataset, alone or in a plain ``DataLoader``, are chosen at random. Everything else is
    iterated as it is, up to its length or ``max_samples``: its batches are batches, of any size.

    Args:
        data: this and the arguments up to ``run``: see :class:`~lightning_invariance.data.loader.STLoader`.
        together: number of samples loaded at a time.
        pinned: whether to load into pinned memory, from which a GPU copies while it computes.

    Attributes:
        n_samples: number of samples of all processes; None for data that are iterated as they are.
        n_skipped: number of samples that were missing in the last iteration; a batch that is None counts as one.
        run: see Args; 0 for data that are iterated, whose samples are distributed one by one.
        with_keys: whether to compute keys of samples; may change between two passes.
        generators: random generators of the data's own.

    Raises:
        ValueError: If there are no samples, or data that are iterated have neither a length nor ``max_samples``.
        TypeError: If ``data`` holds no samples, or can be iterated only once.
    """

    def __init__(
        self,
        data: Any,
        max_samples: int | None,
        input_fn: Callable[..., Tensor] | None,
        seed: int,
        rank: int,
        world_size: int,
        with_batch: bool,
        run: int,
        together: int,
        pinned: bool,
    ) -> None:
        _check_data(data)
        data = getattr(data, "_dataloader", data)  # what Fabric wraps
        self.generators = Snapshot(data, copies=False).generators
        self.input_fn, self.with_batch = input_fn, with_batch
        self.with_keys = self._is_split = False
        self.n_samples: int | None = None
        self.n_skipped, self.run, self._limit = 0, 0, max_samples
        self._seed, self._rank, self._world_size = seed, rank, world_size
        # The global generator stays untouched.
        self._options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "pin_memory": pinned}
        self._options |= {"batch_size": together, "collate_fn": Collate(default_collate)}
        indices: Sequence[Any] | None = None
        if isinstance(data, DataLoader):
            indices = indices_of(data, seed)
            self._options |= {name: getattr(data, name) for name in OPTIONS}
            self._options["collate_fn"] = Collate(data.collate_fn)
            data = as_it_is(data) if indices is None else data.dataset
        elif not isinstance(data, IterableDataset) and _is_indexable(data) and not _are_batches(data):
            data = TensorDataset(data) if isinstance(data, Tensor) else data
            indices = range(len(data))
        self._first: Callable[[], Iterable[Any]] = self._iterated
        if indices is None:
            self._iterable = data
            self._length = _length_of(data)
            if max_samples is None and self._length is None:
                raise ValueError("Expected argument `max_samples` with an iterable dataset that has no length.")
            return
        if len(indices) == 0:
            raise ValueError("Expected argument `data` to hold samples, but it is empty.")
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))[:max_samples].tolist()
        first, collate = indices[order[0]], self._options["collate_fn"]
        self._iterable, self._first = None, lambda: [collate([data[first]])]
        self.n_samples, self.run, self._limit = len(order), run, None
        self._own = share_of(len(order), run, rank, world_size)
        self._loader = DataLoader(Subset(data, [indices[order[i]] for i in self._own.tolist()]), **self._options)

    @property
    def n_own(self) -> int | None:
        """Number of samples of this process; None for data that are iterated as they are."""
        return None if self.n_samples is None else len(self._own)

    @property
    def own_skipped(self) -> int:
        """The missing samples that no other process counts."""
        return self.n_skipped if self.n_samples is not None or self._is_split or self._rank == 0 else 0

    def fetch_together(self, together: int) -> None:
        """Load ``together`` samples at a time from the next pass on; not for data that are iterated as they are."""
        self._options["batch_size"] = together
        self._loader = DataLoader(self._loader.dataset, **self._options)

    def fingerprint(self) -> Fingerprint:
        """Summarise the data, to compare them with the data of other processes."""
        return fingerprint_of(self.n_samples, self._first_input, self._seed, self.generators)

    def bytes_of_input(self) -> int | None:
        """Return the bytes of one input in float32; None for data that are iterated, perhaps with much effort."""
        if self.n_samples is None:
            return None
        with isolated_random_state(self._seed, self.generators):
            found = self._first_input()
        return None if found is None else 4 * found.numel()

    def _first_input(self) -> Tensor | None:
        """The first input that is not missing; None where there is none."""
        first = next((batch for batch in _flat(self._first()) if batch is not None), None)
        return None if first is None else input_of(first, self.input_fn)[0]

    def take_own_stream(self) -> None:
        """Use all that this process iterates over, since the other processes have other samples."""
        self._is_split = True
        if self._limit is not None:
            self._limit = len(range(self._rank, self._limit, self._world_size))

    def numbers(self, first: int, count: int) -> Tensor:
        """Return the numbers, among the samples of all processes, of ``count`` samples of this process."""
        own = torch.arange(first, first + count)
        return self._rank + self._world_size * own if self.n_samples is None else self._own[own]

    def batches(self) -> Iterator[Samples]:
        """Yield the samples in the batches in which they are loaded."""
        seen, self.n_skipped = 0, 0
        for batch in _flat(self._fetched()):
            if batch is None:
                self.n_skipped += 1
                continue
            inputs = input_of(batch, self.input_fn)
            samples = Samples(inputs, label_of(batch, len(inputs)), batch if self.with_batch else None)
            if self._limit is not None and len(samples) > self._limit - seen:
                samples = samples[: self._limit - seen]
            seen += len(samples)
            if self.n_samples is None and self._world_size > 1 and not self._is_split:
                first = (self._rank - seen + len(samples)) % self._world_size
                samples = samples[first :: self._world_size]
            if self.with_keys:  # on the CPU: reading values from a GPU would wait for it
                samples = replace(samples, keys=keys_of(samples.inputs))
            if len(samples):
                yield samples
            if self._limit is not None and seen >= self._limit:
                return
        if self.n_own is not None:
            self.n_skipped = self.n_own - seen

    def _fetched(self) -> Iterator[Any]:
        if self._iterable is None and self._loader.generator is not None:
            self._loader.generator.manual_seed(self._seed)  # equal random numbers of workers in every pass
        try:
            yield from self._loader if self._iterable is None else self._iterated()
        except (RuntimeError, TypeError) as error:
            if "default_collate" in str(error):
                raise ValueError(
                    "Expected the dataset to give tensors, numbers or arrays: convert images, for example with"
                    f" torchvision.transforms.v2.ToImage. ({str(error).splitlines()[-1]})"
                ) from error
            raise

    def _iterated(self) -> Iterator[Any]:
        """The batches of data that are iterated as they are; samples of an iterable dataset are collated first."""
        # Most samplers draw their order at the beginning. The later batches draw other numbers than the first one.
        with isolated_random_state(self._seed + 1, self.generators):
            rest = islice(self._iterable, self._length)
            first = list(islice(rest, 1))
        items = chain(first, rest)
        if not isinstance(self._iterable, IterableDataset) or all(map(_is_batch, first)):
            yield from items
            return
        while some := list(islice(items, self._options["batch_size"])):
            yield self._options["collate_fn"](some)


class Batches:
    """The batches of a loader that is no ``DataLoader``, even if it says that it is a dataset.

    Args:
        loader: can be iterated more than once.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


class Collate:
    """Collates samples: without those that are None, if the function is PyTorch's own; one by one, if sizes differ."""

    def __init__(self, function: Callable[[list[Any]], Any]) -> None:
        self.function = function

    def __call__(self, items: list[Any]) -> Any:
        """Return a batch, or :class:`Several`."""
        if self.function is default_collate and not (items := [item for item in items if item is not None]):
            return None
        try:
            return self.function(items)
        except RuntimeError as error:
            if "equal size" in str(error) or "resiz" in str(error):
                return Several([self.function([item]) for item in items])
            raise


class Several(list[Any]):
    """Batches where one was expected."""


def _flat(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from batch if isinstance(batch, Several) else (batch,)


def _is_batch(item: Any) -> bool:
    """Return whether an item has a class for each of its inputs, or is a list of as many inputs as targets."""
    try:
        inputs = input_of(item, None)
    except ValueError:
        return False
    if inputs.ndim == 3 and len(inputs) in (1, 3, 4):  # an image whose targets are as many as its channels
        return False
    target = target_of(item, len(inputs))
    return target is not None and (type(item) is list or (target.ndim == 1 and not target.is_floating_point()))


def _are_batches(data: Any) -> bool:
    """Return whether a list holds batches instead of samples."""
    return isinstance(data, list | tuple) and len(data) > 0 and _is_batch(next(filter(_is_there, data), None))


def _is_indexable(data: Any) -> bool:
    return hasattr(data, "__getitem__") and isinstance(data, Sized)


def _is_there(item: Any) -> bool:
    return item is not None


def _length_of(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _check_data(data: Any) -> None:
    """Raise for what holds no samples, several loaders, and inputs and targets without a dataset around them."""
    if isinstance(data, tuple | list) and data and all(isinstance(each, DataLoader) for each in data):
        raise TypeError(f"Expected argument `data` to be one DataLoader, but got {len(data)} of them: give one.")
    tensors = isinstance(data, tuple | list) and len(data) > 1 and all(isinstance(each, Tensor) for each in data)
    if isinstance(data, Mapping) or (tensors and len({each.ndim for each in data}) > 1):
        raise TypeError(
            f"Expected argument `data` to be a dataset, a DataLoader or a tensor of inputs, but got a"
            f" {type(data).__name__}: give `torch.utils.data.TensorDataset(x, y)`."
        )
    if isinstance(data, Iterator):
        raise TypeError(
            f"Expected argument `data` to be a Dataset, a DataLoader or a tensor, but got {given(data)}, which can be"
            " iterated only once: give a list, or an object with `__iter__`."
        )
    if not hasattr(data, "__iter__") and not _is_indexable(data):
        raise TypeError(f"Expected argument `data` to be a Dataset, a DataLoader or a tensor, but got {given(data)}.")
