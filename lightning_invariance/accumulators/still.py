"""Which activations never change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, Rows, States


@dataclass(frozen=True)
class Still(Accumulator):
    """The first value of each activation, ``still_value`` ``(k,)``, and whether another one came, ``moved`` ``(k,)``.

    In an evaluation every layer has it whose other accumulators do not tell which activations are dead.
    """

    def empty(self) -> States:
        """The states before the first row."""
        return {"still_value": torch.zeros(0), "moved": torch.zeros(0, dtype=torch.bool)}

    def add(self, states: States, rows: Rows) -> States:
        """The states after more rows."""
        x = rows.flat
        first = states["still_value"] if rows.before else x[0, 0].clone()
        if not rows.before:
            return {"still_value": first, "moved": _differ(x, first)}
        moved = states["moved"]
        if not x.is_cpu:  # where reading which ones have not moved would synchronise
            return {"still_value": first, "moved": moved | _differ(x, first)}
        if (still := (~moved).nonzero()[:, 0]).numel():  # after some rows few activations, or none
            few = _differ(x.index_select(2, still), first[still])
            moved = moved.index_put((still,), few)
        return {"still_value": first, "moved": moved}

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        moved = a["moved"] | b["moved"] | (a["still_value"] != b["still_value"])
        return {"still_value": a["still_value"], "moved": moved}

    def dead(self, states: States) -> Tensor:
        """Which activations never changed, over all samples and transformations."""
        return ~states["moved"]


def _differ(x: Tensor, value: Tensor) -> Tensor:
    """Which activations of rows (n, m, k) have another value than this one, (k,), anywhere."""
    return (x != value).flatten(0, 1).any(0)
