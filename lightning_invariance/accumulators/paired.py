"""What remains of the rows without what distinguishes the samples: for the analysis of variance with paired samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, Rows, States
from lightning_invariance.accumulators.memory import chunk_length

#: Layers with fewer values a row than this have float64 means: rounding a mean is not made up for here.
FEWEST_FLOAT32_VALUES = 2**14


@dataclass(frozen=True)
class PairedDeviations(Accumulator):
    r"""Means of the columns of the centred rows :math:`c_{ij} = x_{ij} - \bar x_{i \cdot}`, and deviations from them.

    A unit that hardly varies with the transformation varies much between samples; what it varies by is exact here,
    however small it is beside the value. For k activations and m transformations:

    - ``paired_means`` ``(m, k)``: :math:`\bar c_{\cdot j}`, in float32 where blocks of a large layer are.
    - ``paired_rows`` ``(k,)``: the number of rows without infinite values or NaN, of which these means are.
    - ``paired_error`` ``(k,)``: :math:`\sum_i \sum_j (c_{ij} - \bar c_{\cdot j})^2`, float64; NaN where a row is not
      finite.
    - ``paired_products`` ``(m, m)``: :math:`\sum_u \sum_i (c_{iju} - \bar c_{\cdot ju})(c_{ilu} - \bar c_{\cdot lu})`
      over all activations u of the layer and their finite rows, float64.
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
            kept = x.dtype if x.is_cpu and m * k >= FEWEST_FLOAT32_VALUES else torch.float64
            states = {
                # Constant columns then deviate by exactly 0.
                "paired_means": torch.nan_to_num(_centred(x[:1])[0][0], 0, 0, 0).to(kept),
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
        kept = torch.promote_types(a["paired_means"].dtype, b["paired_means"].dtype)
        means, others = (states["paired_means"].to(n.dtype) for states in (a, b))
        apart, share = others - means, n_other / (n + n_other).clamp_min(1)
        moved = apart * (n * share).sqrt()
        return {
            "paired_means": (means + share * apart).to(kept),
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


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, m, k) in float64 without their means; and 0 for rows whose values are all finite, else NaN, (n, k).

    Taken from its first value first, a constant row becomes exactly 0.
    """
    x = x - x[:, :1].double()
    means = x.mean(1, keepdim=True)
    return x.sub_(means), (means - means)[:, 0]


def _added(x: Tensor, means: Tensor, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means, rows and error after rows x (n, m, k) of some activations, and the products that these add."""
    n = len(x)
    deviations, flaws = _centred(x)
    deviations.sub_(means)
    finite, flaw = (flaws == 0)[:, None], flaws.sum(0)
    if not x.is_cpu or bool(flaw.isnan().any()):  # reading this from a GPU would synchronise
        deviations = torch.where(finite, deviations, 0.0)
    added = finite.sum((0, 1), dtype=rows.dtype)
    rows_now = rows + added
    # Where there is no row, what is divided is 0.
    shift, share = deviations.sum(0).div_(added.clamp(min=1)), added / rows_now.clamp(min=1)
    # As far as sums of squares and products go, the means that move are one more row.
    every = shift.new_empty(n + 1, *shift.shape)
    torch.addcmul(deviations, shift, finite, value=-1, out=every[:n])
    torch.mul(shift, (rows * share).sqrt_(), out=every[n])
    length = torch.linalg.vector_norm(every, dim=(0, 1))
    error = torch.addcmul(error + flaw, length, length)
    return torch.addcmul(means, shift, share).to(means.dtype), rows_now, error, (every @ every.mT).sum(0)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of activations, together."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts], -1)
