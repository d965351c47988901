"""Buffers and pieces that keep intermediate results in the processor's cache."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

#: Values that are processed at once.
CHUNK = 2**21

#: Values between the rows of a buffer, if these are long: three lines of the cache.
PADDING = 48
LONG = 512

_buffers = threading.local()


def chunk_length(x: Tensor) -> int:
    """How much of the last axis of ``x`` holds about :data:`CHUNK` values, on the CPU."""
    return max(1, (CHUNK if x.is_cpu else 16 * CHUNK) // x.shape[:-1].numel())


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of ``x`` along the last axis."""
    return torch.split(x, chunk_length(x), dim=-1)


def scratch(like: Tensor) -> Tensor:
    """A buffer of the shape and type of ``like``: on the CPU the same memory at every call, one for each thread.

    The system zeroes fresh memory page by page, which takes longer than the arithmetic on it. Long rows lie a little
    further apart than they are long: feature maps are often a power of two long, and a sum over rows that are a power
    of two apart would read all of them through the same few lines of the cache.
    """
    if not like.is_cpu:  # other devices have allocators that keep their memory
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    *rows, length = like.shape
    apart = length + PADDING if length >= LONG else length
    needed = math.prod(rows) * apart
    buffers: dict[Any, Tensor] = _buffers.__dict__
    if like.dtype not in buffers or buffers[like.dtype].numel() < needed:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            buffers[like.dtype] = torch.empty(needed, dtype=like.dtype)
    return buffers[like.dtype][:needed].view(*rows, apart)[..., :length]
