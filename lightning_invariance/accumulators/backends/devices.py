"""Sums of squared deviations on GPUs, in one Triton kernel where Triton works.

No value is read, which would synchronise.
"""

from __future__ import annotations

import warnings
from types import ModuleType

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends.base import Wanted, channels_of
from lightning_invariance.accumulators.backends.c_kernels import LIMITS
from lightning_invariance.accumulators.column_means import first_states, widen_in_one_tile
from lightning_invariance.accumulators.rows import Rows, States

#: Whether Triton is still to be tried: it is not everywhere, and needs a C compiler, for example.
_tries_triton = True


def add_deviations(states: States, rows: Rows, wanted: Wanted) -> bool:
    """Add rows, if Triton takes them; see ``base.py``."""
    x = rows.flat
    kernels = _kernels_for(x) if wanted.squared else None
    if kernels is None:
        return False
    if not states["centres"].numel():
        states.update(first_states(x, torch.float64))
    widen_in_one_tile(states)
    channels, inner = channels_of(rows)
    if wanted.response and not states["changes"].numel():
        states["changes"] = states["row_spread"].new_zeros(x.shape[1], channels)
    sums = [states[name] for name in ("row_spread", "column_spread", "centres", "offsets")]
    changes = states["changes"] if wanted.response else None
    try:
        kernels.add_deviations(
            x, rows.before, *sums, (LIMITS.smallest, LIMITS.largest), changes, wanted.reference, inner
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, before the first launch
        _give_up(error)
        return False
    return True


def _kernels_for(x: Tensor) -> ModuleType | None:
    """Triton's kernels, where they take rows ``x`` (n, m, k)."""
    if not (x.is_cuda and _tries_triton):
        return None
    try:
        from lightning_invariance.accumulators.backends import triton_kernels
    except ImportError:  # on Windows, for example
        _give_up(None)
        return None
    return triton_kernels if triton_kernels.takes(x) else None


def _give_up(error: Exception | None) -> None:
    """Do without Triton from now on, and tell why it does not work where it is there."""
    global _tries_triton
    _tries_triton = False
    if error is not None:
        warnings.warn(
            "Triton could not compile a kernel that sums squared deviations, so PyTorch's operations do it, which"
            f" takes longer: {type(error).__name__}: {error}",
            UserWarning,
            stacklevel=2,
        )
