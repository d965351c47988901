"""Sums of squared deviations on a GPU in one kernel, which reads the activation once.

Imported only where Triton is there, which comes with PyTorch for CUDA and ROCm. The formulas are derived in
``csrc/deviations.c``, whose letters are used here: M is a column's mean rounded to float32, r its rounding
error, D and Q the sums of deviations from M and of their squares.

A program takes a tile of neighbouring activations through all rows and columns of a block. Offsets and squares are in
float32; what a block adds, and the means, in float64. A tile whose squares float32 does not hold is summed anew in
float64 by the same program, so that nobody has to read a flag, which would synchronise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_invariance.accumulators.backends.triton_float64 import (
    changes_in_float64,
    columns_in_float64,
    rows_in_float64,
)
from lightning_invariance.accumulators.rows import TYPES

#: The most values of a tile that a thread holds: they fit into its registers with four numbers for each. Fewer where
#: some columns or activations of a tile are masked, or rows are longest, which takes registers too.
VALUES_OF_THREAD = 16
VALUES_OF_MASKED = 8

#: The most values of a tile, if it has no more than the fewest activations.
MOST_OF_TILE = 2048

#: Activations of a tile: threads read neighbours together. Small layers have narrow tiles, so that there are at least
#: so many programs: a GPU runs hundreds at a time. Channels with few positions share tiles.
MOST_WIDTH = 32
FEWEST_WIDTH = 16
FEWEST_PROGRAMS = 512
FEWEST_POSITIONS = 32

#: The most columns that a tile holds.
MOST_COLUMNS = 256

#: Rows that are summed in float32 before they are added in float64, and the most of a launch.
ROWS = tl.constexpr(16)
MOST_ROWS = 256

#: Values of a launch, whose places are counted in 32 bits: those in 64 would take twice the registers.
MOST_VALUES = 2**31 - 1


def takes(x: Tensor) -> bool:
    """Whether the kernel takes rows ``x`` (n, m, k)."""
    return x.dtype in TYPES - {torch.float64} and x.shape[1] <= MOST_COLUMNS and x[0].numel() <= MOST_VALUES


def add_deviations(
    x: Tensor,
    before: int,
    row_spread: Tensor,
    column_spread: Tensor,
    centres: Tensor,
    offsets: Tensor,
    range_of_squares: tuple[float, float],
    changes: Tensor | None = None,
    reference: int | None = None,
    inner: int = 1,
) -> None:
    """Add rows to the squared deviations and column means of those before, in place.

    As :func:`~lightning_invariance.accumulators.backends.c_kernels.add_deviations`, for rows ``(n, m, k)`` that
    :func:`takes` is true of, and offsets ``(1, m, k)``; all sums are float64. Outside of ``range_of_squares`` float32
    may have lost digits of a sum of squares, or overflow.
    """
    x, (n, m, k) = x.contiguous(), x.shape
    columns, width, warps, positions = tile_of(m, k, inner, changes is not None)
    tiles, groups = triton.cdiv(positions, width), k // positions
    parts = row_spread  # a pointer that is not used
    if changes is not None:
        parts = row_spread.new_empty(m, groups * tiles if positions == inner else k)
    most = min(MOST_ROWS, MOST_VALUES // (m * k))
    with torch.cuda.device_of(x):
        for start in range(0, n, most):
            rows = x[start : start + most]
            _add_rows[(groups * tiles,)](
                *(rows, row_spread, column_spread, centres, offsets, parts),
                *(len(rows), m, k, before + start, positions, tiles, 0 if reference is None else reference),
                *range_of_squares,
                CHANGES=changes is not None,
                CENTRED=changes is not None and reference is None,
                POOLED=positions == inner,
                FULL=m == columns,
                COLUMNS=columns,
                WIDTH=width,
                num_warps=warps,
            )
            if changes is not None:
                channels = changes.shape[1]
                _add_changes[(m, triton.cdiv(channels, 16))](
                    *(changes, parts, k // (channels * inner), channels, tiles if positions == inner else inner),
                    0.5 if reference is not None else m / max(m - 1, 1),
                )


def tile_of(m: int, k: int, inner: int, with_changes: bool) -> tuple[int, int, int, int]:
    """Columns, width and warps of a tile, and how many neighbours are cut into tiles of their own.

    Neighbours are the positions of a channel, if it has enough, so that a tile adds up what its channel changes; else
    all activations.
    """
    positions = inner if with_changes and inner >= FEWEST_POSITIONS else k
    columns = max(2, triton.next_power_of_2(m))
    narrow = min(MOST_OF_TILE // columns, triton.next_power_of_2(max(1, k // FEWEST_PROGRAMS)))
    width = max(FEWEST_WIDTH, min(MOST_WIDTH, narrow, triton.next_power_of_2(positions)))
    plain = columns == m and columns * width <= MOST_OF_TILE and (positions == inner or not with_changes)
    values = min(columns, VALUES_OF_THREAD if plain else VALUES_OF_MASKED)
    return columns, width, max(1, columns * width // (32 * values)), positions


# Integers are not specialised: a length that is known to divide by 16 would give a thread four neighbours, and a row
# of the tile to several warps, whose sums over columns would then go through shared memory.
@triton.jit(do_not_specialize=["n", "m", "k", "before", "positions", "tiles", "reference"])
def _add_rows(
    x,
    row_spread,
    column_spread,
    centres,
    offsets,
    parts,
    n,
    m,
    k,
    before,
    positions,
    tiles,
    reference,
    smallest,
    largest,
    CHANGES: tl.constexpr,
    CENTRED: tl.constexpr,
    POOLED: tl.constexpr,
    FULL: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sums of a tile. ``parts`` is ``(m, programs)`` if ``POOLED``, else ``(m, k)``."""
    program = tl.program_id(0)
    position = program % tiles * WIDTH + tl.arange(0, WIDTH)
    inside = position < positions
    unit = program // tiles * positions + position
    column = tl.arange(0, COLUMNS)
    mask = inside[None, :] & tl.full([COLUMNS, 1], 1, tl.int1)
    if not FULL:
        mask &= (column < m)[:, None]
    at = column[:, None] * k + unit[None, :]

    centre = tl.load(centres + unit, inside, 0.0)
    mean = masked(centre[None, :] + tl.load(offsets + at, mask, 0.0), mask, FULL).to(tl.float32)
    sums = tl.zeros([COLUMNS, WIDTH], tl.float32)
    changed = tl.zeros([COLUMNS, WIDTH], tl.float32)
    rows = tl.zeros([WIDTH], tl.float64)
    squares = tl.zeros([WIDTH], tl.float64)
    largest_a = tl.zeros([WIDTH], tl.float32)
    largest_d = tl.zeros([WIDTH], tl.float32)
    place = at
    place_of_first = reference * k + unit
    # A row is read while the one before is added, since a program would wait for the memory otherwise.
    value = tl.load(x + place, mask, 0.0)
    first = tl.load(x + place_of_first, inside, 0.0)
    row = 1
    for start in range(0, n, ROWS):
        some_rows = tl.zeros([WIDTH], tl.float32)
        some_squares = tl.zeros([WIDTH], tl.float32)
        for _ in range(start, tl.minimum(start + ROWS, n)):
            step = tl.where(row < n, m * k, 0)  # the last row is read twice
            row += 1
            place += step
            place_of_first += step
            next_value = tl.load(x + place, mask, 0.0)
            next_first = tl.load(x + place_of_first, inside, 0.0)
            a = masked(value.to(tl.float32) - first.to(tl.float32)[None, :], mask, FULL)
            d = value.to(tl.float32) - mean
            value = next_value
            first = next_first
            of_row = tl.sum(a, 0)
            largest_a = tl.maximum(largest_a, tl.max(tl.abs(a), 0))
            centred = masked(a - (of_row / m)[None, :], mask, FULL)
            some_rows += tl.sum(centred * centred, 0)
            if CENTRED:
                a = centred
            if CHANGES:
                changed += a * a
            sums += d
            some_squares += tl.sum(d * d, 0)
            largest_d = tl.maximum(largest_d, tl.max(tl.abs(d), 0))
        rows += some_rows.to(tl.float64)
        squares += some_squares.to(tl.float64)

    held = (rows <= largest) & (squares <= largest)  # false for NaN
    lost = ((largest_a > 0) & (rows < smallest)) | ((largest_d > 0) & (squares < smallest))
    total = (before + n).to(tl.float32)
    if tl.max((lost | (held == 0)).to(tl.int32), 0) == 0:
        if CHANGES:
            if POOLED:
                tl.store(parts + column * tl.num_programs(0) + program, tl.sum(changed, 1).to(tl.float64), column < m)
            else:
                tl.store(parts + at, changed.to(tl.float64), mask)
        offset = tl.load(offsets + at, mask, 0.0)
        rounding = (centre[None, :] + offset - mean).to(tl.float32)
        deviation = sums + before * rounding
        moved = offset + (deviation / total - rounding)
        tl.store(offsets + at, moved, mask)
        shift = (moved - offset).to(tl.float32) + rounding
        moving = before * rounding * rounding + shift * (total * shift - 2 * deviation)
        squares += tl.sum(masked(moving, mask, FULL), 0)
    else:
        rows = rows_in_float64(x, n, m, k, reference, unit, inside, WIDTH)
        squares = columns_in_float64(x, offsets, n, m, k, before, centre, unit, inside, WIDTH)
        if CHANGES:
            for t in range(0, m):
                of_column = changes_in_float64(x, n, m, k, reference, unit, t, inside, CENTRED, WIDTH)
                if POOLED:
                    tl.store(parts + t * tl.num_programs(0) + program, tl.sum(of_column, 0))
                else:
                    tl.store(parts + t * k + unit, of_column, inside)
    tl.store(row_spread + unit, tl.load(row_spread + unit, inside, 0.0) + rows, inside)
    tl.store(column_spread + unit, tl.load(column_spread + unit, inside, 0.0) + squares, inside)


@triton.jit
def masked(values, mask, FULL: tl.constexpr):
    """Values with 0 where a tile has more columns than the block."""
    return values if FULL else tl.where(mask, values, 0.0)


@triton.jit(do_not_specialize=["outer", "channels", "rest"])
def _add_changes(changes, parts, outer, channels, rest, factor):
    """Add ``factor`` times the sum of ``parts`` (m, outer, channels, rest) to ``changes`` (m, channels)."""
    t = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * 16 + tl.arange(0, 16)
    inside = channel < channels
    total = tl.zeros([16], tl.float64)
    for o in range(0, outer):
        row = ((t * outer + o) * channels + channel) * rest
        for start in range(0, rest, 32):
            place = start + tl.arange(0, 32)
            mask = inside[:, None] & (place < rest)[None, :]
            total += tl.sum(tl.load(parts + row[:, None] + place[None, :], mask, 0.0), 1)
    at = changes + t * channels + channel
    tl.store(at, tl.load(at, inside, 0.0) + factor * total, inside)
