"""Sums of squared deviations in C, with column means in float32 where these are good enough."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends import c_kernels
from lightning_invariance.accumulators.backends.base import Wanted, channels_of
from lightning_invariance.accumulators.column_means import first_states, narrow, widen
from lightning_invariance.accumulators.rows import Rows, States

#: Layers with fewer values a row than this have float64 means, which cost little there.
FEWEST_FLOAT32_VALUES = 2**11


def add_deviations(states: States, rows: Rows, wanted: Wanted) -> bool:
    """Add rows, if C takes them; see ``base.py``."""
    if rows.values.is_cpu:
        rows.widen()
    x, before = rows.flat, rows.before
    n, m, k = x.shape
    if not wanted.squared or not c_kernels.takes(x) or m > c_kernels.MOST_COLUMNS:
        return False
    may_narrow = m * k >= FEWEST_FLOAT32_VALUES
    begins = not states["centres"].numel()
    enough = c_kernels.LIMITS.rows_for_far  # fewer rows do not tell how far columns are apart
    if begins:
        states.update(_first_states(x, torch.float32 if may_narrow and n >= enough else torch.float64))
    changes = _changes_in(states, rows, wanted)
    far = _add(states, x, before, changes)
    if far and begins:  # the sums have lost digits
        states.update(_first_states(x, torch.float64))
        if changes is not None:
            changes.sums.zero_()
        _add(states, x, before, changes)
    elif far:
        widen(states)
    elif may_narrow and before < enough <= before + n and states["offsets"].dtype == torch.float64:
        narrow(states, before + n)
    return far is not None


def _first_states(x: Tensor, dtype: torch.dtype) -> States:
    _, m, k = x.shape
    first_step = x[: min(c_kernels.MOST_ROWS, c_kernels.MOST_COLUMNS // m)]
    return first_states(first_step, dtype, tiles=k // c_kernels.WIDTH if k % c_kernels.WIDTH == 0 else 1)


def _changes_in(states: States, rows: Rows, wanted: Wanted) -> c_kernels.Changes | None:
    if not wanted.response:
        return None
    channels, inner = channels_of(rows)
    if not states["changes"].numel():
        states["changes"] = torch.zeros(rows.values.shape[1], channels, dtype=torch.float64)
    return c_kernels.Changes(states["changes"], wanted.reference, inner)


def _add(states: States, x: Tensor, before: int, changes: c_kernels.Changes | None) -> bool | None:
    sums = (states["row_spread"], states["column_spread"], states["centres"], states["offsets"])
    return c_kernels.add_deviations(x, before, *sums, changes)
