"""Sums of squared deviations on GPUs and other accelerators: in one Triton kernel, or by few of PyTorch's operations.

Nothing here reads a value, which would synchronise.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType

import torch
from torch import Tensor

from lightning_invariance.accumulators import kernels
from lightning_invariance.accumulators.base import Rows, States

#: Triton's kernels: None until they are needed, False where they do not work.
_triton: ModuleType | None | bool = None


def add_deviations(
    states: States, rows: Rows, limits: kernels.Limits, response: bool = False, reference: int | None = None
) -> None:
    """Add rows to the states of :class:`~lightning_invariance.accumulators.deviations.Deviations`, in place.

    Args:
        states: with float64 means (on MPS, which has no float64, all are float32), in one tile.
        rows: of another device than the CPU.
        limits: when float32 is not good enough for sums of squares.
        response: whether to add what each transformation changes.
        reference: the column that changes are taken from; None for the mean of the row.
    """
    x, (_, m, *shape) = rows.flat, rows.values.shape
    if response and not states["changes"].numel():
        channels = shape[rows.channel_axis] if shape else 1
        states["changes"] = states["row_spread"].new_zeros(m, channels)
    changes = states["changes"] if response else None
    kernel = _kernels_for(x)
    if kernel is None:
        _add_by_pytorch(states, x, rows, changes, reference)
        return
    sums = (states["row_spread"], states["column_spread"], states["centres"], states["offsets"])
    inner = math.prod(shape[rows.channel_axis + 1 :])
    try:
        kernel.add_deviations(
            x, rows.before, *sums, (limits.smallest, limits.largest), changes, reference, inner
        )
    except Exception as error:  # raised before anything is launched
        _give_up(error)
        _add_by_pytorch(states, x, rows, changes, reference)


def _kernels_for(x: Tensor) -> ModuleType | None:
    """Triton's kernels, where they take rows ``x`` (n, m, k)."""
    global _triton
    if not x.is_cuda or _triton is False:
        return None
    if _triton is None:
        try:
            from lightning_invariance.accumulators import triton_kernels as found
        except ImportError:  # on Windows, for example
            _triton = False
            return None
        _triton = found
    assert isinstance(_triton, ModuleType)
    return _triton if _triton.takes(x) else None


def _give_up(error: Exception) -> None:
    """Do without Triton from now on: it needs a C compiler, for example, and not every machine has one."""
    global _triton
    _triton = False
    warnings.warn(
        "Triton could not compile the kernel that sums squared deviations, so PyTorch's operations do it, which takes"
        f" longer: {type(error).__name__}: {error}",
        UserWarning,
        stacklevel=2,
    )


def _add_by_pytorch(states: States, x: Tensor, rows: Rows, changes: Tensor | None, reference: int | None) -> None:
    r"""The same sums in 16 operations at most: deviations are rounded to the type of ``x``, and summed in float64.

    The norms of many values are sums of squares with a square root, which is taken back.
    """
    m, total, wide = x.shape[1], rows.before + len(x), states["row_spread"].dtype
    # Columns: with the deviations d from the means so far, C grows by sum d^2 - (sum d)^2 / N.
    deviations = torch.sub(x, states["offsets"][0] + states["centres"], out=torch.empty_like(x))
    sums = deviations.sum(0, dtype=wide)
    length, moved = torch.linalg.vector_norm(deviations, dim=(0, 1), dtype=wide), torch.linalg.vector_norm(sums, dim=0)
    states["column_spread"].addcmul_(length, length).addcmul_(moved, moved, value=-1 / total)
    states["offsets"].add_(sums, alpha=1 / total)
    # Rows: deviations a from a column, or from the mean of the row; constant rows deviate by exactly 0.
    first = reference or 0
    torch.sub(x, x[:, first : first + 1], out=deviations)
    of_rows = deviations.sum(1, dtype=wide)
    if changes is not None and reference is None:
        torch.sub(deviations, of_rows[:, None], alpha=1 / m, out=deviations)
    length = torch.linalg.vector_norm(deviations, dim=(0, 1), dtype=wide)
    states["row_spread"].addcmul_(length, length)
    if changes is None or reference is not None:
        length = torch.linalg.vector_norm(of_rows, dim=0)
        states["row_spread"].addcmul_(length, length, value=-1 / m)
    if changes is not None:
        maps = deviations.view(*rows.values.shape, 1).movedim(2 + rows.channel_axis, 2)
        length = torch.linalg.vector_norm(maps, dim=(0, *range(3, maps.ndim)), dtype=wide)
        changes.addcmul_(length, length, value=0.5 if reference is not None else m / max(m - 1, 1))
