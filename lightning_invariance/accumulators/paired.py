"""What remains of the rows without what distinguishes the samples: for the analysis of variance with paired samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends.scratch import chunk_length
from lightning_invariance.accumulators.base import Accumulator, Rows, States


@dataclass(frozen=True)
class PairedDeviations(Accumulator):
    r"""Means of the columns of :math:`d_{ij} = x_{ij} - x_{i1}`, and deviations from them.

    A unit that hardly varies with the transformation varies much between samples; what it varies by is exact here,
    however small it is beside the value. Let :math:`c_{ij} = d_{ij} - \bar d_{\cdot j} - \bar d_{i \cdot} + \bar
    d_{\cdot \cdot}` be what neither rows nor columns explain. For k activations and m transformations:

    - ``paired_means`` ``(m, k)``: :math:`\bar d_{\cdot j}`, less a number that all columns share, float64.
    - ``paired_rows`` ``(k,)``: the number of rows without infinite values or NaN, of which these means are.
    - ``paired_error`` ``(k,)``: :math:`\sum_i \sum_j c_{ij}^2`, float64; NaN where a row is not finite.
    - ``paired_products`` ``(m, m)``: :math:`\sum_u \sum_i c_{iju} c_{ilu}` over all activations u of the layer and
      their finite rows, float64.
    - ``paired_origin`` ``(k,)``, ``paired_moves`` ``(k,)``: the first value of the first row, and whether that of
      another row differs.
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
            finite = (first - first == 0).all(0)  # else it is not among the rows that the means are of
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
        states.update({name: _joined(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)})
        states["paired_products"] = products
        states["paired_moves"] = states["paired_moves"] | (x[:, 0] != states["paired_origin"]).any(0)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both (Chan, Golub and LeVeque 1983, the paper's reference 20)."""
        n, n_other = a["paired_rows"], b["paired_rows"]
        share = n_other / (n + n_other).clamp_min(1)
        apart = b["paired_means"] - a["paired_means"]
        apart = apart - apart.mean(0)
        moved = apart * (n * share).sqrt()
        return {
            "paired_means": a["paired_means"] + share * apart,
            "paired_rows": n + n_other,
            "paired_error": a["paired_error"] + b["paired_error"] + moved.square().sum(0),
            "paired_products": a["paired_products"] + b["paired_products"] + moved @ moved.mT,
            "paired_origin": a["paired_origin"],
            "paired_moves": a["paired_moves"] | b["paired_moves"] | (a["paired_origin"] != b["paired_origin"]),
        }

    def dead(self, states: States) -> Tensor:
        """Which activations never changed, over all samples and transformations."""
        still = (states["paired_error"] == 0) & (states["paired_means"] == 0).all(0)
        return still & ~states["paired_moves"]


def _added(
    products: Tensor, x: Tensor, means: Tensor, rows: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Products, means, rows and error after rows x (n, m, k) of some activations.

    With c from the means so far and their sums S over the n rows added, the products of c about the new means of all N
    rows are :math:`\sum_i c_i c_i^T - S S^T / N`; S is at most about as large as what remains, since the first row is
    one of those that the means are of, if it is finite. The error is the trace of these products.
    """
    columns = x.movedim(1, 0)
    deviations = torch.empty(columns.shape, dtype=torch.float64, device=x.device)
    torch.sub(columns, columns[:1].double(), out=deviations).sub_(means[:, None])
    of_rows = deviations.mean(0)
    deviations.sub_(of_rows)
    finite = of_rows - of_rows == 0  # where not, one deviation of the row is NaN, and the others are not finite either
    length = torch.linalg.vector_norm(deviations, dim=(0, 1))
    if not x.is_cpu or not bool(finite.all()):  # reading this from a GPU would synchronise
        torch.nan_to_num(deviations, 0, 0, 0, out=deviations)
    rows_now = rows + finite.sum(0, dtype=rows.dtype)
    sums = deviations.sum(1)
    moved = sums / rows_now.clamp(min=1)  # where there is no row, the sums are 0
    of_columns = deviations.flatten(1)
    return (
        torch.addmm(torch.addmm(products, of_columns, of_columns.mT), sums, moved.mT, alpha=-1),
        means + moved,
        rows_now,
        torch.addcmul(error, length, length) - torch.einsum("jk,jk->k", sums, moved),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of activations, together."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts], -1)
