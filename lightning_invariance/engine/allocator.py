"""Keeping the memory of activations from one forward pass to the next."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache

#: Parameters of ``mallopt`` in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

#: Bytes of a block from which on glibc fetches it from the system each time, the most that it allows; and bytes at the
#: end of the heap that it keeps when they are freed. By default these are 128 kB, and grow to 32 and 64 MB.
LARGEST_BLOCK = 2**25
KEPT = 2**28

#: With these users of glibc set the same.
VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Have glibc keep up to 256 MiB of what is freed, for the whole process; elsewhere nothing is done.

    Otherwise it returns activations to the system, which zeroes their pages again when the next ones need them: without
    this an evaluation of a ResNet-20 took 1.7 times its forward passes on 2 cores, with it 1.5 times. Where users have
    set one of :data:`VARIABLES` it stays as it is.
    """
    if sys.platform != "linux" or os.environ.keys() & VARIABLES:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        mallopt(M_TRIM_THRESHOLD, KEPT)
