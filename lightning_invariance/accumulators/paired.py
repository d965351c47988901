"""What remains of the rows without what distinguishes the samples: for the analysis of variance with paired samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, Rows, States
from lightning_invariance.accumulators.memory import chunk_length


@dataclass(frozen=True)
class PairedDeviations(Accumulator):
    r"""Means of the columns of :math:`d_{ij} = x_{ij} - x_{i1}`, and deviations from them.

    A unit that hardly varies with the transformation varies much between samples; what it varies by is exact here,
    however small it is beside the value. For k activations and m transformations:

    - ``paired_means`` ``(m, k)``: :math:`\bar d_{\cdot j}`, float64.
    - ``paired_rows`` ``(k,)``: the number of rows without infinite values or NaN, of which these means are.
    - ``paired_error`` ``(k,)``: :math:`\sum_i \sum_j (e_{ij} - \bar e_{i \cdot})^2` of :math:`e_{ij} = d_{ij} - \bar
      d_{\cdot j}`, float64; NaN where a row is not finite.
    - ``paired_products`` ``(m, m)``: :math:`\sum_u \sum_i e_{iju} e_{ilu}` over all activations u of the layer and
      their finite rows, float64.
    - ``paired_origin`` ``(k,)``, ``paired_moves`` ``(k,)``: the first value of the first row, and whether that of
      another row differs.
    """

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

    def add(self, states: States, rows: Rows) -> States:
        """The states after more rows."""
        x = rows.flat
        if not rows.before:
            m, k = x.shape[1:]
            states = {
                # Constant columns then deviate by exactly 0.
                "paired_means": torch.nan_to_num(_apart(x[0]), 0, 0, 0),
                "paired_rows": torch.zeros(k, dtype=torch.float64, device=x.device),
                "paired_error": torch.zeros(k, dtype=torch.float64, device=x.device),
                "paired_products": torch.zeros(m, m, dtype=torch.float64, device=x.device),
                "paired_origin": x[0, 0].double(),
                "paired_moves": torch.zeros(k, dtype=torch.bool, device=x.device),
            }
        parts, products, length = [], states["paired_products"], chunk_length(x)
        names = ("paired_means", "paired_rows", "paired_error")
        split = (torch.split(each, length, -1) for each in (x, *(states[name] for name in names)))
        for values, *sums in zip(*split, strict=True):
            *found, added = _added(values, *sums)
            parts.append(found)
            products = products + added
        moves = (x[:, 0] != states["paired_origin"]).any(0)
        return {
            **{name: _joined(part) for name, part in zip(names, zip(*parts, strict=True), strict=True)},
            "paired_products": products,
            "paired_origin": states["paired_origin"],
            "paired_moves": states["paired_moves"] | moves,
        }

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both (Chan, Golub and LeVeque 1983, the paper's reference 20)."""
        n, n_other = a["paired_rows"], b["paired_rows"]
        apart, share = b["paired_means"] - a["paired_means"], n_other / (n + n_other).clamp_min(1)
        moved = apart * (n * share).sqrt()
        return {
            "paired_means": a["paired_means"] + share * apart,
            "paired_rows": n + n_other,
            "paired_error": a["paired_error"] + b["paired_error"] + (moved - moved.mean(0)).square().sum(0),
            "paired_products": a["paired_products"] + b["paired_products"] + moved @ moved.mT,
            "paired_origin": a["paired_origin"],
            "paired_moves": a["paired_moves"] | b["paired_moves"] | (a["paired_origin"] != b["paired_origin"]),
        }

    def dead(self, states: States) -> Tensor:
        """Which activations never changed, over all samples and transformations."""
        still = (states["paired_error"] == 0) & (states["paired_means"] == 0).all(0)
        return still & ~states["paired_moves"]


def _apart(x: Tensor) -> Tensor:
    """Differences from the first column, ``(..., m, k)``, in float64."""
    return torch.sub(x, x[..., :1, :].double())


def _added(x: Tensor, means: Tensor, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Means, rows and error after rows x (n, m, k) of some activations, and the products that these add.

    With e from the means so far and their sums S over the n rows added, the products of e about the new means of all N
    rows are :math:`\sum_i e_i e_i^T - S S^T / N`; S is at most about as large as what remains, since the first row is
    one of those that the means are of. The error is the trace of these products without their mean over columns.
    """
    deviations = _apart(x).sub_(means)
    of_rows = deviations.sum(1)
    flaws = of_rows - of_rows  # NaN where a value of the row is not finite
    finite = flaws == 0
    if not x.is_cpu or bool(flaws.isnan().any()):  # reading this from a GPU would synchronise
        deviations.masked_fill_(~finite[:, None], 0)
        of_rows = of_rows + flaws
    rows_now = rows + finite.sum(0, dtype=rows.dtype)
    divisor = rows_now.clamp(min=1)  # where there is no row, what is divided is 0
    sums = deviations.sum(0)
    moved = sums / divisor.sqrt()
    products = torch.addmm((deviations @ deviations.mT).sum(0), moved, moved.mT, alpha=-1)
    for values, axes, part in (
        (deviations, (0, 1), 1.0),
        (of_rows, 0, -1 / x.shape[1]),
        (moved - moved.mean(0), 0, -1.0),
    ):
        length = torch.linalg.vector_norm(values, dim=axes)
        error = torch.addcmul(error, length, length, value=part)
    return torch.addcdiv(means, sums, divisor), rows_now, error, products


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of activations, together."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts], -1)
