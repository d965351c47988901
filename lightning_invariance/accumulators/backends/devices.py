"""Sums of squared deviations on GPUs and other accelerators: in one Triton kernel, or by few of PyTorch's operations.

Nothing here reads a value, which would synchronise.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends import c_kernels
from lightning_invariance.accumulators.base import Rows, States

#: Whether Triton is still to be tried: it is not everywhere, and needs a C compiler, for example.
_tries_triton = True


def add_deviations(
    states: States,
    rows: Rows,
    limits: c_kernels.Limits,
    squared: bool = True,
    response: bool = False,
    reference: int | None = None,
) -> None:
    """Add rows to the states of :class:`~lightning_invariance.accumulators.deviations.Deviations`, in place.

    Args:
        states: of any kind; from now on with float64 means in one tile.
        rows: of another device than the CPU, with float64; only Triton reads float16 and bfloat16 as they are.
        limits: when float32 is not good enough for sums of squares.
        squared: whether variances or standard deviations are averaged.
        response: whether to add what each transformation changes.
        reference: the column that changes are taken from; None for the mean of the row.
    """
    _, m, *shape = rows.values.shape
    if response and not states["changes"].numel():
        channels = shape[rows.channel_axis] if shape else 1
        states["changes"] = states["row_spread"].new_zeros(m, channels)
    changes = states["changes"] if response else None
    _in_one_tile(states)
    kernel = _kernels_for(rows.flat) if squared else None
    if kernel is not None:
        sums = (states["row_spread"], states["column_spread"], states["centres"], states["offsets"])
        inner = math.prod(shape[rows.channel_axis + 1 :])
        try:
            of_squares = limits.smallest, limits.largest
            kernel.add_deviations(rows.flat, rows.before, *sums, of_squares, changes, reference, inner)
            return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler, before the first launch
            _give_up(error)
    rows.widen()
    _add_columns(states, rows.flat, rows.before, squared)
    _add_rows(states, rows.flat, squared, rows, changes, reference)


def _in_one_tile(states: States) -> None:
    """States as they are kept here, also of rows that were added on the CPU before, or merged."""
    if len(states["offsets"]) > 1:
        states["offsets"] = states["offsets"].movedim(1, 0).flatten(1)[None]
    for name in ("row_spread", "column_spread", "centres", "offsets"):
        states[name] = states[name].to(states["row_spread"].dtype).contiguous()


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


def _add_columns(states: States, x: Tensor, before: int, squared: bool) -> None:
    r"""Deviations d from the means so far, rounded to the type of ``x``: C grows by sum d^2 - (sum d)^2 / N.

    Norms are sums of squares in float64, in one operation, with a square root that is taken back.
    """
    total, spread, wide = before + len(x), states["column_spread"], states["row_spread"].dtype
    deviations = torch.sub(x, states["offsets"][0] + states["centres"], out=torch.empty_like(x))
    sums = deviations.sum(0, dtype=wide)
    length = torch.linalg.vector_norm(deviations, dim=(0, 1) if squared else 0, dtype=wide)
    moved = torch.linalg.vector_norm(sums, dim=0) if squared else sums
    spread.addcmul_(length, length).addcmul_(moved, moved, value=-1 / total)
    states["offsets"].add_(sums, alpha=1 / total)


def _add_rows(
    states: States, x: Tensor, squared: bool, rows: Rows, changes: Tensor | None, reference: int | None
) -> None:
    """Deviations a from a column: R grows by sum a^2 - (sum a)^2 / m, and a constant row adds exactly 0.

    Where changes are taken from the means of the rows, R grows by the sum of their squares.
    """
    m, spread, first = x.shape[1], states["row_spread"], reference or 0
    from_means = changes is not None and reference is None
    deviations = torch.sub(x, x[:, first : first + 1])
    of_rows = deviations.sum(1, dtype=spread.dtype)
    if from_means:
        torch.sub(deviations, of_rows[:, None], alpha=1 / m, out=deviations)
    length = torch.linalg.vector_norm(deviations, dim=(0, 1) if squared else 1, dtype=spread.dtype)
    squares = spread.addcmul_(length, length) if squared else length.square_()
    if not from_means:
        of_rows = torch.linalg.vector_norm(of_rows, dim=0) if squared else of_rows
        squares.addcmul_(of_rows, of_rows, value=-1 / m)
    if not squared:
        spread.add_(squares.div_(m - 1).sqrt_().sum(0))
    if changes is not None:
        maps = deviations.view(*rows.values.shape, 1).movedim(2 + rows.channel_axis, 2)
        length = torch.linalg.vector_norm(maps, dim=(0, *range(3, maps.ndim)), dtype=spread.dtype)
        changes.addcmul_(length, length, value=0.5 if reference is not None else m / max(m - 1, 1))
