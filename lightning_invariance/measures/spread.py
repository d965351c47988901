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

#: Sums of squares above this may make other sums leave float32, which ends at 3e38.
LARGEST_FLOAT32_SQUARE = 1e30

#: Without the kernels fewer values than this are summed as fast in float64.
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
        offsets: (k / width, m, width), in parts of ``width`` activations as the kernels read them.
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
        narrow = x.dtype == torch.float32 and x.is_cpu and (kernels.takes(x) or m * k >= FEWEST_FLOAT32_VALUES)
        first = x[0].to(torch.float32 if narrow else wide)
        low, high = first.amin(0), first.amax(0)
        # Close columns differ exactly from a centre, which is 0 for the others.
        close = high - low <= CLOSE * first[0].abs()
        centres = torch.where(close, first[0], 0)
        squares = torch.zeros(1 if squared else m, k, dtype=wide, device=x.device)
        return cls(squares[0].clone(), squares, centres, _in_parts(first - centres))

    def means(self) -> Tensor:
        """The means of the columns, (m, k) in float64."""
        return _in_columns(self.offsets, self.row_spread.dtype) + self.centres

    def widened(self) -> Sums:
        """The same with means in float64."""
        wide = self.row_spread.dtype
        return self._replace(centres=self.centres.to(wide), offsets=self.offsets.to(wide))

    def with_offsets(self, offsets: Tensor) -> Sums:
        """The same with these offsets (m, k)."""
        return self._replace(offsets=_in_parts(offsets.to(self.offsets.dtype)))

    def merged(self, n: Tensor, other: Sums, n_other: Tensor) -> Sums:
        """The sums of these n rows and others (Chan, Golub and LeVeque 1983, the paper's reference 20)."""
        a, b = self, other
        if a.offsets.dtype != b.offsets.dtype:
            a, b = a.widened(), b.widened()
        apart = b.means() - a.means()
        part = n_other / (n + n_other).to(apart.dtype)
        sums = a.with_offsets(_in_columns(a.offsets, apart.dtype) + part * apart)
        between = n * part * apart.square()
        between = between.sum(0, keepdim=True) if len(a.column_spread) == 1 else between
        spread = a.column_spread + b.column_spread + between
        return sums._replace(row_spread=a.row_spread + b.row_spread, column_spread=spread)

    def far(self, n: Tensor) -> bool:
        """Whether columns are so far apart, for their variance over n rows, that the means have to be in float64."""
        if self.offsets.dtype == self.row_spread.dtype or n < ROWS_THAT_TELL:
            return False
        spread, squares = self.column_spread.sum(0), self.offsets.square().sum(1).flatten()
        return bool(((spread > 0) & (spread < FAR * n * squares)).any())


def _in_parts(columns: Tensor) -> Tensor:
    """(m, k) as (k / width, m, width)."""
    m, k = columns.shape
    width = kernels.WIDTH if k % kernels.WIDTH == 0 else k
    return columns.view(m, -1, width).movedim(1, 0).contiguous()


def _in_columns(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """(k / width, m, width) as (m, k)."""
    return parts.to(dtype).movedim(1, 0).flatten(1)


def add_rows(x: Tensor, sums: Sums, n: Tensor, in_place: bool = False) -> Sums:
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
        far = kernels.Adder(x, *sums)(x, n)
    else:
        sums = _added(x, sums, n)
        far = x.is_cpu and sums.far(n + len(x))  # to look what another device found is to wait for it
    return sums.widened() if far else sums


def _added(x: Tensor, sums: Sums, n: Tensor) -> Sums:
    squared, before, total = len(sums.column_spread) == 1, sums.means(), n + len(x)
    means = before.to(sums.offsets.dtype)
    rest = before - means  # of those that float32 holds less well than their offsets
    rows, squares, columns = _deviations(x, means, squared, before.dtype)
    columns += n * rest
    offsets = _in_columns(sums.offsets, before.dtype)
    after = sums.with_offsets(offsets + (columns / total - rest))
    shift = _in_columns(after.offsets, before.dtype) - offsets + rest
    change = n * rest.square() + shift * (total * shift - 2 * columns)
    spread = sums.column_spread + squares + (change.sum(0, keepdim=True) if squared else change)
    return after._replace(row_spread=sums.row_spread + rows, column_spread=spread)


def _deviations(x: Tensor, means: Tensor, squared: bool, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Spread of the rows (k,), and about means (m, k) squared deviations (1, k) or (m, k) and deviations (m, k).

    Rows are centred on their first value, so that constant rows have a spread of exactly 0. Where float32 does not hold
    the squares they are taken in float64, and on other devices always: to look at the sums would be to wait for them.
    """
    n, m, _ = x.shape
    narrow = means.dtype == torch.float32 and x.is_cpu and max(n, m) <= LONGEST_FLOAT32_SUM
    dtype = torch.float32 if narrow else wide
    parts = [
        _deviations_of(values.to(dtype), centres.to(dtype), squared, wide)
        for values, centres in zip(chunks(x), torch.split(means, chunk_length(x), dim=-1), strict=True)
    ]
    rows, squares, columns = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return rows, squares, columns


def _deviations_of(x: Tensor, means: Tensor, squared: bool, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same of few values, in the type that they have if that holds the squares."""
    n, m, _ = x.shape
    deviation = torch.sub(x, x[:, :1], out=scratch(x))
    row_sums = deviation.sum(1)
    row_squares = torch.mul(deviation, deviation, out=deviation).sum(1)
    rows = (row_squares.to(wide) - row_sums.to(wide).square() / m).clamp_min_(0)
    rows = (rows if squared else rows.div_(m - 1).sqrt_()).sum(0)

    torch.sub(x, means, out=deviation)
    columns = deviation.sum(0)
    torch.mul(deviation, deviation, out=deviation)
    squares = deviation.view(n * m, -1).sum(0, keepdim=True) if squared else deviation.sum(0)
    if x.is_cpu and (lost_in_float32(row_squares, row_sums) or lost_in_float32(squares, columns)):
        return _deviations_of(x.to(wide), means.to(wide), squared, wide)
    return rows, squares.to(wide), columns.to(wide)


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


def lost_in_float32(squares: Tensor, sums: Tensor) -> bool:
    """Whether squares left the range of float32: too large, or too small although the sums are not zero."""
    if squares.dtype != torch.float32:
        return False
    if not squares.sum() < LARGEST_FLOAT32_SQUARE:  # nor NaN
        return True
    if squares.min() >= SMALLEST_FLOAT32_SQUARE:
        return False
    small = squares.reshape(-1, squares.shape[-1]).amin(0) < SMALLEST_FLOAT32_SQUARE
    return bool((small & (sums != 0).any(0)).any())


def chunk_length(x: Tensor) -> int:
    """How much of the last axis holds about :data:`CHUNK` values."""
    return max(1, (CHUNK if x.is_cpu else 16 * CHUNK) // x.shape[:-1].numel())


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of ``x`` along the last axis."""
    return torch.split(x, chunk_length(x), dim=-1)


_buffers = threading.local()


def scratch(like: Tensor, use: str = "values") -> Tensor:
    """A buffer for intermediate results, the same memory at every call: fresh pages cost more than the arithmetic.

    Its rows lie a little further apart than they are long. Feature maps are often a power of two long, and a sum over
    rows that are a power of two apart would read them all through the same few lines of the cache.

    Args:
        like: the buffer has its shape and type.
        use: buffers of different uses are different memory.
    """
    if not like.is_cpu:  # whose allocator keeps its memory
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    *rows, length = like.shape
    apart = length + PADDING
    needed = math.prod(rows) * apart
    buffers: dict[Any, Tensor] = _buffers.__dict__
    key = (use, like.dtype)
    if key not in buffers or buffers[key].numel() < needed:
        with torch.inference_mode(False):  # a buffer made in inference mode could be used only there
            buffers[key] = torch.empty(needed, dtype=like.dtype)
    return buffers[key][:needed].view(*rows, apart)[..., :length]
