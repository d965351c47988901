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

#: How many they take at a time.
WIDTH = 64

#: What a kernel found: digits lost in the rounding of float32, squares lost because it holds no smaller numbers.
UNCLEAR, LOST = 1, 2


def takes(x: Tensor) -> bool:
    """Whether the kernels can work on rows ``x`` (n, m, ...)."""
    return (
        _kernels is not None
        and x.dtype == torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and x.shape[2:].numel() >= FEWEST_ACTIVATIONS
    )


class Adder:
    """Adds the deviations of rows from one centre for each activation to sums, in place.

    A network is many layers and batches: what is the same for all blocks of one shape is looked up once.

    Args:
        x: rows (n, m, k) with ``takes(x)``, of at most 256 values of each activation; those to add are like them.
        rows: () in int64: how many there are.
        centres: (k / width, 1, width) in float32, where ``width`` is k or a multiple of 64.
        moments: (k / width, 2, width) in float64: squared deviations from the row means, and squared deviations.
        columns: (k / width, m, width) in float32: deviations of each column.

    Raises:
        ValueError: If the sums are not contiguous.
    """

    def __init__(self, x: Tensor, rows: Tensor, centres: Tensor, moments: Tensor, columns: Tensor) -> None:
        if not (centres.is_contiguous() and moments.is_contiguous() and columns.is_contiguous()):
            raise ValueError("Expected sums that are contiguous.")
        self.sums = rows, centres, moments, columns  # which have to stay where they are
        pointers = (tensor.data_ptr() for tensor in self.sums)
        self._where = *x.shape, torch.get_num_threads(), *pointers, columns.shape[2]

    def __call__(self, x: Tensor) -> bool | None:
        """Add rows.

        Returns:
            Whether the spread of the columns is clear of float32's rounding now. None where float32 does not hold
            squares of these rows; then the sums are what they were, but for rounding.
        """
        flags: int = _kernels.add_deviations(x.data_ptr(), *self._where)  # type: ignore[union-attr]
        return None if flags & LOST else not flags & UNCLEAR

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy would add to the sums of the original


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
