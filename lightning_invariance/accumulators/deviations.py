r"""Squared deviations within the rows and columns of the ST matrix, and the means of its columns.

Why the sums lose no digits is derived in ``csrc/deviations.c``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends import add_deviations
from lightning_invariance.accumulators.backends.base import Wanted
from lightning_invariance.accumulators.backends.pytorch import changes_of_samples, deviations_of_samples
from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.column_means import means_of, narrow
from lightning_invariance.accumulators.deviation_influences import DeviationInfluences
from lightning_invariance.accumulators.influences import Influenced, InfluenceKernel
from lightning_invariance.accumulators.rows import N_SAMPLES, Context, Rows, States


@dataclass(frozen=True)
class Deviations(Accumulator):
    r"""Squared deviations within the rows and columns of the ST matrix, and the means of the columns.

    For k activations and m transformations (m + 3) k numbers:

    - ``row_spread`` ``(k,)``: :math:`\sum_i \sum_j (x_{ij} - \bar x_{i \cdot})^2`, float64.
    - ``column_spread`` ``(1, k)``: :math:`\sum_j \sum_i (x_{ij} - \mu_j)^2`, float64, about the means as they are kept.
    - ``centres`` ``(k,)`` and ``offsets`` ``(k / width, m, width)``: the column means, :math:`\mu_j = c + o_j`; see
      :func:`~lightning_invariance.accumulators.column_means.means_of`. In float32 where that suffices, which halves
      the memory; in tiles, whose values lie close together, where C adds them.

    With ``squared=False``, ``row_spread`` is the sum of the rows' standard deviations, and ``column_spread`` ``(m, k)``
    is kept for each column. With ``response``, ``changes`` ``(m, channels)`` tells what each transformation changes;
    see :func:`~lightning_invariance.accumulators.backends.pytorch.changes_of_samples`.

    Attributes:
        squared: whether variances or standard deviations are averaged.
        response: whether ``changes`` are kept.
        reference: the column that changes are taken from; None for the mean of the row.
    """

    squared: bool = True
    response: bool = False
    reference: int | None = None

    takes_half = True
    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        vector, matrix, tiles = (torch.zeros(*[0] * axes, dtype=torch.float64) for axes in (1, 2, 3))
        changes = {"changes": matrix} if self.response else {}
        return {"row_spread": vector, "column_spread": matrix, "centres": vector, "offsets": tiles, **changes}

    def add(self, states: States, rows: Rows) -> None:
        """Add rows."""
        add_deviations(states, rows, Wanted(self.squared, self.response, self.reference))

    def merge(self, a: States, b: States) -> States:
        r"""The states after the rows of both (Chan, Golub and LeVeque 1983, the paper's reference 20).

        With δ the difference of two means, the squared deviations grow by n_a n_b / (n_a + n_b) δ².
        """
        n, n_other = a[N_SAMPLES], b[N_SAMPLES]
        apart = means_of(b) - means_of(a)
        share = n_other / (n + n_other).to(apart.dtype)
        moved = (share * apart).view(len(apart), -1, a["offsets"].shape[2]).movedim(1, 0)
        between = n * share * apart.square()
        if self.squared:
            between = between.sum(0, keepdim=True)
        response = {"changes": a["changes"] + b["changes"]} if self.response else {}
        states = {
            "row_spread": a["row_spread"] + b["row_spread"],
            "column_spread": a["column_spread"] + b["column_spread"] + between,
            "centres": a["centres"].double(),
            "offsets": a["offsets"] + moved,
            **response,
        }
        if a["offsets"].dtype == b["offsets"].dtype == torch.float32:
            narrow(states, int(n + n_other))
        return states

    def shares(self, rows: Rows, totals: States) -> States:
        """The squared deviations, and the changes, of each sample."""
        changes = {"changes": changes_of_samples(rows, self.reference)} if self.response else {}
        return deviations_of_samples(rows.flat, means_of(totals), self.squared) | changes

    def influence_kernel(self, totals: States, about: Influenced) -> InfluenceKernel | None:
        """The influences in C, of variances of single activations."""
        return DeviationInfluences.of(totals, about, self.reference) if self.squared else None

    def prepared(self, context: Context) -> Accumulator:
        """With changes from the identity, where the set knows of one."""
        return replace(self, reference=context.transformations.identity) if self.response else self

    def includes(self, other: Accumulator) -> bool:
        """One with a response also serves measures without."""
        if not isinstance(other, Deviations) or self.response < other.response:
            return False
        return self.squared == other.squared and (self.reference == other.reference or not other.response)

    def dead(self, states: States) -> Tensor:
        """Which activations never changed, over all samples and transformations."""
        return (states["row_spread"] == 0) & (states["column_spread"] == 0).all(0)
