"""What remains of the rows without what distinguishes the samples: for the analysis of variance with paired samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import N_SAMPLES, Accumulator, Rows, States
from lightning_invariance.accumulators.deviations import FEWEST_FLOAT32_VALUES
from lightning_invariance.accumulators.memory import chunk_length


@dataclass(frozen=True)
class PairedDeviations(Accumulator):
    r"""Means of the columns of the centred rows :math:`c_{ij} = x_{ij} - \bar x_{i \cdot}`, and deviations from them.

    A unit that hardly varies with the transformation varies much between samples; what it varies by is exact here,
    however small it is beside the value. For k activations and m transformations:

    - ``paired_means`` ``(m, k)``: :math:`\bar c_{\cdot j}`, in float32 where blocks of a large layer are.
    - ``paired_error`` ``(k,)``: :math:`\sum_i \sum_j (c_{ij} - \bar c_{\cdot j})^2`, float64.
    - ``paired_products`` ``(m, m)``: :math:`\sum_u \sum_i (c_{iju} - \bar c_{\cdot ju})(c_{ilu} - \bar c_{\cdot lu})`
      over all activations u of the layer, float64. Of an activation that becomes infinite or NaN, those of the blocks
      before remain.
    - ``paired_origin`` ``(k,)``, ``paired_moves`` ``(k,)``: the first value of the first row, and whether that of
      another row differs.
    """

    def empty(self) -> States:
        """The states before the first row."""
        vector, matrix = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        return {
            "paired_means": matrix,
            "paired_error": vector,
            "paired_products": matrix,
            "paired_origin": vector,
            "paired_moves": torch.zeros(0, dtype=torch.bool),
        }

    def add(self, states: States, rows: Rows) -> States:
        """The states after more rows."""
        x = rows.flat
        if not rows.before:
            wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
            m, k = x.shape[1:]
            kept = x.dtype if x.is_cpu and m * k >= FEWEST_FLOAT32_VALUES else wide
            states = {
                "paired_means": _centred(x[:1].to(wide))[0].to(kept),  # constant columns deviate by exactly 0
                "paired_error": torch.zeros(k, dtype=wide, device=x.device),
                "paired_products": torch.zeros(m, m, dtype=wide, device=x.device),
                "paired_origin": x[0, 0].to(wide),
                "paired_moves": torch.zeros(k, dtype=torch.bool, device=x.device),
            }
        means, error, products = [], [], states["paired_products"]
        length = chunk_length(x)
        split = (torch.split(each, length, -1) for each in (x, states["paired_means"], states["paired_error"]))
        for values, mean, squares in zip(*split, strict=True):
            found = _added(values.to(squares.dtype), mean, squares, products, rows.before)
            means.append(found[0])
            error.append(found[1])
            products = found[2]
        moves = (x[:, 0] != states["paired_origin"]).any(0)
        return {
            "paired_means": _joined(means),
            "paired_error": _joined(error),
            "paired_products": products,
            "paired_origin": states["paired_origin"],
            "paired_moves": states["paired_moves"] | moves,
        }

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both (Chan, Golub and LeVeque 1983, the paper's reference 20)."""
        n, n_other = (states[N_SAMPLES].to(a["paired_error"].dtype) for states in (a, b))
        kept = torch.promote_types(a["paired_means"].dtype, b["paired_means"].dtype)
        means, others = (states["paired_means"].to(n.dtype) for states in (a, b))
        apart, share = others - means, n_other / (n + n_other)
        weight = n * share
        return {
            "paired_means": (means + share * apart).to(kept),
            "paired_error": a["paired_error"] + b["paired_error"] + weight * apart.square().sum(0),
            "paired_products": a["paired_products"] + b["paired_products"] + weight * _products(apart),
            "paired_origin": a["paired_origin"],
            "paired_moves": a["paired_moves"] | b["paired_moves"] | (a["paired_origin"] != b["paired_origin"]),
        }

    def dead(self, states: States) -> Tensor:
        """Which activations never changed, over all samples and transformations."""
        still = (states["paired_error"] == 0) & (states["paired_means"] == 0).all(0)
        return still & ~states["paired_moves"]


def _centred(x: Tensor) -> Tensor:
    """Rows (n, m, k) without their means; taken from its first value first, a constant row becomes exactly 0."""
    x = x - x[:, :1]
    return x.sub_(x.mean(1, keepdim=True))


def _added(x: Tensor, means: Tensor, error: Tensor, products: Tensor, before: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means, error and products after rows x (n, m, k) of some activations."""
    n = len(x)
    deviations = _centred(x).sub_(means)
    shift, share = deviations.mean(0), n / (before + n)
    # As far as sums of squares and products go, the means that move are one more row.
    every = shift.new_empty(n + 1, *shift.shape)
    torch.sub(deviations, shift, out=every[:n])
    torch.mul(shift, math.sqrt(before * share), out=every[n])
    length = torch.linalg.vector_norm(every, dim=(0, 1))
    error = torch.addcmul(error, length, length)
    return torch.add(means, shift, alpha=share).to(means.dtype), error, products + _products(every).sum(0)


def _products(x: Tensor) -> Tensor:
    """Sums of products of all pairs of columns (..., m, k), without what is not finite."""
    finite = torch.nan_to_num(x, 0, 0, 0)
    return finite @ finite.mT


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of activations, together."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts], -1)
