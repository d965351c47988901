"""What each transformation changes in a layer: squared deviations from a column, or from the mean of the row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_invariance.accumulators.backends.pytorch import changes_of_samples, scaled_changes
from lightning_invariance.accumulators.base import Accumulator, add_to
from lightning_invariance.accumulators.rows import Rows, States


@dataclass(frozen=True)
class Changes(Accumulator):
    """The changes alone, ``changes`` ``(m, channels)``: for whole feature maps their mean over m is the variance.

    Attributes:
        reference: the column that changes are taken from; None for the mean of the row.
    """

    reference: int | None = None

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"changes": torch.zeros(0, 0, dtype=torch.float64)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the changes of rows."""
        add_to(states, changes=scaled_changes(rows, self.reference))

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {"changes": a["changes"] + b["changes"]}

    def shares(self, rows: Rows, totals: States) -> States:
        """The changes of each sample, ``(samples, m, channels)``."""
        return {"changes": changes_of_samples(rows, self.reference)}
