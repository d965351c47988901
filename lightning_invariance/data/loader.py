"""Load samples and transform them: the inputs of the ST matrix, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_invariance.data.batches import Samples, on_device
from lightning_invariance.data.fingerprints import warn_of_equal, warn_of_randomness
from lightning_invariance.data.samples import Source
from lightning_invariance.messages import check_int, given
from lightning_invariance.transforms import TransformationSet

#: Samples that are loaded at a time, rounded down to whole blocks; the next ones load while a GPU computes.
SAMPLES_PER_FETCH = 64


class STBlock(NamedTuple):
    """Inputs of some rows and columns of the ST matrix.

    Attributes:
        inputs: ``(rows, columns, *input_shape)``: the transformed samples.
        labels: ``(rows,)``, on the device where they were loaded; None where the samples have no label.
        columns: the transformations of this block. A row longer than a batch comes in consecutive blocks; it is
            complete when ``columns.stop`` is the number of transformations.
        indices: ``(rows,)``, on the CPU: numbers of the samples among the selected samples of all processes.
        batch: all entries of the batch for these rows, if requested.
        keys: ``(rows,)``, on the CPU: 64-bit hashes of the content of the samples before any transformation, if
            requested.
    """

    inputs: Tensor
    labels: Tensor | None
    columns: slice
    indices: Tensor
    batch: Any = None
    keys: Tensor | None = None

    def to(self, device: torch.device) -> STBlock:
        """Return the block with its inputs, labels and batch on a device."""
        labels = None if self.labels is None else self.labels.to(device)
        return self._replace(inputs=self.inputs.to(device), labels=labels, batch=on_device(self.batch, device))


class STLoader:
    """Loads samples, transforms them on the target device, and iterates over blocks of the ST matrix.

    A block holds complete rows, as many as fit into a batch: ``batch_size // m`` samples under all m transformations. A
    row longer than a batch comes in parts of at most ``batch_size`` columns. Which samples are selected, and which of
    them are in one block, does not depend on how the data are loaded.

    Args:
        data: a map-style or iterable ``Dataset``, a ``DataLoader``, or a tensor of inputs. Samples are a tensor ``x``,
            a pair ``(x, y)``, or a dict with the input under ``image``, ``x``, ``input``, ``pixel_values`` or the like
            (or as its only tensor). A plain loader of a map-style dataset is used for its sampler, ``collate_fn`` and
            workers, but not for its batches; distributed samplers of Lightning are unwrapped. Other loaders, and
            anything else that can be iterated more than once, give batches that are taken as they are.
        transformations: the columns.
        batch_size: largest number of transformed inputs in a block.
        max_samples: how many samples to use: a random choice without regard to classes, equal at every call and for
            every batch size. None uses all. Of data that are iterated as they are, the first samples are used.
        input_fn: picks x from a collated batch, where the above does not find it.
        device: where to transform; by default where the samples are.
        seed: of the choice of samples.
        rank: of this process, which loads its part of the samples.
        world_size: number of processes.
        transform: if false, a block holds copies of each untransformed sample, one for each transformation.
        with_batch: whether blocks have all entries of the batch.
        run: largest number of consecutive samples, in the random order, that go to one process. Samples of iterable
            datasets are distributed one by one.

    Attributes:
        source: where the samples come from.
        n_samples: number of samples of all processes; None for a stream.

    Raises:
        ValueError: If ``batch_size`` or ``max_samples`` is too small, there are no samples, data that are iterated have
            no length and come without ``max_samples``, or (when iterating) samples hold no input.
        TypeError: If ``data`` holds no samples, or can be iterated only once.

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
        check_int("batch_size", batch_size)
        if max_samples is not None:
            check_int("max_samples", max_samples)
        self.transformations = transformations
        self.batch_size = batch_size
        self.transform = transform
        self.device = torch.device(device) if device is not None else None
        self.rows = max(1, batch_size // len(transformations))
        self.source = Source(
            data,
            max_samples,
            input_fn,
            seed,
            rank,
            world_size,
            with_batch,
            run,
            together=self._fetched_together(),
            pinned=self.device is not None and self.device.type == "cuda",
        )
        self.n_samples = self.source.n_samples
        self._seed, self._checked, self._compared = seed, False, False

    def _fetched_together(self) -> int:
        return self.rows * max(1, SAMPLES_PER_FETCH // self.rows)

    def resize(self, batch_size: int) -> None:
        """Change the size of the blocks, before an iteration; not for a stream."""
        self.batch_size, self.rows = batch_size, max(1, batch_size // len(self.transformations))
        self.source.fetch_together(self._fetched_together())

    def __len__(self) -> int:
        """Return the number of blocks of this process; a TypeError where the data have no length."""
        if (own := self.source.n_own) is None:
            raise TypeError("The data have no length.")
        return -(-own // self.rows) * len(self._parts())

    def _parts(self) -> list[slice]:
        m = len(self.transformations)
        return [slice(start, min(start + self.batch_size, m)) for start in range(0, m, self.batch_size)]

    def __iter__(self) -> Iterator[STBlock]:
        whole = slice(0, len(self.transformations))
        parts = [(c, self.transformations if c == whole else self.transformations[c]) for c in self._parts()]
        first = 0
        for samples in self._rows():
            if not self._checked and self.transform:
                self._checked = True
                warn_of_randomness(self.transformations, samples.inputs[:1], self._seed)
            indices = self.source.numbers(first, len(samples))
            first += len(samples)
            for columns, transformations in parts:
                if self.transform:
                    inputs = transformations(samples.inputs)
                    if not self._compared and len(parts) == 1:
                        self._compared = True
                        warn_of_equal(self.transformations, inputs)
                else:
                    inputs = torch.stack([samples.inputs] * len(transformations), dim=1)
                yield STBlock(inputs, samples.labels, columns, indices, samples.batch, samples.keys)

    def _rows(self) -> Iterator[Samples]:
        """Yield :attr:`rows` samples at a time, on the device, whatever the batches of the source."""
        rest: Samples | None = None
        for samples in self.source.batches():
            if self.device is not None:
                samples = samples.to(self.device)
            if rest is not None and not rest.fits(samples):
                yield rest
                rest = None
            if rest is not None:
                samples = rest + samples
            start = 0
            while (end := start + self.rows) <= len(samples):
                yield samples[start:end]
                start = end
            rest = samples[start:] if start < len(samples) else None
        if rest is not None:
            yield rest
