"""Size of a batch where ``batch_size="auto"``: by the kind of device and the shape of the inputs alone."""

from __future__ import annotations

import torch

from lightning_invariance.data.loader import STLoader

#: Inputs of a batch on the CPU.
ON_CPU = 128

#: On an accelerator a batch holds inputs of so many bytes, at most so many inputs: small networks keep a GPU busy for
#: longer than it takes to launch their kernels only with many.
INPUT_BYTES = 2**29
MOST = 2**14

#: Inputs of a batch there from a stream, whose inputs are not looked at before.
OF_STREAM = 2**10


def first_batch_size(device: torch.device) -> int:
    """The number before anything is known of the inputs."""
    return ON_CPU if device.type == "cpu" else OF_STREAM


def batch_size_for(loader: STLoader, device: torch.device) -> int:
    """The number for the inputs of a loader; in float32, whatever their type."""
    size = None if device.type == "cpu" else loader.source.bytes_of_input()
    return loader.batch_size if size is None else max(1, min(MOST, INPUT_BYTES // size))
