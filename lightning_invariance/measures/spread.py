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

#: Without the kernels shorter rows (transformations × activations) are summed as fast in the exact way.
SMALLEST_PLAIN_ROW = 2**14

#: A spread of columns below this part of all squares drowns in the rounding of float32.
CLEAR_OF_ROUNDING = 1e-2


class PlainSums(NamedTuple):
    """Sums of the deviations of rows ``x`` (n, m, k) from one centre for each activation. They add up over blocks.

    They lie in parts of ``width`` activations, all columns of a part together, as the kernels read them.

    Attributes:
        rows: () n.
        centres: (k / width, 1, width) in float32.
        moments: (k / width, 2, width) squared deviations from the row means, and squared deviations.
        columns: (k / width, m, width) deviations of each column; much the largest, they are sums of float32 numbers and
            stay float32.
    """

    rows: Tensor
    centres: Tensor
    moments: Tensor
    columns: Tensor

    @classmethod
    def empty(cls, x: Tensor) -> PlainSums:
        """The sums before the first of rows like these, about its first value."""
        _, m, k = x.shape
        width = _width(k)
        return cls(
            torch.tensor(0, device=x.device),
            x[0, 0].view(-1, 1, width).clone(),
            torch.zeros(k // width, 2, width, dtype=torch.float64, device=x.device),
            torch.zeros(k // width, m, width, device=x.device),
        )

    @classmethod
    def of(cls, rows: Tensor, centres: Tensor, moments: Tensor, columns: Tensor) -> PlainSums:
        """From (1, k), (2, k) and (m, k)."""
        width = _width(columns.shape[1])
        parts = (each.view(len(each), -1, width).movedim(0, 1) for each in (centres, moments, columns))
        return cls(rows, *(part.clone(memory_format=torch.contiguous_format) for part in parts))

    def row_spread(self) -> Tensor:
        """Squared deviations from the row means, (k,)."""
        return self.moments[:, 0].flatten()

    def column_spread(self) -> Tensor:
        """Squared deviations from the column means, (k,)."""
        columns = self.columns.to(self.moments.dtype).square_().sum(1)
        return (self.moments[:, 1] - columns / self.rows).clamp_min_(0).flatten()

    def column_means(self) -> Tensor:
        """The mean of each column, (m, k) in float64."""
        means = (self.columns.to(self.moments.dtype) / self.rows).add_(self.centres)
        return means.movedim(1, 0).flatten(1)

    def about(self, centres: Tensor) -> PlainSums:
        """The sums about other centres."""
        shift = self.centres.to(self.moments.dtype) - centres  # by which each of the n·m deviations grows
        spread, squares = torch.split(self.moments, 1, dim=1)
        all_shifts = self.rows * self.columns.shape[1] * shift
        squares = squares + shift * (2 * self.columns.sum(1, keepdim=True, dtype=shift.dtype) + all_shifts)
        columns = self.columns + (self.rows * shift).to(self.columns.dtype)
        return PlainSums(self.rows, centres, torch.cat([spread, squares], 1), columns)

    def about_means(self) -> PlainSums:
        """The sums about the means. A constant activation stays exactly at its centre."""
        deviations = self.columns.mean(1, keepdim=True, dtype=self.moments.dtype) / self.rows
        return self.about((self.centres + deviations).to(self.centres.dtype))

    def clear(self) -> bool:
        """Whether the spread of the columns is clear of float32's rounding, for every activation."""
        squares, columns = self.moments[:, 1], self.columns.square().sum(1)
        spread = squares - columns / self.rows  # enough to tell
        return bool(((spread >= CLEAR_OF_ROUNDING * squares) & ((squares >= SMALLEST) | (columns == 0))).all())


def _width(k: int) -> int:
    return kernels.WIDTH if k % kernels.WIDTH == 0 else k


class ExactSums(NamedTuple):
    """Sums of rows ``x`` (n, m, k) about a reference for each activation and column.

    Attributes:
        row_spread: (k,) squared deviations from the row means, or the sum of the rows' standard deviations.
        squares: (1, k) squared deviations from the references, summed over the columns, or (m, k) for each of them.
        sums: (m, k) deviations from the references.
    """

    row_spread: Tensor
    squares: Tensor
    sums: Tensor


def holds_plain(x: Tensor) -> bool:
    """Whether the sums of rows (n, m, k) about one centre may be taken in float32, and are worth it.

    Only on the CPU: they have to be looked at after each block, and to look at what another device found is to wait.
    """
    n, m, k = x.shape
    if not x.is_cpu:
        return False
    worth_it = kernels.takes(x) or m * k >= SMALLEST_PLAIN_ROW
    return x.dtype == torch.float32 and n * m <= LONGEST_FLOAT32_SUM and worth_it


def add_plain(x: Tensor, sums: PlainSums) -> bool | None:
    """Add rows of which :func:`holds_plain` is true to sums in place, and say whether all are clear.

    Rows are centred on their first value, so that constant rows have a spread of exactly 0. None where float32 does not
    hold squares of these rows: they are not added.
    """
    if kernels.takes(x):
        return kernels.Adder(x, *sums)(x)
    block = _plain_block(x, sums.centres.flatten())
    if block is None:
        return None
    for mine, new in zip(sums[2:], block, strict=True):
        mine.movedim(1, 0).add_(new.reshape(len(new), len(mine), -1))
    sums.rows.add_(len(x))
    return sums.clear()


def _plain_block(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor] | None:
    """Moments and columns of one block, by PyTorch's operations, with every value read once.

    They lie in buffers that the next call uses again, with the activations in shares: (2, shares, k / shares) and
    (m, shares, k / shares). The deviations are laid out share by share, one for each thread, so that every operation
    gives a thread what it wrote itself: memory that one core wrote and another reads costs more than the arithmetic.
    """
    _, m, k = x.shape
    shares = math.gcd(k, torch.get_num_threads())
    values = x.view(*x.shape[:2], shares, -1).movedim(2, 0)
    centres = centres.view(shares, 1, -1)
    moments = scratch(values[:, 0, :1].expand(-1, 2, -1), "moments")
    columns = scratch(values[:, 0], "columns")
    length = max(1, chunk_length(x) // shares)
    for start in range(0, k // shares, length):
        part = slice(start, start + length)
        deviation = torch.sub(values[..., part], values[:, :, :1, part], out=scratch(values[..., part]))
        first = values[:, :, 0, part] - centres[..., part]
        rows = deviation.sum(2)
        torch.sum(deviation, 1, out=columns[..., part]).add_(first.sum(1, keepdim=True))
        squares = torch.mul(deviation, deviation, out=deviation).sum(2)
        spread, all_squares = moments[..., part].unbind(1)
        torch.sum((squares - rows * rows / m).clamp_min_(0), 1, out=spread)
        torch.sum(torch.addcmul(squares, first, 2 * rows + m * first), 1, out=all_squares)
        if _lost(spread, rows) or _lost(all_squares, first) or not bool(all_squares.amax() <= LARGEST_FLOAT32_SQUARE):
            return None
    return moments.movedim(0, 1), columns.movedim(0, 1)


def _lost(squares: Tensor, values: Tensor) -> bool:
    """Whether sums of squares (shares, k) are so small that some of their values (shares, n, k) have been lost."""
    return bool(squares.amin() < SMALLEST) and bool(((squares < SMALLEST) & (values != 0).any(1)).any())


def exact_sums(x: Tensor, references: Tensor, squared: bool) -> ExactSums:
    """The sums with rows centred on their first value and columns on their references.

    So they are exactly zero where a row, or a column at its reference, is constant. Where float32 does not hold the
    squares they are taken in float64, and on other devices always: to look at the sums would be to wait for them.
    """
    n, m, _ = x.shape
    if x.dtype == torch.float32 and (
        not x.is_cpu
        or x.numel() <= SMALLEST_PLAIN_ROW  # float64 costs less than to look whether float32 will do
        or max(n, m) > LONGEST_FLOAT32_SUM
        or not torch.equal(references.float().to(references.dtype), references)
    ):
        x = x.to(references.dtype)
    references = references.to(x.dtype)
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    parts, lost = [], False
    for values, reference in zip(chunks(x), torch.split(references, chunk_length(x), dim=-1), strict=True):
        deviation = torch.sub(values, values[:, :1], out=scratch(values))
        row_sums = deviation.sum(1)
        row_squares = torch.mul(deviation, deviation, out=deviation).sum(1)
        rows = (row_squares.to(dtype) - row_sums.to(dtype).square() / m).clamp_min_(0)
        rows = (rows if squared else rows.div_(m - 1).sqrt_()).sum(0)

        torch.sub(values, reference, out=deviation)
        sums = deviation.sum(0)
        torch.mul(deviation, deviation, out=deviation)
        squares = deviation.view(n * m, -1).sum(0, keepdim=True) if squared else deviation.sum(0)
        lost = lost or lost_in_float32(row_squares, row_sums) or lost_in_float32(squares, sums)
        parts.append((rows, squares.to(dtype), sums.to(dtype)))
    if lost and dtype == torch.float64:
        return exact_sums(x.double(), references, squared)
    return ExactSums(*(torch.cat(p, -1) for p in zip(*parts, strict=True)))


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
    return max(1, CHUNK // x.shape[:-1].numel())


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
