"""Calls of the functions in C, where they were compiled and take the tensors.

``csrc/`` is compiled when the package is installed, if the machine has a compiler. Everything works without it: each
function returns None where C cannot take the sum, and its caller then uses PyTorch's operations.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_invariance.accumulators.influences import FoundInfluences

_kernels: ModuleType | None
try:
    from lightning_invariance.accumulators.backends import _kernels  # type: ignore[attr-defined, no-redef]
except ImportError:
    _kernels = None

#: How many activations C reads together; offsets may lie in tiles of a multiple of it.
WIDTH: int = getattr(_kernels, "WIDTH", 64)

#: The most columns of :func:`add_deviations` and :func:`add_influences`, and of :func:`absolute_differences`.
MOST_COLUMNS: int = getattr(_kernels, "MOST_VALUES", 256)
MOST_ROWS: int = getattr(_kernels, "MOST_ROWS", 16)
MOST_SORTED: int = getattr(_kernels, "MOST_SORTED", 64)


class Limits(NamedTuple):
    """When float32 is not good enough for sums of squares and means; see :data:`LIMITS` and ``csrc/kernels.h``."""

    smallest: float
    largest: float
    far: float
    rows_for_far: int


#: A sum over rows of squares smaller than ``smallest`` may hold terms that float32 has rounded to 0, and one above
#: ``largest`` may leave float32 (3e38) where it is multiplied. Rounding float32 offsets o of N rows costs about
#: (6e-8 o)² N of a column's squared deviations: where these are below 1e-4 N o², that would be more than 4e-11 of
#: them, a thousandth of what the values themselves lose, and the means become float64. Fewer than 8 rows may be alike
#: by chance: their means are float64.
LIMITS = Limits(smallest=1e-24, largest=1e30, far=1e-4, rows_for_far=8)


class Changes(NamedTuple):
    """Sums of changes that :func:`add_deviations` adds to.

    Attributes:
        sums: ``(m, channels)`` in float64: what each transformation changes in each channel; see ``pytorch.py``.
        reference: the column that changes are taken from; None for the mean of the row.
        inner: how many neighbouring activations belong to one channel, before the next one's follow.
    """

    sums: Tensor
    reference: int | None
    inner: int


def takes(x: Tensor) -> bool:
    """Whether C reads rows ``x`` (n, m, ...): float32 in the CPU's memory."""
    return _kernels is not None and x.dtype == torch.float32 and x.is_cpu


def add_deviations(
    x: Tensor,
    before: int,
    row_spread: Tensor,
    column_spread: Tensor,
    centres: Tensor,
    offsets: Tensor,
    changes: Changes | None = None,
) -> bool | None:
    """Add rows to the squared deviations and column means of those before, in place.

    Args:
        x: rows ``(n, m, ...)`` of k activations.
        before: how many rows there were before.
        row_spread: ``(k,)`` in float64.
        column_spread: ``(1, k)`` in float64.
        centres: ``(k,)`` in float32 or float64.
        offsets: ``(k / width, m, width)`` in the type of ``centres``; ``width`` is k or a multiple of :data:`WIDTH`.
        changes: to which changes are added, too.

    Returns:
        Whether columns are so far apart that float32 offsets are too coarse; None where C does not take these tensors,
        and nothing was changed.

    Raises:
        ValueError: If the sums have other sizes.
    """
    n, m = x.shape[:2]
    dtype = offsets.dtype
    if not (
        takes(x)
        and m <= MOST_COLUMNS
        and dtype in (torch.float32, torch.float64)
        and _is_plain(row_spread, torch.float64)
        and _is_plain(column_spread, torch.float64)
        and _is_plain(centres, dtype)
        and _is_plain(offsets, dtype)
        and (changes is None or _is_plain(changes.sums, torch.float64))
    ):
        return None
    sums, reference, inner = (None, None, 1) if changes is None else changes
    x = x.contiguous()
    far: bool = _kernels.add_deviations(  # type: ignore[union-attr]
        block=_block(x, n, m, centres.shape[0]),
        before=before,
        row_spread=_address(row_spread),
        column_spread=_address(column_spread),
        centres=_address(centres),
        offsets=_address(offsets),
        width=offsets.shape[2],
        wide=dtype == torch.float64,
        limits=LIMITS,
        changes=_address(sums),
        inner=inner,
        reference=-1 if reference is None else reference,
        threads=torch.get_num_threads(),
    )
    return far


def absolute_differences(x: Tensor, network: Tensor, of_rows: bool = False) -> Tensor | None:
    r"""\|x_j − x_l\| of all ordered pairs within rows, in float64; None where C cannot.

    Args:
        x: rows ``(n, m, k)``, which may be a part of a larger tensor.
        network: ``(comparisons, 2)`` in int32: which two values to compare next, so that all come out in order.
        of_rows: whether the sum of each row is wanted.

    Returns:
        ``(n, k)`` of each row, or ``(k,)`` summed over rows.
    """
    if not takes(x) or x.shape[1] > MOST_SORTED:
        return None
    n, m, k = x.shape
    if not n:
        return torch.zeros((0, k) if of_rows else k, dtype=torch.float64)
    if x.stride(2) != 1 or min(x.stride()) < 0:
        x = x.contiguous()
    network, total = network.contiguous(), torch.empty(n * k if of_rows else k, dtype=torch.float64)
    from_x_on = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    _kernels.absolute_differences(  # type: ignore[union-attr]
        block=(x.data_ptr(), from_x_on, n, m, k),
        strides=x.stride()[:2],
        network=_address(network),
        differences=_address(total),
        of_rows=of_rows,
        threads=torch.get_num_threads(),
    )
    return total.view(n, k) if of_rows else total


class ChangesOfSamples(NamedTuple):
    """What :func:`add_influences` finds of changes from a column.

    Attributes:
        factors: ``(k,)`` in float32: f.
        reference: the column r.
    """

    factors: Tensor
    reference: int


def add_influences(
    x: Tensor,
    means: Tensor,
    weights: Tensor,
    counts: Tensor,
    squares: Tensor,
    fourths: Tensor,
    of_changes: ChangesOfSamples | None = None,
) -> FoundInfluences | None:
    r"""Add what samples change in values that are made of squared deviations.

    For every activation :math:`\psi_i = (w R_i + v C_i - b) / (1 - s C_i)`, with the squared deviations within row i
    and from the means of the columns.

    Args:
        x: rows ``(n, m, ...)`` of k activations.
        means: of the columns, ``(m, k)`` in float32.
        weights: ``(4, k)`` in float32: w, v, b and s.
        counts: ``(k,)`` in int32: −1 for activations that count, 0 for others.
        squares: ``(k,)`` in float64, to which :math:`\sum_i \psi_i^2` is added.
        fourths: ``(k,)`` in float64, to which :math:`\sum_i \psi_i^4` is added.
        of_changes: what changes are also wanted.

    Returns:
        None where C cannot, and nothing was changed.
    """
    n, m = x.shape[:2]
    if not takes(x) or m > MOST_COLUMNS:
        return None
    x, k = x.contiguous(), counts.shape[0]
    found = FoundInfluences(torch.zeros(n, dtype=torch.float64), torch.zeros(0), torch.zeros(0))
    if of_changes is not None:
        changes, spreads = torch.zeros(n, m, dtype=torch.float64), torch.empty(n, k)
        found = found._replace(changes=changes, spreads=spreads)
    if not n:
        return found
    means, weights, counts = means.contiguous(), weights.contiguous(), counts.contiguous()
    _kernels.add_influences(  # type: ignore[union-attr]
        block=_block(x, n, m, k),
        means=_address(means),
        weights=_address(weights),
        counts=_address(counts),
        squares=_address(squares),
        fourths=_address(fourths),
        on_sum=_address(found.on_sum),
        factors=_address(None if of_changes is None else of_changes.factors),
        reference=0 if of_changes is None else of_changes.reference,
        changes=_address(found.changes),
        spreads=_address(found.spreads),
        threads=torch.get_num_threads(),
    )
    return found


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor lies in the CPU's memory without gaps."""
    return tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous()


def _address(tensor: Tensor | None) -> tuple[int, int] | None:
    """Where a tensor lies, and its number of values, which C checks."""
    return None if tensor is None else (tensor.data_ptr(), tensor.numel())


def _block(x: Tensor, n: int, m: int, k: int) -> tuple[int, int, int, int, int]:
    """Where rows lie, their number of values, and the sizes that C checks these against."""
    return x.data_ptr(), x.numel(), n, m, k
