"""The boundary to C: sums over a block of rows, where they were compiled and the tensors are what they take.

``csrc/`` is compiled when the package is installed, if the machine has a compiler. Everything works without it: each
function returns None where C cannot take the sum, and its caller then uses PyTorch's operations.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import FoundInfluences

_kernels: ModuleType | None
try:
    from lightning_invariance.accumulators.backends import _kernels  # type: ignore[attr-defined, no-redef]
except ImportError:
    _kernels = None

#: How many activations C reads together; offsets may lie in tiles of a multiple of it.
WIDTH: int = getattr(_kernels, "WIDTH", 64)

#: The most columns of :func:`add_deviations` and :func:`add_influences`, and of :func:`absolute_differences`.
MOST_COLUMNS: int = getattr(_kernels, "MOST_VALUES", 256)
MOST_SORTED: int = getattr(_kernels, "MOST_SORTED", 64)


class Limits(NamedTuple):
    """When float32 is not good enough for sums of squares and means; see ``deviations.py`` for the values.

    Attributes:
        smallest: a sum of squares below this may have lost digits, if its terms are not 0.
        largest: a sum of squares above this may overflow where it is multiplied.
        far: float32 offsets are too coarse where the squared deviations of a column are below this part of its N
            squared offsets,
        rows_for_far: and N is at least this;
        far_of_few: the same part for fewer rows.
    """

    smallest: float
    largest: float
    far: float
    rows_for_far: int
    far_of_few: float


class Beside(NamedTuple):
    """What :func:`add_deviations` finds beside its sums.

    Attributes:
        changes: ``(m, channels)`` in float64, to which what each transformation changes is added, summed over the
            positions of each channel; see ``changes.py``.
        reference: the column that changes are taken from; None for the mean of the row.
        inner: how many neighbouring activations belong to one channel, before the next one's follow.
        spreads: ``(n, k)`` in float32, which then hold the squared deviations within each row.
    """

    changes: Tensor | None = None
    reference: int | None = 0
    inner: int = 1
    spreads: Tensor | None = None

    def of(self, rows: slice) -> Beside:
        """The same for some of the rows."""
        return self if self.spreads is None else self._replace(spreads=self.spreads[rows])


NOTHING = Beside()


def is_compiled() -> bool:
    """Whether there is C."""
    return _kernels is not None


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
    limits: Limits,
    beside: Beside = NOTHING,
) -> bool | None:
    """Add rows to the squared deviations and column means of those before, in place.

    Args:
        x: rows ``(n, m, ...)`` of k activations.
        before: how many rows there were before.
        row_spread: ``(k,)`` in float64.
        column_spread: ``(1, k)`` in float64.
        centres: ``(k,)`` in float32 or float64.
        offsets: ``(k / width, m, width)`` in the same type, where ``width`` is k or a multiple of :data:`WIDTH`.
        limits: when float32 is not good enough.
        beside: what else is wanted.

    Returns:
        Whether columns are so far apart that float32 offsets are too coarse; None where C cannot add to these sums, and
        nothing was changed.
    """
    # Written out, since a generator for each check would cost as much as the sums of a small layer.
    if not takes(x):
        return None
    n, m = x.shape[:2]
    changes, reference, inner, spreads = beside
    k, dtype = centres.shape[0], centres.dtype
    tiles, columns, width = offsets.shape
    if not (
        m == columns <= MOST_COLUMNS
        and tiles * width == k == row_spread.shape[0]
        and (tiles == 1 or width % WIDTH == 0)
        and column_spread.shape == (1, k)
        and row_spread.dtype == column_spread.dtype == torch.float64
        and offsets.dtype == dtype in (torch.float32, torch.float64)
        and row_spread.is_contiguous()
        and column_spread.is_contiguous()
        and centres.is_contiguous()
        and offsets.is_contiguous()
        and row_spread.is_cpu
        and column_spread.is_cpu
        and centres.is_cpu
        and offsets.is_cpu
        and (changes is None or (changes.is_contiguous() and changes.shape[0] == m and changes.dtype == torch.float64))
    ):
        return None
    x = x.contiguous()
    far: bool = _kernels.add_deviations(  # type: ignore[union-attr]
        n,
        m,
        k,
        torch.get_num_threads(),
        before,
        width,
        dtype == torch.float64,
        x.data_ptr(),
        x.numel(),
        row_spread.data_ptr(),
        row_spread.numel(),
        column_spread.data_ptr(),
        column_spread.numel(),
        centres.data_ptr(),
        centres.numel(),
        offsets.data_ptr(),
        offsets.numel(),
        *((0, 0, 0) if changes is None else (changes.data_ptr(), changes.shape[1], inner)),
        -1 if reference is None else reference,
        *((0, 0) if spreads is None else (spreads.data_ptr(), spreads.numel())),
        *limits,
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
    row, column, step = x.stride()
    if step != 1 or min(row, column) < 0:
        x = x.contiguous()
        row, column, step = x.stride()
    network, total = network.contiguous(), torch.empty(n * k if of_rows else k, dtype=torch.float64)
    from_x_on = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    _kernels.absolute_differences(  # type: ignore[union-attr]
        *(n, m, k, torch.get_num_threads(), len(network), row, column, x.data_ptr(), from_x_on),
        *(number for tensor in (network, total) for number in (tensor.data_ptr(), tensor.numel())),
        of_rows,
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

    For every activation :math:`\psi_i = w R_i + v C_i - b`, with the squared deviations within row i and of row i from
    the means of the columns.

    Args:
        x: rows ``(n, m, ...)`` of k activations.
        means: of the columns, ``(m, k)`` in float32.
        weights: ``(3, k)`` in float32: w, v and b.
        counts: ``(k,)`` in int32: −1 for activations that count, 0 for others.
        squares: ``(k,)`` in float64, to which :math:`\sum_i \psi_i^2` is added.
        fourths: the same for :math:`\sum_i \psi_i^4`.
        of_changes: what changes are also wanted.

    Returns:
        None where C cannot, and nothing was changed.
    """
    n, m = x.shape[:2]
    if not takes(x) or m > MOST_COLUMNS:
        return None
    x, k = x.contiguous(), counts.shape[0]
    found = FoundInfluences(torch.zeros(n, dtype=torch.float64), torch.zeros(0), torch.zeros(0))
    factors, reference = (torch.zeros(0), 0) if of_changes is None else of_changes
    if of_changes is not None:
        changes, spreads = torch.zeros(n, m, dtype=torch.float64), torch.empty(n, k)
        found = found._replace(changes=changes, spreads=spreads)
    tensors = (x, means.contiguous(), weights.contiguous(), counts.contiguous(), squares, fourths, found.on_sum)
    beside = (factors, found.changes, found.spreads)
    if n:
        _kernels.add_influences(  # type: ignore[union-attr]
            *(n, m, k, torch.get_num_threads()),
            *(number for tensor in tensors for number in (tensor.data_ptr(), tensor.numel())),
            *(number for tensor in beside for number in (tensor.data_ptr(), tensor.numel())),
            reference,
        )
    return found
