"""Detection of activations that never change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.rows import Rows, States


@dataclass(frozen=True)
class Constant(Accumulator):
    """The first value of each activation, ``first_value`` ``(k,)``, and whether another came, ``varies`` ``(k,)``."""

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"first_value": torch.zeros(0), "varies": torch.zeros(0, dtype=torch.bool)}

    def add(self, states: States, rows: Rows) -> None:
        """Compare rows with the first value."""
        x = rows.flat
        if not rows.before:
            states["first_value"] = x[0, 0].clone()
            states["varies"] = _differ(x, states["first_value"])
        elif not x.is_cpu:  # to select the constant activations, as below, would synchronise
            states["varies"] = states["varies"] | _differ(x, states["first_value"])
        elif (constant := (~states["varies"]).nonzero()[:, 0]).numel():
            states["varies"][constant] = _differ(x.index_select(2, constant), states["first_value"][constant])

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        varies = a["varies"] | b["varies"] | (a["first_value"] != b["first_value"])
        return {"first_value": a["first_value"], "varies": varies}

    def dead(self, states: States) -> Tensor:
        """Which activations never changed, over all samples and transformations."""
        return ~states["varies"]


def _differ(x: Tensor, value: Tensor) -> Tensor:
    return (x != value).flatten(0, 1).any(0)


def with_dead(accumulators: Sequence[Accumulator]) -> list[Accumulator]:
    """Add :class:`Constant` to accumulators of which none detects dead activations."""
    detected = any(type(accumulator).dead is not Accumulator.dead for accumulator in accumulators)
    return [*accumulators] if detected or not accumulators else [*accumulators, Constant()]
