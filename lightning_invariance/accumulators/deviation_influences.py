r"""Influences of samples on values that are made of squared deviations, summed in C.

For every activation :math:`\psi_i = (w R_i + v C_i - b) / (1 - s C_i)`, with R the squared deviations within row i, and
C the squared deviations of row i from the means of the columns. For s see ``engine/sample_influences.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends import c_kernels
from lightning_invariance.accumulators.column_means import means_of
from lightning_invariance.accumulators.influences import FoundInfluences, Influenced
from lightning_invariance.accumulators.rows import Rows, States

#: The range of mean squares that float32 holds with their digits, and of weights.
SMALLEST, LARGEST = 1e-24, 1e30

#: Float32 means are too coarse where the variance of a column is below this part of the square of a mean.
FAR = 1e-6


@dataclass(frozen=True)
class DeviationInfluences:
    """An :class:`~lightning_invariance.accumulators.base.InfluenceKernel`.

    Attributes:
        means: of the columns, ``(m, k)`` in float32.
        weights: ``(4, k)`` in float32: w, v, b and s.
        counts: ``(k,)`` in int32: −1 for activations that count, 0 for others.
        changes: factors of the response, and the column that changes are taken from; None without a response.
    """

    means: Tensor
    weights: Tensor
    counts: Tensor
    changes: c_kernels.ChangesOfSamples | None

    @classmethod
    def of(cls, totals: States, about: Influenced, reference: int | None) -> DeviationInfluences | None:
        """The kernel for a value, or None where float32 does not hold what is needed.

        Args:
            totals: the sums of ``Deviations()``.
            about: the value.
            reference: the column that changes are taken from.
        """
        rows, columns, n = totals["row_spread"], totals["column_spread"][0], about.n_samples
        if rows.dtype != torch.float64 or len(rows) != len(about.finite):
            return None
        means, values = means_of(totals), n * about.n_transformations
        both = torch.stack([rows, columns]) / values
        held = (both == 0) | ((both > SMALLEST) & (both < LARGEST))
        far = (columns > 0) & (columns < FAR * values * means.abs().amax(0).square())
        if bool(((~held.all(0) | far) & about.finite).any()):
            return None
        found = about.derivative(["row_spread", "column_spread"])
        zeros = torch.zeros_like(rows)
        of_rows, of_columns = found.get("row_spread", zeros), found.get("column_spread", zeros[None])[0]
        leverage = zeros
        if about.is_quotient:
            leverage = torch.where(columns > 0, n / (n - 1) / columns, 0.0)
        weights = torch.stack([n * of_rows, n * of_columns, of_rows * rows + of_columns * columns, leverage])
        if bool((weights.abs() > LARGEST).any()):
            return None
        changes = None
        if about.with_response:
            if about.factors is None or reference is None or not bool(columns.isfinite().all()):
                return None
            changes = c_kernels.ChangesOfSamples(about.factors / 2, reference)
        return cls(means.float(), weights.float(), -about.finite.int(), changes)

    def add(self, rows: Rows, squares: Tensor, fourths: Tensor) -> FoundInfluences | None:
        """Add to the sums of squared influences, and of their fourth powers; None where C does not take the rows."""
        return c_kernels.add_influences(
            rows.values, self.means, self.weights, self.counts, squares, fourths, self.changes
        )
