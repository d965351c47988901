"""The two kinds of sums that cost most, over blocks of rows, in C (``_kernels.c``) where that was compiled.

It is compiled when the package is installed, if the machine has a compiler for it. Everything works without it: those
who call this take the same sums with PyTorch's operations where :func:`takes` says no.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

_kernels: ModuleType | None
try:
    from lightning_invariance.measures import _kernels  # type: ignore[attr-defined, no-redef]
except ImportError:
    _kernels = None

#: How many activations they take at a time.
WIDTH = 64

#: The most columns that they add.
MOST_COLUMNS = 256


def takes(x: Tensor) -> bool:
    """Whether the kernels can work on rows ``x`` (n, m, ...)."""
    fits = _kernels is not None and x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()
    return fits and x.shape[1] <= MOST_COLUMNS


def adds(x: Tensor, row_spread: Tensor, column_spread: Tensor, centres: Tensor, offsets: Tensor) -> bool:
    """Whether :class:`Adder` can add rows ``x`` (n, m, ...) to these sums."""
    return (
        takes(x)
        and offsets.dtype == centres.dtype in (torch.float32, torch.float64)
        and row_spread.dtype == column_spread.dtype == torch.float64
        and column_spread.shape[0] == 1
        and all(sums.is_contiguous() for sums in (row_spread, column_spread, centres, offsets))
    )


class Adder:
    """Adds rows to the sums of those before, and to their number, in place; see ``Sums`` for what they are.

    A network is many layers and batches: what is the same for all blocks of one shape is looked up once.

    Args:
        x: rows (n, m, ...); those to add are like them.
        n: () in int64: how many there were before.
        row_spread: (k,) in float64, where k is the number of activations.
        column_spread: (1, k) in float64.
        centres: (k,) in float32 or float64.
        offsets: (k / width, m, width) in the same type, where ``width`` is k or a multiple of 64.

    Raises:
        ValueError: If :func:`adds` is false.
    """

    def __init__(self, x: Tensor, n: Tensor, *sums: Tensor) -> None:
        if not adds(x, *sums):
            raise ValueError(f"Expected rows and sums that the kernels add, but got rows of {tuple(x.shape)}.")
        rows, m, *shape = x.shape
        self._shape = x.shape
        self._n, self._sums = n, sums  # which have to stay where they are
        pointers = (tensor.data_ptr() for tensor in (n, *sums))
        layout = sums[3].shape[2], sums[3].dtype == torch.float64
        self._where = rows, m, math.prod(shape), torch.get_num_threads(), *pointers, *layout

    def fits(self, x: Tensor, n: Tensor, offsets: Tensor) -> bool:
        """Whether the rows are like those at first, and these are still the sums to add to."""
        return x.shape == self._shape and takes(x) and n is self._n and offsets is self._sums[3]

    def __call__(self, x: Tensor) -> bool:
        """Add rows.

        Returns:
            Whether columns are so far apart, for their variance, that float32 does not do for the offsets.
        """
        far: int = _kernels.add_deviations(x.data_ptr(), *self._where)  # type: ignore[union-attr]
        return bool(far)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy would add to the sums of the original


def absolute_differences(x: Tensor, network: Tensor) -> Tensor:
    r"""\|x_j − x_l\| of all ordered pairs within rows, summed over rows: (k,) in float64.

    Args:
        x: rows (n, m, k) with ``takes(x)``, of at most 64 columns and at least 64 activations.
        network: (comparisons, 2) in int32: which two values to compare next, so that all come out in order.
    """
    n, m, k = x.shape
    total = torch.empty(k, dtype=torch.float64)
    about = (network.data_ptr(), len(network), total.data_ptr())
    _kernels.absolute_differences(x.data_ptr(), n, m, k, torch.get_num_threads(), *about)  # type: ignore[union-attr]
    return total
