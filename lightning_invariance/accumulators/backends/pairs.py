"""All pairs of the values in a row, with less work than a difference for each."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends import c_kernels
from lightning_invariance.accumulators.backends.chunks import CHUNK, chunks
from lightning_invariance.accumulators.backends.pytorch import LARGEST_SQUARE, SMALLEST_SQUARE

#: ‖x‖² + ‖y‖² − 2 x·y cancels where it is below this fraction of ‖x‖² + ‖y‖²: x − y is then taken itself.
CANCELS = 1e-2


def absolute_differences(x: Tensor, of_rows: bool = False) -> Tensor:
    """|x_j − x_l| of all ordered pairs in the rows of (n, m, k): (n, k) of each row, or their sum (k,), in float64.

    Of the values in order, the r-th smallest is larger than r − 1 others and smaller than m − r.
    """
    m = x.shape[1]
    found = c_kernels.absolute_differences(x, _network(m), of_rows) if m <= c_kernels.MOST_SORTED else None
    if found is not None:
        return found
    return torch.cat([_sorted_differences(part, of_rows) for part in chunks(x)], -1)


def _sorted_differences(x: Tensor, of_rows: bool) -> Tensor:
    """:func:`absolute_differences` by PyTorch's operations."""
    m = x.shape[1]
    weights = torch.arange(1 - m, m, 2, dtype=x.dtype, device=x.device)
    ordered = (x - x[:, :1]).movedim(1, -1).contiguous().sort(-1).values  # the CPU sorts neighbours much faster
    return 2 * ordered.mul_(weights).sum(-1 if of_rows else (0, -1), dtype=torch.float64)


def euclidean_distances(maps: Tensor) -> Tensor:
    """‖x_j − x_l‖ of all unordered pairs in the rows of (n, m, channels, positions), summed: (n, channels) in float64.

    From the products of all pairs, ‖x‖² + ‖y‖² − 2 x·y, about the mean of the row. Where these nearly cancel, the
    difference of the two maps is taken itself; which pairs that concerns can be read on the CPU without synchronising.
    """
    positions = maps.shape[3]
    if not maps.is_cpu:
        return _all_euclidean_distances(maps)
    centred = maps - maps.mean(1, keepdim=True)
    products = torch.stack([row.transpose(0, 1) @ row.permute(1, 2, 0) for row in centred])
    squares = products.diagonal(dim1=-2, dim2=-1)
    sizes = squares[..., None] + squares[..., None, :]
    found = torch.sub(sizes, products, alpha=2)
    close = ~(found >= sizes.mul_(CANCELS))  # NaN is close, too
    total = found.clamp_min_(0).sqrt_().masked_fill_(close, 0).double().sum((2, 3)) / 2
    pairs = close.triu(1).nonzero()
    for some in torch.split(pairs, max(1, CHUNK // positions)):
        sample, channel, one, other = some.unbind(1)
        difference = maps[sample, one, channel] - maps[sample, other, channel]
        total.index_put_((sample, channel), difference.norm(dim=-1).double(), accumulate=True)
    lost = ((squares < SMALLEST_SQUARE) | ~(squares <= LARGEST_SQUARE)).any(-1)
    if maps.dtype == torch.float32 and bool(lost.any()):  # their products may have lost digits, be 0 or infinite
        few = maps.transpose(1, 2)[lost]
        total[lost] = euclidean_distances(few.transpose(0, 1)[None].double())[0]  # as the channels of one row
    return total


def _all_euclidean_distances(maps: Tensor) -> Tensor:
    """:func:`euclidean_distances` from the difference of each pair, in float64."""
    rows = maps.transpose(1, 2).to(torch.float64, memory_format=torch.contiguous_format)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum((2, 3)) / 2


@cache
def _network(m: int) -> Tensor:
    """Pairs to compare so that m values come out in order, (comparisons, 2): Batcher's odd-even merge sort."""
    pairs = []
    p = 1
    while p < m:
        k = p
        while k >= 1:
            for j in range(k % p, m - k, 2 * k):
                for i in range(min(k, m - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return torch.tensor(pairs, dtype=torch.int32).view(-1, 2)
