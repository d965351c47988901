"""Samples × transformations: the inputs behind the ST matrix, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from lightning_invariance.agreement import Fingerprint, fingerprint_of, keys_of, warn_of_randomness
from lightning_invariance.arguments import check_data
from lightning_invariance.batches import Samples, input_of, label_of
from lightning_invariance.evaluation.isolation import isolated_random_state
from lightning_invariance.hints import given
from lightning_invariance.runs import share_of
from lightning_invariance.samplers import indices_of
from lightning_invariance.transforms import TransformationSet

#: Samples that are fetched together, if that makes whole blocks: while a GPU computes the next ones are fetched.
FETCHED = 64

NEEDS_MAX_SAMPLES = "Expected argument `max_samples` with an iterable dataset that has no length."


class STBlock(NamedTuple):
    """Inputs of some rows and columns of the ST matrix.

    Attributes:
        inputs: ``(rows, columns, *input_shape)``: the transformed samples.
        labels: ``(rows,)``, where they were loaded, or None where the samples carry no label.
        columns: which transformations these are. Blocks of one row longer than a batch come one after the other;
            the row is complete when ``columns.stop`` is the number of transformations.
        indices: ``(rows,)``, on the CPU: which of the chosen samples these are, counted over all processes.
        batch: all entries of the batch for these rows, where they were asked for.
        keys: ``(rows,)``, on the CPU: 64 bits that tell the samples apart by what they hold before any transformation,
            where they were asked for.
    """

    inputs: Tensor
    labels: Tensor | None
    columns: slice
    indices: Tensor
    batch: Any = None
    keys: Tensor | None = None


class STLoader:
    """Loads samples, transforms them on the target device, and gives them out as blocks of the ST matrix.

    A block holds complete rows, as many as fit into a batch: ``batch_size // m`` samples under all m transformations. A
    row longer than a batch comes in parts of at most ``batch_size`` columns. Which samples are taken, and which of them
    share a block, does not depend on how the data are loaded.

    Args:
        data: a map-style or iterable ``Dataset``, a ``DataLoader``, or a tensor of inputs. Samples are a tensor ``x``,
            a pair ``(x, y)``, or a dict with the input under ``image``, ``x``, ``input``, ``pixel_values`` or the like
            (or as its only tensor). Of a loader of a map-style dataset the samples of its sampler or batch sampler are
            taken, with its ``collate_fn`` and workers, but in other batches; Lightning's distribution of a sampler is
            taken off.
        transformations: the columns.
        batch_size: largest number of transformed inputs in a block.
        max_samples: how many samples to take: a random choice without regard to classes, the same at every call and
            for every batch size. None takes all. An iterable dataset gives its first samples instead.
        input_fn: picks x from a collated batch, where the above does not find it.
        device: where to transform; by default where the samples are.
        seed: of the choice of samples.
        rank: this process takes its share of the samples, one of ``world_size``.
        world_size: number of processes.
        transform: if false, a block holds each sample as it is, as often as there are transformations.
        with_batch: whether blocks carry all entries of the batch.
        run: how many samples a process takes at most, one after the other in the random order, before another has its
            turn. Those of iterable datasets, whose order is their own, are always dealt one by one.

    Attributes:
        with_keys: whether blocks carry the keys of their samples; may be changed between two passes.

    Raises:
        ValueError: If ``batch_size`` or ``max_samples`` is too small, there are no samples, an iterable dataset comes
            without ``max_samples``, or (when iterating) samples hold no input or inputs of different sizes.

    Example:
        >>> import torch
        >>> from lightning_invariance import STLoader, rotations
        >>> [block.inputs.shape for block in STLoader(torch.rand(5, 1, 8, 8), rotations(4), batch_size=10)]
        [torch.Size([2, 4, 1, 8, 8]), torch.Size([2, 4, 1, 8, 8]), torch.Size([1, 4, 1, 8, 8])]
    """

    def __init__(
        self,
        data: Dataset[Any] | DataLoader[Any] | Tensor | Sequence[Any],
        transformations: TransformationSet,
        batch_size: int = 128,
        *,
        max_samples: int | None = None,
        input_fn: Callable[..., Tensor] | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        transform: bool = True,
        with_batch: bool = False,
        run: int = 1,
    ) -> None:
        if not isinstance(transformations, TransformationSet):
            raise TypeError(
                f"Expected argument `transformations` to be a TransformationSet, but got {given(transformations)};"
                " make one of functions with `TransformationSet.from_callables`."
            )
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Expected argument `batch_size` to be an int larger than 0, but got {batch_size}.")
        if max_samples is not None and (not isinstance(max_samples, int) or max_samples < 1):
            raise ValueError(f"Expected argument `max_samples` to be an int larger than 0, but got {max_samples}.")
        check_data(data)
        self.transformations = transformations
        self.batch_size = batch_size
        self.input_fn = input_fn
        self.transform = transform
        self.with_batch = with_batch
        self.with_keys = False
        self.device = torch.device(device) if device is not None else None
        self.rows = max(1, batch_size // len(transformations))
        self.is_split = self._checked = False
        self._rank, self._world_size = rank, world_size
        self._loader, self.n_samples = self._batches_of(data, max_samples, seed, run)
        self.run = 0 if self.n_samples is None else run

    def _batches_of(
        self, data: Any, max_samples: int | None, seed: int, run: int
    ) -> tuple[DataLoader[Any], int | None]:
        """A loader of the chosen samples, and how many all processes take together (None: not known yet)."""
        options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}  # the global one stays untouched
        options["pin_memory"] = self.device is not None and self.device.type == "cuda"  # to copy while the GPU computes
        self._limit: int | None = None
        self._seed = seed
        self._first_item: Callable[[], Any] = lambda: next(iter(self._loader))
        indices: Sequence[Any] | None = None
        data = getattr(data, "_dataloader", data)  # what Fabric wraps
        if isinstance(data, DataLoader):
            options.update(num_workers=data.num_workers, collate_fn=data.collate_fn, timeout=data.timeout)
            options.update(worker_init_fn=data.worker_init_fn, multiprocessing_context=data.multiprocessing_context)
            if isinstance(data.dataset, IterableDataset):
                return self._limited(data, data.dataset, max_samples), None
            indices = indices_of(data, seed)
            if data.batch_sampler is None:  # items are not collated
                found = DataLoader(data.dataset, batch_size=None, sampler=indices, **options)
                return self._limited(found, data.dataset, max_samples), None
            data = data.dataset
        if isinstance(data, Tensor):
            data = TensorDataset(data)
        options["batch_size"] = self._fetched_together()
        if isinstance(data, IterableDataset):
            return self._limited(DataLoader(data, **options), data, max_samples), None
        if not (hasattr(data, "__getitem__") and isinstance(data, Sized)):
            raise TypeError(
                f"Expected argument `data` to be a Dataset, a DataLoader or a tensor, but got {given(data)}."
            )
        indices = range(len(data)) if indices is None else indices
        if len(indices) == 0:
            raise ValueError("Expected argument `data` to hold samples, but it is empty.")
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))[:max_samples].tolist()
        indexable: Any = data
        self._first_item = lambda: (options.get("collate_fn") or default_collate)([indexable[indices[order[0]]]])
        self._own = share_of(len(order), run, self._rank, self._world_size)
        share: Subset[Any] = Subset(indexable, [indices[order[i]] for i in self._own.tolist()])
        self._options = options
        return DataLoader(share, **options), len(order)

    def _fetched_together(self) -> int:
        return self.rows * max(1, FETCHED // self.rows)

    def resize(self, batch_size: int) -> None:
        """Make larger or smaller blocks from now on, of the same samples, which must not be those of a stream.

        Within a walk only if a batch holds whole rows before and after.
        """
        self.batch_size, self.rows = batch_size, max(1, batch_size // len(self.transformations))
        self._options["batch_size"] = self._fetched_together()
        self._loader = DataLoader(self._loader.dataset, **self._options)

    def _limited(self, loader: DataLoader[Any], data: Any, max_samples: int | None) -> DataLoader[Any]:
        """A loader whose first samples are taken."""
        if max_samples is None and not isinstance(data, Sized):
            raise ValueError(NEEDS_MAX_SAMPLES)
        self._limit = max_samples
        return loader

    def fingerprint(self) -> Fingerprint:
        """What processes with the same data agree on."""
        return fingerprint_of(self.n_samples, lambda: input_of(self._first_item(), self.input_fn)[0], self._seed)

    def bytes_of_input(self) -> int | None:
        """Bytes of one input in float32; None for a stream, of which each sample comes once."""
        if self.n_samples is None:
            return None
        with isolated_random_state(self._seed):
            return 4 * input_of(self._first_item(), self.input_fn)[0].numel()

    def take_own_stream(self) -> None:
        """Take all samples of this process, whose stream holds others than those of the other processes."""
        self.is_split = True
        if self._limit is not None:
            self._limit = len(range(self._rank, self._limit, self._world_size))

    def __len__(self) -> int:
        """Number of blocks; a TypeError where the data have no length."""
        if self.n_samples is None:
            raise TypeError("The data have no length.")
        return -(-len(self._loader.dataset) // self.rows) * len(self._parts())  # type: ignore[arg-type]

    @property
    def n_own(self) -> int | None:
        """How many samples this process takes; None where the data have no length."""
        return None if self.n_samples is None else len(self._own)

    def _parts(self) -> list[slice]:
        m = len(self.transformations)
        return [slice(start, min(start + self.batch_size, m)) for start in range(0, m, self.batch_size)]

    def __iter__(self) -> Iterator[STBlock]:
        parts = [(columns, self.transformations[columns]) for columns in self._parts()]
        if len(parts) == 1:
            parts = [(parts[0][0], self.transformations)]
        first = 0
        for samples in self._rows():
            if not self._checked and self.transform:
                self._checked = True
                warn_of_randomness(self.transformations, samples.inputs[:1], self._seed)
            indices = self._indices(torch.arange(first, first + len(samples)))
            first += len(samples)
            for columns, transformations in parts:
                if self.transform:
                    inputs = transformations(samples.inputs)
                else:
                    inputs = torch.stack([samples.inputs] * len(transformations), dim=1)
                yield STBlock(inputs, samples.labels, columns, indices, samples.batch, samples.keys)

    def _indices(self, taken: Tensor) -> Tensor:
        """Which of the samples of all processes those are that this process takes as its first, second, and so on."""
        if self.n_samples is not None:
            return self._own[taken]
        return self._rank + self._world_size * taken

    def _rows(self) -> Iterator[Samples]:
        """The samples, :attr:`rows` at a time however they were batched, on the device."""
        waiting: Samples | None = None
        for samples in self._batches():
            if waiting is not None:
                samples = waiting.joined(samples)
            start = 0
            while (end := start + self.rows) <= len(samples):  # which :meth:`resize` may change between two blocks
                yield samples.taken(slice(start, end))
                start = end
            waiting = samples.taken(slice(start, None)) if start < len(samples) else None
        if waiting is not None:
            yield waiting

    def _batches(self) -> Iterator[Samples]:
        seen = 0
        for batch in self._fetched():
            inputs = input_of(batch, self.input_fn)
            samples = Samples(inputs, label_of(batch, len(inputs)), batch if self.with_batch else None)
            if self._limit is not None and len(samples) > self._limit - seen:
                samples = samples.taken(slice(self._limit - seen))
            seen += len(samples)
            if self.n_samples is None and self._world_size > 1 and not self.is_split:
                first = (self._rank - seen + len(samples)) % self._world_size
                samples = samples.taken(slice(first, None, self._world_size))
            if self.with_keys:  # before a GPU has them, whose values could not be read without waiting
                samples = replace(samples, keys=keys_of(samples.inputs))
            if self.device is not None:
                samples = samples.to(self.device)
            if len(samples):
                yield samples
            if self._limit is not None and seen >= self._limit:
                return

    def _fetched(self) -> Iterator[Any]:
        if self._loader.generator is not None and self.n_samples is not None:
            self._loader.generator.manual_seed(self._seed)  # workers draw the same random numbers in every pass
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
