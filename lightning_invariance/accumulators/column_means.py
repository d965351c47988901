"""The means of the columns of the ST matrix, as states keep them: a centre of each activation, and offsets from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends.c_kernels import LIMITS
from lightning_invariance.accumulators.rows import States

#: Columns have a common centre where the range of the first row is within this fraction of its first value.
CLOSE = 1 / 4


def first_states(x: Tensor, dtype: torch.dtype, columns: int = 1, tiles: int = 1) -> States:
    """States without rows whose means are about the means of the rows that are added first.

    Sums about another value, such as the first row, would lose digits where only this row differs. Constant columns
    have their value for a mean, from which they deviate by exactly 0.

    Args:
        x: the rows that are added first, ``(n, m, k)``.
        dtype: of the means.
        columns: how many sums ``column_spread`` has for each activation, 1 or m.
        tiles: of the offsets.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    first = wide[0].to(dtype)
    if len(x) > 1:
        means = first + (wide - wide[0]).mean(0).to(dtype)
        first = torch.where(means.isfinite(), means, first)
    squares = torch.zeros(columns, first.shape[1], dtype=torch.float64, device=first.device)
    return {"row_spread": squares[0].clone(), "column_spread": squares, **_centred(first, wide.dtype, dtype, tiles)}


def _centred(means: Tensor, of_centres: torch.dtype, dtype: torch.dtype, tiles: int) -> States:
    """Centres, whose values a type holds, and offsets in tiles, for means ``(m, k)``."""
    low, high = means.amin(0), means.amax(0)
    # The differences of close numbers are exact. Columns that are not close have no centre.
    centres = torch.where(high - low <= CLOSE * means[0].abs(), means[0].to(of_centres).to(means.dtype), 0)
    offsets = (means - centres).view(len(means), tiles, -1).movedim(1, 0)
    return {"centres": centres.to(dtype), "offsets": offsets.to(dtype).contiguous()}


def means_of(states: Mapping[str, Tensor]) -> Tensor:
    """The means of the columns, ``(m, k)`` in float64."""
    return _in_one_tile(states["offsets"]).double() + states["centres"]


def differences_of(states: Mapping[str, Tensor]) -> Tensor:
    """The means of the columns up to one number for each activation, ``(m, k)`` in float64: they keep more digits."""
    return _in_one_tile(states["offsets"]).double()


def widen(states: States) -> None:
    """Make the means float64."""
    for name in ("centres", "offsets"):
        states[name] = states[name].double()


def widen_in_one_tile(states: States) -> None:
    """Make the means float64, and the offsets ``(1, m, k)``."""
    states["offsets"] = _in_one_tile(states["offsets"])[None].contiguous()
    widen(states)


def _in_one_tile(offsets: Tensor) -> Tensor:
    return offsets.movedim(1, 0).flatten(1)


def narrow(states: States, n: int) -> None:
    """Make the means float32, where n rows tell that it is not too coarse for their squared deviations."""
    if n < LIMITS.rows_for_far:
        return
    found = _centred(means_of(states), torch.float32, torch.float32, len(states["offsets"]))
    spread, squares = states["column_spread"].sum(0), found["offsets"].double().square().sum(1).flatten()
    if not bool(((spread > 0) & (spread < LIMITS.far * n * squares)).any()):
        states.update(found)
