"""Parts of tensors, so that intermediate results stay in the processor's cache and take little memory."""

from __future__ import annotations

import torch
from torch import Tensor

#: Values that are processed at once.
CHUNK = 2**21


def chunk_length(x: Tensor) -> int:
    """How much of the last axis of ``x`` holds about :data:`CHUNK` values, on the CPU."""
    return max(1, (CHUNK if x.is_cpu else 16 * CHUNK) // x.shape[:-1].numel())


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of ``x`` along the last axis."""
    return torch.split(x, chunk_length(x), dim=-1)
