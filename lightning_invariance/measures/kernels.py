"""The two sums over blocks of rows that cost most, in C (``_kernels.c``) where that was compiled.

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


def add_deviations(
    x: Tensor, centres: Tensor, moments: Tensor | None, columns: Tensor | None, n_rows: int
) -> tuple[Tensor, Tensor, bool] | None:
    """Sums of the deviations of rows from one centre for each activation, added to those of earlier rows.

    Args:
        x: rows (n, m, k) with ``takes(x)``, of at most 256 columns.
        centres: (k,) in float64, each a float32 number.
        moments: (3, k) in float64: squared deviations from the row means, squared deviations, and deviations so far;
            None for none.
        columns: (m, k) in float32: deviations of each column so far; None for none.
        n_rows: how many rows there are with these.

    Returns:
        The new moments, the new columns, and whether the spread of the columns is clear of float32's rounding. None
        where squares of these rows are too small for float32.
    """
    n, m, k = x.shape
    new_moments, new_columns = torch.empty(3, k, dtype=torch.float64), torch.empty(m, k)
    given = [None if values is None else values.contiguous() for values in (centres, moments, columns)]
    flags: int = _kernels.add_deviations(  # type: ignore[union-attr]
        *(x.data_ptr(), n, m, k, torch.get_num_threads()),
        *(0 if values is None else values.data_ptr() for values in given),
        *(n_rows, new_moments.data_ptr(), new_columns.data_ptr()),
    )
    return None if flags & LOST else (new_moments, new_columns, not flags & UNCLEAR)


def absolute_differences(x: Tensor, network: Tensor) -> Tensor:
    """\\|x_j − x_l\\| of all ordered pairs within rows, summed over rows: (k,) in float64.

    Args:
        x: rows (n, m, k) with ``takes(x)``, of at most 64 columns.
        network: (comparisons, 2) in int32: which two values to compare next, so that all come out in order.
    """
    n, m, k = x.shape
    total = torch.empty(k, dtype=torch.float64)
    about = (network.data_ptr(), len(network), total.data_ptr())
    _kernels.absolute_differences(x.data_ptr(), n, m, k, torch.get_num_threads(), *about)  # type: ignore[union-attr]
    return total
