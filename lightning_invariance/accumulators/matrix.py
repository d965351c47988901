"""The ST matrix itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.rows import Rows, States


@dataclass(frozen=True)
class Matrix(Accumulator):
    """All rows: ``rows`` ``(n, m, k)``, and the number of each sample, ``order`` ``(n,)``, on the CPU."""

    cpu_states = ("order",)
    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"rows": torch.zeros(0, 0, 0), "order": torch.zeros(0, dtype=torch.long)}

    def add(self, states: States, rows: Rows) -> None:
        """Append rows."""
        before = rows.before
        order = rows.indices if rows.indices is not None else torch.arange(before, before + len(rows.values))
        added = {"rows": rows.flat.clone(), "order": order.cpu()}
        states.update(self.merge(states, added) if before else added)

    def merge(self, a: States, b: States) -> States:
        """The rows of both."""
        return {name: torch.cat([a[name], b[name]]) for name in ("rows", "order")}
