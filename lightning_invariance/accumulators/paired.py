"""Deviations of rows after removing the differences between samples, for the paired analysis of variance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends.chunks import chunk_length
from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.rows import Rows, States


@dataclass(frozen=True)
class PairedDeviations(Accumulator):
    r"""Means of the columns of :math:`d_{ij} = x_{ij} - x_{i1}`, and deviations from them.

    The differences keep their digits even if a unit varies much between samples and hardly with the transformation.
    Let :math:`c_{ij} = d_{ij} - \bar d_{\cdot j} - \bar d_{i \cdot} + \bar d_{\cdot \cdot}` be the residual of the
    model with row and column effects. For k activations and m transformations:

    - ``paired_means`` ``(m, k)``: :math:`\bar d_{\cdot j}`, up to one constant for all columns, float64.
    - ``paired_rows`` ``(k,)``: the number of rows in these means: all rows without infinite values or NaN.
    - ``paired_error`` ``(k,)``: :math:`\sum_i \sum_j c_{ij}^2`, float64; NaN if a row is not finite.
    - ``paired_products`` ``(m, m)``: :math:`\sum_u \sum_i c_{iju} c_{ilu}` over all activations u of the layer and
      their finite rows, float64.
    - ``paired_origin`` ``(k,)``, ``paired_moves`` ``(k,)``: the first value of the first row, and whether another row
      has another first value.
    """

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        vector, matrix = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        return {
            "paired_means": matrix,
            "paired_rows": vector,
            "paired_error": vector,
            "paired_products": matrix,
            "paired_origin": vector,
            "paired_moves": torch.zeros(0, dtype=torch.bool),
        }

    def add(self, states: States, rows: Rows) -> None:
        """Add rows."""
        x = rows.flat
        if not rows.before:
            m, k = x.shape[1:]
            first = torch.sub(x[0], x[0, :1].double())
            finite = (first - first == 0).all(0)  # other rows are not part of the means
            states.update(
                paired_means=torch.where(finite, first, 0),  # constant columns then deviate by exactly 0
                paired_rows=torch.zeros(k, dtype=torch.float64, device=x.device),
                paired_error=torch.zeros(k, dtype=torch.float64, device=x.device),
                paired_products=torch.zeros(m, m, dtype=torch.float64, device=x.device),
                paired_origin=x[0, 0].to(torch.float64, copy=True),  # later modules may change activations in place
                paired_moves=torch.zeros(k, dtype=torch.bool, device=x.device),
            )
        parts, products, length = [], states["paired_products"], chunk_length(x)
        names = ("paired_means", "paired_rows", "paired_error")
        split = (torch.split(each, length, -1) for each in (x, *(states[name] for name in names)))
        for values, *sums in zip(*split, strict=True):
            products, *found = _added(products, values, *sums)
            parts.append(found)
        for name, part in zip(names, zip(*parts, strict=True), strict=True):
            states[name] = part[0] if len(part) == 1 else torch.cat(part, -1)
        states["paired_products"] = products
        states["paired_moves"] = states["paired_moves"] | (x[:, 0] != states["paired_origin"]).any(0)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both (Chan, Golub and LeVeque 1983, the paper's reference 20)."""
        n, n_other = a["paired_rows"], b["paired_rows"]
        weight = n_other / (n + n_other).clamp_min(1)
        difference = b["paired_means"] - a["paired_means"]
        difference = difference - difference.mean(0)
        moved = difference * (n * weight).sqrt()
        return {
            "paired_means": a["paired_means"] + weight * difference,
            "paired_rows": n + n_other,
            "paired_error": a["paired_error"] + b["paired_error"] + moved.square().sum(0),
            "paired_products": a["paired_products"] + b["paired_products"] + moved @ moved.mT,
            "paired_origin": a["paired_origin"],
            "paired_moves": a["paired_moves"] | b["paired_moves"] | (a["paired_origin"] != b["paired_origin"]),
        }

    def dead(self, states: States) -> Tensor:
        """Which activations never changed, over all samples and transformations."""
        constant_rows = (states["paired_error"] == 0) & (states["paired_means"] == 0).all(0)
        return constant_rows & ~states["paired_moves"]


def _added(
    products: Tensor, x: Tensor, means: Tensor, rows: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Compute products, means, rows and error after adding rows x (n, m, k) of some activations.

    Let c be the residuals about the means before, and S their sum over the n added rows. The products about the new
    means of all N rows are :math:`\sum_i c_i c_i^T - S S^T / N`. This loses few digits, since the means include the
    first row, if it is finite, which keeps S small. The error is the trace of these products.
    """
    columns = x.movedim(1, 0)
    deviations = torch.empty(columns.shape, dtype=torch.float64, device=x.device)
    torch.sub(columns, columns[:1].double(), out=deviations).sub_(means[:, None])
    of_rows = deviations.mean(0)
    deviations.sub_(of_rows)
    finite = of_rows - of_rows == 0  # a row with one NaN or infinite value has no finite deviations
    length = torch.linalg.vector_norm(deviations, dim=(0, 1))
    if not x.is_cpu or not bool(finite.all()):  # reading this from a GPU would synchronise
        torch.nan_to_num(deviations, 0, 0, 0, out=deviations)
    rows_now = rows + finite.sum(0, dtype=rows.dtype)
    sums = deviations.sum(1)
    moved = sums / rows_now.clamp(min=1)  # without rows, the sums are 0
    of_columns = deviations.flatten(1)
    return (
        torch.addmm(torch.addmm(products, of_columns, of_columns.mT), sums, moved.mT, alpha=-1),
        means + moved,
        rows_now,
        torch.addcmul(error, length, length) - torch.einsum("jk,jk->k", sums, moved),
    )
