"""Sums over blocks of rows of the ST matrix, fast and without losing digits."""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

#: A spread of columns below this part of the spread of rows drowns in the rounding of float32.
CLEAR_OF_ROUNDING = 1e-4


class PlainSums(NamedTuple):
    """Sums of rows ``x`` (n, m, k) about one centre for each activation, with rows centred on their first values.

    Attributes:
        row_spread: (k,) squared deviations from the row means.
        squares: (k,) squared deviations from the centres.
        firsts: (k,) sum over rows of the deviation of the first column from the centre.
        sums: (m, k) sum over rows of the deviation of each column from the first.
    """

    row_spread: Tensor
    squares: Tensor
    firsts: Tensor
    sums: Tensor


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


def plain_sums(x: Tensor, centres: Tensor) -> PlainSums | None:
    """The sums in float32 with every value read once; None where that loses digits that :func:`exact_sums` keeps.

    Digits are lost where columns hardly vary from row to row against the spread of rows, constant columns above all:
    their spread would be the rounding of the sums.
    """
    n, m, _ = x.shape
    if x.dtype != torch.float32 or n < 2 or max(n, m) > LONGEST_FLOAT32_SUM:
        return None
    parts = [_plain_sums(values) for values in chunks(x)]
    joined = parts[0] if len(parts) == 1 else (torch.cat(p, -1) for p in zip(*parts, strict=True))
    rows, squares, sums, column_excess = joined
    if lost_in_float32(squares, rows):
        return None
    # Of the deviations of the first column from its first value, in float32, and then about the centres.
    first = x[:, 0] - x[0, 0]
    mixed = torch.add(rows, first, alpha=m / 2).mul_(first).sum(0)
    firsts, total, row_excess = first.sum(0).double(), rows.sum(0).double(), rows.square_().sum(0)
    if lost_in_float32(torch.add(squares, mixed, alpha=2), first):
        return None
    squares = squares.double()
    about_first = torch.add(squares, mixed, alpha=2)
    # What is left after the column means: a difference that may be nothing but rounding.
    column_spread = torch.add(total, firsts, alpha=m / 2).mul_(firsts).mul_(2).add_(column_excess).div_(-n)
    if bool((column_spread.add_(about_first) < CLEAR_OF_ROUNDING * squares).any()):
        return None
    row_spread = squares.sub_(row_excess, alpha=1 / m).clamp_min_(0)
    shift = x[0, 0].double().sub_(centres)
    about_centre = about_first.add_(shift * (2 * (total + m * firsts) + n * m * shift))
    return PlainSums(row_spread, about_centre, firsts.add_(shift, alpha=n), sums)


def _plain_sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the deviations from the first column: row sums, sum of squares, column sums, and sum of their squares."""
    deviation = torch.sub(x, x[:, :1], out=scratch(x))
    rows, columns = deviation.sum(1), deviation.sum(0)
    torch.mul(deviation, deviation, out=deviation)
    return rows, deviation.view(-1, x.shape[-1]).sum(0), columns, columns.square().sum(0)


def exact_sums(x: Tensor, references: Tensor, squared: bool) -> ExactSums:
    """The sums with rows centred on their first value and columns on their references.

    So they are exactly zero where a row, or a column at its reference, is constant. Where float32 does not hold the
    squares they are taken in float64.
    """
    n, m, _ = x.shape
    if x.dtype == torch.float32 and (
        max(n, m) > LONGEST_FLOAT32_SUM or not torch.equal(references.float().to(references.dtype), references)
    ):
        x = x.double()
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
    if lost:
        return exact_sums(x.double(), references, squared)
    return ExactSums(*(torch.cat(p, -1) for p in zip(*parts, strict=True)))


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


def scratch(like: Tensor) -> Tensor:
    """A buffer for intermediate results, the same memory at every call: fresh pages cost more than the arithmetic.

    Its rows lie a little further apart than they are long. Feature maps are often a power of two long, and a sum over
    rows that are a power of two apart would read them all through the same few lines of the cache.
    """
    if like.device.type != "cpu":  # whose allocator keeps its memory
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    *rows, length = like.shape
    apart = length + PADDING
    needed = math.prod(rows) * apart
    buffers: dict[Any, Tensor] = _buffers.__dict__
    if like.dtype not in buffers or buffers[like.dtype].numel() < needed:
        with torch.inference_mode(False):  # a buffer made in inference mode could be used only there
            buffers[like.dtype] = torch.empty(needed, dtype=like.dtype)
    return buffers[like.dtype][:needed].view(*rows, apart)[..., :length]
