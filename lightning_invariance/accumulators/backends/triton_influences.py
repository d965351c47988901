"""The influence of each sample on a GPU in one kernel, which reads the activation once.

The sums are those of ``csrc/influences.c``. Imported only where Triton is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_invariance.accumulators.backends.c_kernels import ChangesOfSamples, FoundInfluences
from lightning_invariance.accumulators.backends.triton_kernels import MOST_VALUES, masked, tile_of


def add_influences(
    x: Tensor,
    means: Tensor,
    weights: Tensor,
    counts: Tensor,
    squares: Tensor,
    fourths: Tensor,
    of_changes: ChangesOfSamples | None = None,
) -> FoundInfluences:
    """Add what samples change in values that are made of squared deviations, in place.

    Args:
        x: rows ``(n, m, k)`` that :func:`~lightning_invariance.accumulators.backends.triton_kernels.takes` is true of.
        means: as those that follow, see :func:`~lightning_invariance.accumulators.backends.c_kernels.add_influences`.
        weights: of squared deviations.
        counts: which activations count.
        squares: of influences.
        fourths: fourth powers of influences.
        of_changes: what changes are also wanted.
    """
    x, (n, m, k) = x.contiguous(), x.shape
    columns, width, warps, _ = tile_of(m, k, k, with_changes=False)
    programs = triton.cdiv(k, width)
    on_sum = means.new_empty(n, programs)
    nothing = means.new_empty(0)
    changes, spreads = nothing, nothing
    factors, reference = (nothing, 0) if of_changes is None else of_changes
    if of_changes is not None:
        changes, spreads = means.new_empty(n, m, programs), means.new_empty(n, k)
    most = max(1, MOST_VALUES // (m * k))
    with torch.cuda.device_of(x):
        for start in range(0, n, most):
            some = slice(start, start + most)
            rows = x[some]
            _influences[(programs,)](
                *(rows, means.contiguous(), weights.contiguous(), counts.contiguous(), factors, squares, fourths),
                *(on_sum[some], changes[some], spreads[some], len(rows), m, k, reference),
                CHANGES=of_changes is not None,
                FULL=m == columns,
                COLUMNS=columns,
                WIDTH=width,
                num_warps=warps,
            )
    of_samples = changes.sum(2, dtype=torch.float64) if of_changes is not None else changes
    return FoundInfluences(on_sum.sum(1, dtype=torch.float64), of_samples, spreads)


@triton.jit(do_not_specialize=["n", "m", "k", "reference"])
def _influences(
    x,
    means,
    weights,
    counts,
    factors,
    squares,
    fourths,
    on_sum,
    changes,
    spreads,
    n,
    m,
    k,
    reference,
    CHANGES: tl.constexpr,
    FULL: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Those of a tile. ``on_sum`` is ``(n, programs)``, ``changes`` ``(n, m, programs)``, ``spreads`` ``(n, k)``."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    unit = program * WIDTH + tl.arange(0, WIDTH)
    inside = unit < k
    column = tl.arange(0, COLUMNS)
    mask = inside[None, :] & tl.full([COLUMNS, 1], 1, tl.int1)
    if not FULL:
        mask &= (column < m)[:, None]
    at = column[:, None] * k + unit[None, :]
    mean = tl.load(means + at, mask, 0.0)
    of_rows = tl.load(weights + unit, inside, 0.0)
    of_columns = tl.load(weights + k + unit, inside, 0.0)
    expected = tl.load(weights + 2 * k + unit, inside, 0.0)
    counted = tl.load(counts + unit, inside, 0) != 0
    if CHANGES:
        factor = tl.load(factors + unit, inside, 0.0)
    of_squares = tl.zeros([WIDTH], tl.float64)
    of_fourths = tl.zeros([WIDTH], tl.float64)
    for i in range(0, n):
        row = x + i * (m * k)
        value = tl.load(row + at, mask, 0.0).to(tl.float32)
        first = tl.load(row + reference * k + unit, inside, 0.0).to(tl.float32)
        a = masked(value - first[None, :], mask, FULL)
        d = masked(value - mean, mask, FULL)
        centred = masked(a - (tl.sum(a, 0) / m)[None, :], mask, FULL)
        column_spread = tl.sum(d * d, 0)
        influence = of_rows * tl.sum(centred * centred, 0) + of_columns * column_spread - expected
        influence = tl.where(counted, influence, 0.0)
        square = influence.to(tl.float64) * influence
        of_squares += square
        of_fourths += square * square
        tl.store(on_sum + i * programs + program, tl.sum(influence, 0))
        if CHANGES:
            tl.store(spreads + i * k + unit, column_spread, inside)
            changed = tl.sum(factor[None, :] * a * a, 1)
            tl.store(changes + (i * m + column) * programs + program, changed, column < m)
    tl.store(squares + unit, tl.load(squares + unit, inside, 0.0) + of_squares, inside)
    tl.store(fourths + unit, tl.load(fourths + unit, inside, 0.0) + of_fourths, inside)
