"""Distances within the rows of the ST matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends.c_kernels import MOST_COLUMNS
from lightning_invariance.accumulators.backends.pairs import absolute_differences, euclidean_distances
from lightning_invariance.accumulators.base import Accumulator, add_to
from lightning_invariance.accumulators.rows import Rows, States

#: A distance by name, or a function of two broadcast tensors; see :func:`distance_between`.
Distance: TypeAlias = str | Callable[[Tensor, Tensor], Tensor]

#: The squares of float32 values neither overflow nor lose digits if their norm is between this and its inverse.
MAX_SAFE_NORM = 1e15

#: Unit vectors whose difference has a smaller norm, in units of the last place of 1, may be equal: both are rounded.
ROUNDING = 4.0


@dataclass(frozen=True)
class RowDistances(Accumulator):
    r"""``row_distances``: the distances of all ordered pairs within rows, :math:`\sum_i \sum_{j,l} d(x_{ij}, x_{il})`.

    ``(activations,)``, ``(channels,)`` for ``over="channel"`` or ``(1,)`` for ``over="layer"``, in float64.

    Attributes:
        distance: ``"abs"``, ``"euclidean"``, ``"cosine"`` or a function; see :func:`distance_between`.
        over: ``"activation"``, or ``"channel"`` or ``"layer"`` to compare feature maps or whole layers as vectors.
    """

    distance: Distance
    over: str

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"row_distances": torch.zeros(0, dtype=torch.float64)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the distances of rows."""
        for some in torch.split(self._values(rows), max(1, MOST_COLUMNS // rows.values.shape[1])):
            add_to(states, row_distances=row_distances(some, self.distance, self.over))

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {"row_distances": a["row_distances"] + b["row_distances"]}

    def shares(self, rows: Rows, totals: States) -> States:
        """The summed distances of each row."""
        if self.distance == "abs" and self.over == "activation":
            return {"row_distances": absolute_differences(rows.flat, of_rows=True)}
        if self.distance == "cosine":
            return {"row_distances": _cosine_distances(self._values(rows))}
        values = self._values(rows)[:, None]
        return {"row_distances": torch.stack([row_distances(row, self.distance, self.over) for row in values])}

    def _values(self, rows: Rows) -> Tensor:
        return rows.values if self.over == "activation" else rows.vectors(self.over)


def row_distances(values: Tensor, distance: Distance, over: str) -> Tensor:
    """Sum the distances of all ordered pairs within rows ``(n, m, *activation_shape)`` over rows.

    Returns:
        ``(activations,)``, or ``(channels,)`` for ``over="channel"``, in float64.
    """
    if distance == "abs" and over == "activation":
        return absolute_differences(values.flatten(2) if values.ndim > 2 else values[..., None])
    maps = values.reshape(*values.shape[:2], math.prod(values.shape[2:3]), -1)
    if distance == "euclidean" and maps.shape[3] == 1:
        return absolute_differences(maps[..., 0])
    if distance == "euclidean":
        return 2 * euclidean_distances(maps).sum(0)
    if distance == "cosine":
        return _cosine_distances(maps).sum(0)
    m = maps.shape[1]
    like = distance_between(maps[:, 0], maps[:, 0], distance, over)
    total = like.new_zeros(like.shape[1:], dtype=torch.float64)
    for shift in range(1, m):  # every unordered pair once: j and j + shift
        found = distance_between(maps[:, : m - shift], maps[:, shift:], distance, over)
        total = total + found.sum((0, 1), dtype=total.dtype)
    return 2 * total.flatten()


def _cosine_distances(maps: Tensor) -> Tensor:
    r"""1 − cos of all ordered pairs within rows ``(n, m, channels, positions)``: ``(n, channels)`` in float64.

    For unit vectors u it is \|u − u'\|² / 2; all pairs have the sum m Σ \|u_j − u_1\|² − \|Σ (u_j − u_1)\|². Zero maps
    have u = 0, which gives 1/2 instead of 1 for a pair with one zero map: the last term adds the difference.
    """
    if maps.is_cpu and len(maps) > 1:  # one row at a time fits into the caches
        return torch.cat([_cosine_distances(row) for row in torch.split(maps, 1)])
    m = maps.shape[1]
    unit, zero = _unit_vectors(maps, torch.float64)  # float32 would round maps that are nearly parallel
    difference = _resolved(torch.sub(unit, unit[:, :1]))
    norm = torch.linalg.vector_norm(difference, dim=(1, 3))
    norm_of_sum = torch.linalg.vector_norm(difference.sum(1), dim=2)
    zeros = zero.sum(1)
    found: Tensor = m * norm.square() - norm_of_sum.square() + zeros * (m - zeros)
    return found


def distance_between(x: Tensor, y: Tensor, distance: Distance, over: str) -> Tensor:
    """Compute distances of activations, or of feature maps, of broadcast tensors ``(..., channels, positions)``.

    Args:
        x: first tensor.
        y: second tensor.
        distance: ``"abs"``, ``"euclidean"``, ``"cosine"`` (1 − cosine of the angle between unit vectors, see
            :func:`unit_maps`; 0 for two zero maps, 1 for one), or a function ``d(x, y)``.
        over: ``"activation"`` to compare scalars, ``"channel"`` to compare vectors along the last axis, which a
            function must reduce.
    """
    if callable(distance):
        found: Tensor = distance(x, y)
        return found
    difference = torch.sub(x, y)
    if distance == "cosine":  # of unit vectors; 1 − x·y would lose the digits of small angles
        x_is_zero, y_is_zero = ~(x != 0).any(-1), ~(y != 0).any(-1)  # NaN is not 0
        return torch.where(x_is_zero ^ y_is_zero, 1.0, _resolved(difference).square_().sum(-1) / 2)
    if distance == "euclidean":
        norm: Tensor = torch.linalg.vector_norm(difference, dim=-1, dtype=torch.float64)  # squares cannot overflow
        return norm
    return difference.abs_() if over == "activation" else difference.abs_().sum(-1)


def _resolved(difference: Tensor) -> Tensor:
    """Set differences of unit vectors ``(..., positions)`` that are rounding alone, of parallel vectors, to 0."""
    norm = torch.linalg.vector_norm(difference, dim=-1, keepdim=True)
    return difference.masked_fill_(norm <= ROUNDING * torch.finfo(difference.dtype).eps, 0)


def unit_maps(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Divide feature maps by their norms; also tell which are zero, (samples, transformations, channels).

    Maps of zeros are returned as they are. Maps with infinite or NaN values are NaN.
    """
    flat = maps.flatten(3)
    if not maps.is_cpu:  # to look for doubtful norms, as below, would synchronise
        unit, zero = _unit_vectors(flat)
        return unit.view(maps.shape), zero
    norm = flat.norm(dim=3)
    doubtful = ~((norm > 1 / MAX_SAFE_NORM) & (norm < MAX_SAFE_NORM))
    unit = flat / torch.where(doubtful, 1, norm)[..., None]
    if bool(doubtful.any()):
        unit[doubtful], zero = _unit_vectors(flat[doubtful])
        doubtful = doubtful.masked_scatter(doubtful, zero)
    return unit.view(maps.shape), doubtful


def zero_maps(maps: Tensor) -> Tensor:
    """Which feature maps are zero at all positions, (samples, transformations, channels)."""
    flat = maps.flatten(3)
    if not maps.is_cpu:
        largest: Tensor = torch.linalg.vector_norm(flat, torch.inf, dim=3)
        return largest == 0
    zero: Tensor = flat.norm(dim=3) == 0
    if bool(zero.any()):  # squares of small values may have underflowed
        zero[zero.clone()] = (flat[zero] == 0).all(-1)
    return zero


def _unit_vectors(flat: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Divide vectors by their norms, in their type or another one; also tell which are zero.

    Float64 holds all squares of float32 values; float64 values are first divided by their largest magnitude.
    """
    if flat.dtype == torch.float32:
        norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=torch.float64)
        zero = norm == 0
        found = torch.empty_like(flat, dtype=dtype)
        return torch.div(flat, norm.masked_fill_(zero, 1), out=found), zero[..., 0]
    largest = torch.linalg.vector_norm(flat, torch.inf, dim=-1, keepdim=True)
    zero = largest == 0
    parts = flat / largest.masked_fill_(zero, 1)
    return parts.div_(parts.norm(dim=-1, keepdim=True).masked_fill_(zero, 1)), zero[..., 0]
