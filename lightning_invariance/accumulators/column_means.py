"""The means of the columns of the ST matrix, as states keep them: a centre of each activation, and offsets from it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_invariance.accumulators.backends.c_kernels import Limits
from lightning_invariance.accumulators.base import States


def means_of(states: Mapping[str, Tensor]) -> Tensor:
    """The means of the columns, ``(m, k)`` in the type of ``row_spread``."""
    return states["offsets"].movedim(1, 0).flatten(1).to(states["row_spread"].dtype) + states["centres"]


def widen(states: States) -> None:
    """Make the means float64."""
    for name in ("centres", "offsets"):
        states[name] = states[name].to(states["row_spread"].dtype)


def narrow(states: States, limits: Limits, n: int) -> None:
    """Make the means float32, where that is not too coarse for the squared deviations of n rows."""
    if not far_apart(states, limits, n):
        states.update({name: states[name].float() for name in ("centres", "offsets")})


def far_apart(states: States, limits: Limits, n: int) -> bool:
    """Whether float32 offsets are too coarse for the squared deviations of n rows."""
    far = limits.far if n >= limits.rows_for_far else limits.far_of_few
    spread, squares = states["column_spread"].sum(0), states["offsets"].double().square().sum(1).flatten()
    return bool(((spread > 0) & (spread < far * n * squares)).any())
