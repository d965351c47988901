"""Choose samples from a dataset or loader, and yield the part of this process in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from lightning_invariance.data.batches import Samples, input_of, label_of
from lightning_invariance.data.fingerprints import Fingerprint, fingerprint_of, keys_of
from lightning_invariance.data.rank_shares import share_of
from lightning_invariance.data.user_samplers import indices_of
from lightning_invariance.messages import given
from lightning_invariance.random_state import isolated_random_state


class Source:
    """Chooses samples from a dataset or loader, and yields the part of this process in batches.

    Args:
        data: this and the arguments up to ``run``: see :class:`~lightning_invariance.data.loader.STLoader`.
        together: number of samples loaded at a time.
        pinned: whether to load into pinned memory, from which a GPU copies while it computes.

    Attributes:
        n_samples: number of samples of all processes; None for a stream.
        run: see Args; 0 for a stream, whose samples are distributed one by one.
        with_keys: whether to compute keys of samples; may change between two passes.

    Raises:
        ValueError: If there are no samples, or an iterable dataset comes without ``max_samples``.
        TypeError: If ``data`` is neither a dataset, nor a loader, nor a tensor.
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
        self.input_fn, self.with_batch = input_fn, with_batch
        self.with_keys = self._is_split = False
        self._seed, self._rank, self._world_size = seed, rank, world_size
        # The global generator stays untouched.
        self._options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "pin_memory": pinned}
        self._first_item: Callable[[], Any] = lambda: next(iter(self._loader))
        self._loader, self.n_samples = self._loader_of(data, max_samples, run, together)
        is_stream = self.n_samples is None
        if is_stream and max_samples is None and not isinstance(self._loader.dataset, Sized):
            raise ValueError("Expected argument `max_samples` with an iterable dataset that has no length.")
        self.run, self._limit = (0, max_samples) if is_stream else (run, None)

    def _loader_of(
        self, data: Any, max_samples: int | None, run: int, together: int
    ) -> tuple[DataLoader[Any], int | None]:
        """Make a loader of the chosen samples; also return the number of samples of all processes, if known."""
        options = self._options
        indices: Sequence[Any] | None = None
        data = getattr(data, "_dataloader", data)  # what Fabric wraps
        if isinstance(data, DataLoader):
            options.update(num_workers=data.num_workers, collate_fn=data.collate_fn, timeout=data.timeout)
            options.update(worker_init_fn=data.worker_init_fn, multiprocessing_context=data.multiprocessing_context)
            if isinstance(data.dataset, IterableDataset):
                return data, None
            indices = indices_of(data, self._seed)
            if data.batch_sampler is None:  # items are not collated
                return DataLoader(data.dataset, batch_size=None, sampler=indices, **options), None
            data = data.dataset
        if isinstance(data, Tensor):
            data = TensorDataset(data)
        options["batch_size"] = together
        if isinstance(data, IterableDataset):
            return DataLoader(data, **options), None
        if not (hasattr(data, "__getitem__") and isinstance(data, Sized)):
            raise TypeError(
                f"Expected argument `data` to be a Dataset, a DataLoader or a tensor, but got {given(data)}."
            )
        indices = range(len(data)) if indices is None else indices
        if len(indices) == 0:
            raise ValueError("Expected argument `data` to hold samples, but it is empty.")
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(self._seed))[:max_samples].tolist()
        indexable: Any = data
        self._first_item = lambda: (options.get("collate_fn") or default_collate)([indexable[indices[order[0]]]])
        self._own = share_of(len(order), run, self._rank, self._world_size)
        own: Subset[Any] = Subset(indexable, [indices[order[i]] for i in self._own.tolist()])
        return DataLoader(own, **options), len(order)

    @property
    def n_own(self) -> int | None:
        """Number of samples of this process; None for a stream."""
        return None if self.n_samples is None else len(self._own)

    def fetch_together(self, together: int) -> None:
        """Load ``together`` samples at a time from the next pass on; not for a stream."""
        self._options["batch_size"] = together
        self._loader = DataLoader(self._loader.dataset, **self._options)

    def fingerprint(self) -> Fingerprint:
        """Summarise the data, to compare them with the data of other processes."""
        return fingerprint_of(self.n_samples, self._first_input, self._seed)

    def bytes_of_input(self) -> int | None:
        """Return the bytes of one input in float32; None for a stream, which can be read only once."""
        if self.n_samples is None:
            return None
        with isolated_random_state(self._seed):
            return 4 * self._first_input().numel()

    def _first_input(self) -> Tensor:
        return input_of(self._first_item(), self.input_fn)[0]

    def take_own_stream(self) -> None:
        """Use the whole stream of this process, since the other processes have other samples."""
        self._is_split = True
        if self._limit is not None:
            self._limit = len(range(self._rank, self._limit, self._world_size))

    def numbers(self, first: int, count: int) -> Tensor:
        """Return the numbers, among the samples of all processes, of ``count`` samples of this process."""
        own = torch.arange(first, first + count)
        return self._rank + self._world_size * own if self.n_samples is None else self._own[own]

    def batches(self) -> Iterator[Samples]:
        """Yield the samples in the batches in which they are loaded."""
        seen = 0
        for batch in self._fetched():
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

    def _fetched(self) -> Iterator[Any]:
        if self._loader.generator is not None and self.n_samples is not None:
            self._loader.generator.manual_seed(self._seed)  # equal random numbers of workers in every pass
        try:
            yield from self._loader
        except (RuntimeError, TypeError) as error:
            if "equal size" in str(error) or "resiz" in str(error):
                raise ValueError(
                    "Expected all inputs to have one size, but the dataset gives different ones: resize or crop them in"
                    f" the dataset, or pass a DataLoader whose `collate_fn` does. ({str(error).splitlines()[-1]})"
                ) from error
            if "default_collate" in str(error):
                raise ValueError(
                    "Expected the dataset to give tensors, numbers or arrays: convert images, for example with"
                    f" torchvision.transforms.v2.ToImage. ({str(error).splitlines()[-1]})"
                ) from error
            raise


def _check_data(data: Any) -> None:
    """Raise for several loaders, and for tensors of inputs and targets without a dataset around them."""
    if isinstance(data, tuple | list) and data and all(isinstance(each, DataLoader) for each in data):
        raise TypeError(f"Expected argument `data` to be one DataLoader, but got {len(data)} of them: give one.")
    tensors = isinstance(data, tuple | list) and len(data) > 1 and all(isinstance(each, Tensor) for each in data)
    if isinstance(data, Mapping) or (tensors and len({each.ndim for each in data}) > 1):
        raise TypeError(
            f"Expected argument `data` to be a dataset, a DataLoader or a tensor of inputs, but got a"
            f" {type(data).__name__}: give `torch.utils.data.TensorDataset(x, y)`."
        )
