"""How many inputs a batch holds where ``batch_size="auto"``."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lightning_invariance.data.loader import STLoader
from lightning_invariance.engine.allocator import LARGEST_BLOCK
from lightning_invariance.engine.budget import Output

#: Inputs in the first batch on the CPU.
ON_CPU = 128

#: The next batches there hold up to so many, since each block of a layer costs some time whatever its size. Activations
#: take no more bytes than this on average, so that those that were just computed are in a cache when they are read; and
#: the largest less than what is fetched from the system each time, see ``allocator.py``.
MOST_ON_CPU = 512
MEAN_BYTES = 10 * 2**20
LARGEST_BYTES = LARGEST_BLOCK - 2**16

#: On an accelerator a batch holds inputs of so many bytes, at most so many inputs: small networks keep a GPU busy for
#: longer than it takes to launch their kernels only with many.
INPUT_BYTES = 2**29
MOST = 2**14

#: There it holds so many of a stream, whose inputs are not looked at before.
OF_STREAM = 2**10


def first_size(device: torch.device) -> int:
    """The number before anything is known of the inputs."""
    return ON_CPU if device.type == "cpu" else OF_STREAM


def size_for_inputs(loader: STLoader, device: torch.device) -> int:
    """The number for the inputs of a loader; in float32, whatever their type."""
    size = None if device.type == "cpu" else loader.source.bytes_of_input()
    return loader.batch_size if size is None else max(1, min(MOST, INPUT_BYTES // size))


def size_for_activations(loader: STLoader, device: torch.device, outputs: Iterable[Output]) -> int:
    """The number once the activations of the layers are known; that of before for a stream and for long rows."""
    sizes = [output.nbytes // batch for output, _, batch in outputs]
    if (
        device.type != "cpu"
        or loader.n_samples is None
        or len(loader.transformations) > loader.batch_size
        or not any(sizes)
    ):
        return loader.batch_size
    fitting = min(MEAN_BYTES * len(sizes) // sum(sizes), LARGEST_BYTES // max(sizes))
    return max(loader.batch_size, min(MOST_ON_CPU, fitting))
