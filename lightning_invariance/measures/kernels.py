"""The two kinds of sums that cost most, over blocks of rows, in C (``_kernels.c``) where that was compiled.

It is compiled when the package is installed, if the machine has a compiler for it. Everything works without it: those
who call this take the same sums with PyTorch's operations where :func:`takes` says no.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

_kernels: ModuleType | None
try:
    from lightning_invariance.measures import _kernels  # type: ignore[attr-defined, no-redef]
except ImportError:
    _kernels = None

#: Rows of fewer activations, of which the kernels take several at once, are left to PyTorch.
FEWEST_ACTIVATIONS = 64

#: What a kernel found: digits lost in the rounding of float32, squares lost because it holds no smaller numbers.
UNCLEAR, LOST = 1, 2


def takes(x: Tensor) -> bool:
    """Whether the kernels can work on rows ``x`` (n, m, k)."""
    return (
        _kernels is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and x.shape[2] >= FEWEST_ACTIVATIONS
    )


def add_deviations(x: Tensor, centres: Tensor, moments: Tensor, columns: Tensor, n_rows: int) -> bool | None:
    """Add the deviations of rows from one centre for each activation to sums, in place.

    Args:
        x: rows (n, m, k) with ``takes(x)``, of at most 256 values of each activation.
        centres: (k,) in float64, each a float32 number.
        moments: (3, k) in float64: squared deviations from the row means, squared deviations, and deviations.
        columns: (m, k) in float32: deviations of each column.
        n_rows: how many rows there are with these.

    Returns:
        Whether the spread of the columns is clear of float32's rounding now. None where float32 does not hold squares
        of these rows; then the sums are what they were, but for rounding.
    """
    n, m, k = x.shape
    if not (centres.is_contiguous() and moments.is_contiguous() and columns.is_contiguous()):
        raise ValueError("Expected sums that are contiguous.")
    where = centres.data_ptr(), moments.data_ptr(), columns.data_ptr(), n_rows
    flags: int = _kernels.add_deviations(x.data_ptr(), n, m, k, torch.get_num_threads(), *where, 1)  # type: ignore[union-attr]
    if flags & LOST:  # take away what was added where it holds them
        _kernels.add_deviations(x.data_ptr(), n, m, k, torch.get_num_threads(), *where, -1)  # type: ignore[union-attr]
        return None
    return not flags & UNCLEAR


def absolute_differences(x: Tensor, network: Tensor) -> Tensor:
    r"""\|x_j − x_l\| of all ordered pairs within rows, summed over rows: (k,) in float64.

    Args:
        x: rows (n, m, k) with ``takes(x)``, of at most 64 columns.
        network: (comparisons, 2) in int32: which two values to compare next, so that all come out in order.
    """
    n, m, k = x.shape
    total = torch.empty(k, dtype=torch.float64)
    about = (network.data_ptr(), len(network), total.data_ptr())
    _kernels.absolute_differences(x.data_ptr(), n, m, k, torch.get_num_threads(), *about)  # type: ignore[union-attr]
    return total
