"""Sums of a tile in float64, which programs of triton_kernels.py take where float32 does not hold its squares.

Columns are read one after another, which takes longer than the sums in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns_in_float64(x, offsets, n, m, k, before, centre, unit, inside, WIDTH: tl.constexpr):
    """What squared deviations from the means of columns grow by; moves the means."""
    squares = tl.zeros([WIDTH], tl.float64)
    for t in range(0, m):
        here = t * k + unit
        offset = tl.load(offsets + here, inside, 0.0)
        added = tl.zeros([WIDTH], tl.float64)
        for i in range(0, n):
            d = tl.load(x + i * (m * k) + here, inside, 0.0).to(tl.float64) - (centre + offset)
            added += d
            squares += d * d
        moved = offset + added / (before + n)
        tl.store(offsets + here, moved, inside)
        shift = moved - offset
        squares += shift * ((before + n) * shift - 2 * added)
    return squares


@triton.jit
def rows_in_float64(x, n, m, k, reference, unit, inside, WIDTH: tl.constexpr):
    """Squared deviations from the means of rows, summed over rows."""
    rows = tl.zeros([WIDTH], tl.float64)
    for i in range(0, n):
        row = x + i * (m * k) + unit
        first = tl.load(row + reference * k, inside, 0.0).to(tl.float64)
        of_row = tl.zeros([WIDTH], tl.float64)
        of_squares = tl.zeros([WIDTH], tl.float64)
        for t in range(0, m):
            a = tl.load(row + t * k, inside, 0.0).to(tl.float64) - first
            of_row += a
            of_squares += a * a
        rows += of_squares - of_row * of_row / m
    return rows


@triton.jit
def changes_in_float64(x, n, m, k, reference, unit, t, inside, CENTRED: tl.constexpr, WIDTH: tl.constexpr):
    """What one transformation changes, summed over rows."""
    changed = tl.zeros([WIDTH], tl.float64)
    for i in range(0, n):
        row = x + i * (m * k) + unit
        first = tl.load(row + reference * k, inside, 0.0).to(tl.float64)
        a = tl.load(row + t * k, inside, 0.0).to(tl.float64) - first
        if CENTRED:
            of_row = tl.zeros([WIDTH], tl.float64)
            for j in range(0, m):
                of_row += tl.load(row + j * k, inside, 0.0).to(tl.float64) - first
            a -= of_row / m
        changed += a * a
    return changed
