"""Sums over blocks of rows of the ST matrix, fast and without losing digits."""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_invariance.measures import kernels

#: Values that are processed at once, so that the intermediate results stay in the processor's cache.
CHUNK = 2**21

#: Values between the rows of a buffer: three lines of the cache.
PADDING = 48

#: Longer sums than this are taken in float64.
LONGEST_FLOAT32_SUM = 256

#: Sums of squares below this lose digits in float32, whose smallest normal number is about 1e-38.
SMALLEST_FLOAT32_SQUARE = 1e-30

#: The same for sums over rows: some that are part of a smaller one may have been rounded to 0.
SMALLEST = 1e-24

#: Sums of squares above this may make other sums leave float32, which ends at 3e38.
LARGEST_FLOAT32_SQUARE = 1e30

#: Fewer values than this are summed as fast in float64.
FEWEST_FLOAT32_VALUES = 2**14

#: Columns have a centre if they differ by no more than this part of it.
CLOSE = 1 / 4

#: Where variances of columns are below this part of their squared offsets, float32 does not do for the offsets. That,
#: and the number of rows that can tell, are those of _kernels.c.
FAR = 1e-4
ROWS_THAT_TELL = 8


class Sums(NamedTuple):
    """Squared deviations within the rows and columns of rows ``x`` (n, m, k), and the means of the columns.

    The means are ``centres + offsets``, in float32 where that will do. Squared deviations are those from the means as
    they are kept, so that rounding these costs next to nothing.

    Attributes:
        row_spread: (k,) squared deviations from the row means, or the sum of the rows' standard deviations.
        column_spread: (1, k) squared deviations from the column means, summed over the columns, or (m, k).
        centres: (k,).
        offsets: (k / width, m, width), in parts of ``width`` activations: the kernels read 64 together, and PyTorch's
            operations take a part for each thread.
    """

    row_spread: Tensor
    column_spread: Tensor
    centres: Tensor
    offsets: Tensor

    @classmethod
    def before(cls, x: Tensor, squared: bool) -> Sums:
        """The sums before the first of rows like these, with that row for the means.

        So the deviations of columns that are constant are exactly 0.
        """
        _, m, k = x.shape
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        narrow = x.dtype == torch.float32 and x.is_cpu and m * k >= FEWEST_FLOAT32_VALUES
        first = x[0].to(torch.float32 if narrow else wide)
        low, high = first.amin(0), first.amax(0)
        # Close columns differ exactly from a centre, which is 0 for the others.
        close = high - low <= CLOSE * first[0].abs()
        centres = torch.where(close, first[0], 0)
        squares = torch.zeros(1 if squared else m, k, dtype=wide, device=x.device)
        parts = k // kernels.WIDTH if k % kernels.WIDTH == 0 else 1
        if not kernels.takes(x):
            parts = math.gcd(k, torch.get_num_threads()) if x.is_cpu else 1
        offsets = (first - centres).view(m, parts, -1).movedim(1, 0).contiguous()
        return cls(squares[0].clone(), squares, centres, offsets)

    def means(self) -> Tensor:
        """The means of the columns, (m, k) in float64."""
        return self.offsets.movedim(1, 0).flatten(1).to(self.row_spread.dtype) + self.centres

    def widened(self) -> Sums:
        """The same with means in float64."""
        wide = self.row_spread.dtype
        return self._replace(centres=self.centres.to(wide), offsets=self.offsets.to(wide))

    def merged(self, n: Tensor, other: Sums, n_other: Tensor) -> Sums:
        """The sums of these n rows and others (Chan, Golub and LeVeque 1983, the paper's reference 20)."""
        a, b = self, other
        if a.offsets.dtype != b.offsets.dtype:
            a, b = a.widened(), b.widened()
        apart = b.means() - a.means()
        part = n_other / (n + n_other).to(apart.dtype)
        moved = (part * apart).view(len(apart), -1, a.offsets.shape[2]).movedim(1, 0)
        offsets = (a.offsets + moved).to(a.offsets.dtype)
        between = n * part * apart.square()
        between = between.sum(0, keepdim=True) if len(a.column_spread) == 1 else between
        spread = a.column_spread + b.column_spread + between
        return Sums(a.row_spread + b.row_spread, spread, a.centres, offsets)

    def far(self, n: int) -> bool:
        """Whether columns are so far apart, for their variance over n rows, that the means have to be in float64."""
        if self.offsets.dtype == self.row_spread.dtype or n < ROWS_THAT_TELL:
            return False
        spread, squares = self.column_spread.sum(0), self.offsets.square().sum(1).flatten()
        return bool(((spread > 0) & (spread < FAR * n * squares)).any())


def add_rows(x: Tensor, sums: Sums, n: int, in_place: bool = False) -> Sums:
    """The sums of n rows and of rows ``x`` (n, m, k).

    Args:
        x: rows in float32 or float64.
        sums: those of the rows before.
        n: how many these were.
        in_place: whether the sums may be changed.
    """
    if x.dtype == torch.float64 != sums.offsets.dtype:
        sums = sums.widened()
    if kernels.adds(x, *sums):
        sums = sums if in_place else Sums(*(each.clone() for each in sums))
        far = kernels.Adder(x, torch.tensor(n), *sums)(x)
    else:
        sums = _added(x, sums, n)
        far = x.is_cpu and sums.far(n + len(x))  # to look what another device found is to wait for it
    return sums.widened() if far else sums


def _added(x: Tensor, sums: Sums, n: int) -> Sums:
    """See :func:`add_rows`; by PyTorch's operations.

    On other devices in float64: to look whether float32 holds the squares would be to wait for them.
    """
    narrow = sums.offsets.dtype == torch.float32 and x.is_cpu and max(x.shape[:2]) <= LONGEST_FLOAT32_SUM
    dtype = torch.float32 if narrow else sums.row_spread.dtype
    parts, _, width = sums.offsets.shape
    # Laid out part by part, every operation gives a thread what it wrote itself: memory that one core wrote and another
    # reads costs more than the arithmetic.
    values = x.view(*x.shape[:2], parts, width).movedim(2, 0)
    axis = 0 if parts > width else -1
    length = max(1, chunk_length(x) // (width if axis == 0 else parts))
    split = (torch.split(each, length, axis) for each in (values, sums.centres.view(parts, 1, width), sums.offsets))
    added = [
        _added_part(x.to(dtype), centres.to(dtype), offsets.to(dtype), n, sums)
        for x, centres, offsets in zip(*split, strict=True)
    ]
    rows, squares, offsets = (torch.cat(part, axis) for part in zip(*added, strict=True))
    squares = squares.movedim(1, 0).flatten(1)
    return Sums(sums.row_spread + rows.flatten(), sums.column_spread + squares, sums.centres, offsets)


def _added_part(x: Tensor, centres: Tensor, offsets: Tensor, n: int, like: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """What rows (parts, n, m, k) add to the squared deviations, and the new offsets, computed in the type of ``x``.

    Rows are centred on their first value and columns on their means so far, so that what is constant has a spread of
    exactly 0.
    """
    wide, squared = like.row_spread.dtype, len(like.column_spread) == 1
    m, total = x.shape[2], n + x.shape[1]
    deviation = torch.sub(x, x[:, :, :1], out=scratch(x))
    sums = deviation.sum(2)
    squares = torch.mul(deviation, deviation, out=deviation).sum(2)
    of_rows = torch.addcmul(squares, sums, sums, value=-1 / m).clamp_min_(0)  # squares may vanish in float32
    rows = of_rows.sum(1)

    means = offsets + centres
    torch.sub(x, means[:, None], out=deviation)
    columns = deviation.sum(1)
    torch.mul(deviation, deviation, out=deviation)
    squares = deviation.flatten(1, 2).sum(1, keepdim=True) if squared else deviation.sum(1)
    if x.dtype != wide and (_lost(rows, sums) or _lost(squares.sum(1), columns)):
        return _added_part(x.to(wide), centres.to(wide), offsets.to(wide), n, like)
    rows = rows if squared else of_rows.div_(m - 1).sqrt_().sum(1)

    if not x.is_cpu or bool(centres.any()):
        # The type may hold means less well than offsets: then the deviations lack the rest.
        near = means - centres
        rest = (centres - (means - near)).add_(offsets - near)
        columns = columns.add_(n * rest)
        after = (columns / total).sub_(rest).add_(offsets).to(like.offsets.dtype)
        shift = torch.sub(after.to(x.dtype), offsets).add_(rest)
        change = torch.addcmul(torch.mul(shift, total).sub_(columns, alpha=2).mul_(shift), rest, n * rest)
    else:
        after = (columns / total).add_(offsets).to(like.offsets.dtype)
        shift = after - offsets
        change = torch.mul(shift, total).sub_(columns, alpha=2).mul_(shift)
    squares = squares.to(wide) + (change.sum(1, keepdim=True) if squared else change)
    return rows.to(wide), squares, after


def _lost(squares: Tensor, sums: Tensor) -> bool:
    """Whether float32 does not hold squares (parts, k): too large, or too small although some of the sums are not 0."""
    low, high = squares.aminmax()
    if not high <= LARGEST_FLOAT32_SQUARE:  # nor NaN
        return True
    return bool(low < SMALLEST) and bool(((squares < SMALLEST) & (sums != 0).any(1)).any())


def channel_changes(x: Tensor, channels: int, reference: int | None) -> Tensor:
    """Squared deviations from the reference column, or without one from the row mean: float64 sums (m, channels)."""
    n, m, k = x.shape
    x = x if x.is_cpu or x.device.type == "mps" else x.double()
    maps = x.view(n, m, channels, -1)
    step = max(1, chunk_length(x) // (k // channels))
    sums = []
    for start in range(0, channels, step):
        values = maps[:, :, start : start + step]
        # About its first value a constant row is exactly zero, about its mean it may not be.
        origin = values[:, 0 if reference is None else reference, None]
        deviation = torch.sub(values, origin, out=scratch(values.flatten(2)).view(values.shape))
        if reference is None:
            deviation.sub_(deviation.mean(1, keepdim=True))
        sums.append(torch.linalg.vector_norm(deviation, dim=-1).double().square_().sum(0))
    changes = torch.cat(sums, -1)
    if x.dtype == torch.float32 and not SMALLEST_FLOAT32_SQUARE < changes.max() < LARGEST_FLOAT32_SQUARE:
        return channel_changes(x.double(), channels, reference)
    return changes


def chunk_length(x: Tensor) -> int:
    """How much of the last axis holds about :data:`CHUNK` values."""
    return max(1, (CHUNK if x.is_cpu else 16 * CHUNK) // x.shape[:-1].numel())


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of ``x`` along the last axis."""
    return torch.split(x, chunk_length(x), dim=-1)


_buffers = threading.local()


def scratch(like: Tensor) -> Tensor:
    """A buffer for intermediate results, the same memory at every call: fresh pages cost more than the arithmetic.

    Its rows lie a little further apart than they are long. Feature maps are often a power of two long, and a sum over
    rows that are a power of two apart would read them all through the same few lines of the cache.

    Args:
        like: the buffer has its shape and type.
    """
    if not like.is_cpu:  # whose allocator keeps its memory
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    *rows, length = like.shape
    apart = length + PADDING
    needed = math.prod(rows) * apart
    buffers: dict[Any, Tensor] = _buffers.__dict__
    if like.dtype not in buffers or buffers[like.dtype].numel() < needed:
        with torch.inference_mode(False):  # a buffer made in inference mode could be used only there
            buffers[like.dtype] = torch.empty(needed, dtype=like.dtype)
    return buffers[like.dtype][:needed].view(*rows, apart)[..., :length]
