"""What each transformation changes in whole feature maps, and their squared deviations within rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lightning_invariance.accumulators.backends.pytorch import changes_of_samples
from lightning_invariance.accumulators.base import Accumulator, add_to
from lightning_invariance.accumulators.rows import Context, Rows, States


@dataclass(frozen=True)
class Changes(Accumulator):
    r"""What the variance and the response of whole feature maps need.

    - ``map_spread`` ``(channels,)``: :math:`\sum_i \sum_j \|x_{ij} - \bar x_{i \cdot}\|^2`.
    - ``changes`` ``(m, channels)``: see :func:`~lightning_invariance.accumulators.backends.pytorch.changes_of_samples`.

    Attributes:
        reference: the column that changes are taken from; None for the mean of the row.
    """

    reference: int | None = None

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {
            "map_spread": torch.zeros(0, dtype=torch.float64),
            "changes": torch.zeros(0, 0, dtype=torch.float64),
        }

    def add(self, states: States, rows: Rows) -> None:
        """Add the changes of rows."""
        add_to(states, **{name: of_samples.sum(0) for name, of_samples in self.shares(rows, states).items()})

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {name: a[name] + b[name] for name in self.empty()}

    def prepared(self, context: Context) -> Accumulator:
        """With changes from the identity, where the set knows of one."""
        return replace(self, reference=context.transformations.identity)

    def shares(self, rows: Rows, totals: States) -> States:
        """The states of each sample."""
        from_mean, m = changes_of_samples(rows, None), rows.values.shape[1]
        changes = from_mean if self.reference is None else changes_of_samples(rows, self.reference)
        return {"map_spread": from_mean.sum(1) * ((m - 1) / m), "changes": changes}
