"""Distances within the rows of the ST matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends.pairs import absolute_differences, euclidean_distances
from lightning_invariance.accumulators.base import Accumulator, Rows, States, add_to
from lightning_invariance.accumulators.deviations import MOST_VALUES

#: A distance by name, or a function of two broadcast tensors; see :func:`distance_between`.
Distance: TypeAlias = str | Callable[[Tensor, Tensor], Tensor]

#: Norms of float32 maps between this and its inverse have squares that have not lost digits.
LARGEST_NORM = 1e15


@dataclass(frozen=True)
class RowDistances(Accumulator):
    r"""The distances of all ordered pairs within rows, summed over rows: :math:`\sum_i \sum_{j,l} d(x_{ij}, x_{il})`.

    One number for each activation, or for each channel: ``row_distances`` in float64.

    Attributes:
        distance: ``"abs"``, ``"euclidean"``, ``"cosine"`` or a function; see :func:`distance_between`.
        over: ``"activation"``, or ``"channel"`` where a feature map is one vector.
    """

    distance: Distance
    over: str

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"row_distances": torch.zeros(0, dtype=torch.float64)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the distances of rows."""
        for some in torch.split(self._values(rows), max(1, MOST_VALUES // rows.values.shape[1])):
            add_to(states, row_distances=row_distances(some, self.distance, self.over))

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {"row_distances": a["row_distances"] + b["row_distances"]}

    def shares(self, rows: Rows, totals: States) -> States:
        """The distances within the row of each sample."""
        if self.distance == "abs" and self.over == "activation":
            return {"row_distances": absolute_differences(rows.flat, of_rows=True)}
        if self.distance == "cosine":
            return {"row_distances": _cosine_distances(rows.maps)}
        values = self._values(rows)[:, None]
        return {"row_distances": torch.stack([row_distances(row, self.distance, self.over) for row in values])}

    def _values(self, rows: Rows) -> Tensor:
        return rows.values if self.over == "activation" else rows.maps


def row_distances(values: Tensor, distance: Distance, over: str) -> Tensor:
    """The distances of all ordered pairs within rows ``(n, m, *activation_shape)``, summed over rows, in float64.

    Returns:
        ``(activations,)``, or ``(channels,)`` for ``over="channel"``.
    """
    if distance == "abs" and over == "activation":
        flat = values.flatten(2) if values.ndim > 2 else values[..., None]
        return absolute_differences(flat)
    maps = as_maps(values)
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

    Of unit vectors u it is \|u − u'\|² / 2, so that all pairs of a row come to m Σ \|u_j − u_1\|² − \|Σ (u_j − u_1)\|².
    Zero maps have u = 0, and where one of two is zero 1/2 is missing.
    """
    if maps.is_cpu and len(maps) > 1:  # a row at a time fits into the caches
        return torch.cat([_cosine_distances(row) for row in torch.split(maps, 1)])
    m = maps.shape[1]
    unit, zero = _unit_vectors(maps, torch.float64)  # float32 would round maps that are nearly parallel
    apart = torch.sub(unit, unit[:, :1])
    dark = zero.sum(1)
    squares, of_sum = (torch.linalg.vector_norm(each, dim=axes) for each, axes in ((apart, (1, 3)), (apart.sum(1), 2)))
    found: Tensor = m * squares.square() - of_sum.square() + dark * (m - dark)
    return found


def as_maps(values: Tensor) -> Tensor:
    """``(n, m, *activation_shape)`` → ``(n, m, channels, positions)``."""
    return values.reshape(*values.shape[:2], math.prod(values.shape[2:3]), -1)


def distance_between(x: Tensor, y: Tensor, distance: Distance, over: str) -> Tensor:
    """The distance of activations, or of feature maps, for broadcast tensors ``(..., channels, positions)``.

    Args:
        x: one side.
        y: the other.
        distance: ``"abs"``, ``"euclidean"``, ``"cosine"`` (1 − cosine of the angle between unit vectors, see
            :func:`unit_maps`; 0 for two zero maps, 1 for one), or a function ``d(x, y)``.
        over: ``"activation"``: every scalar is compared with its like. ``"channel"``: the last axis is one vector,
            which a function must reduce.
    """
    if callable(distance):
        found: Tensor = distance(x, y)
        return found
    if distance == "cosine":
        return _cosine_distance(x, y)
    difference = torch.sub(x, y)
    if distance == "euclidean":
        norm: Tensor = torch.linalg.vector_norm(difference, dim=-1, dtype=torch.float64)  # which holds all squares
        return norm
    return difference.abs_() if over == "activation" else difference.abs_().sum(-1)


def unit_maps(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Feature maps divided by their norms, and which are zero everywhere, (samples, transformations, channels).

    A map of zeros stays one. Maps with infinite or NaN values are NaN.
    """
    flat = maps.flatten(3)
    if not maps.is_cpu:  # reading whether there are doubtful ones would synchronise
        unit, zero = _unit_vectors(flat)
        return unit.view(maps.shape), zero
    norm = flat.norm(dim=3)
    doubtful = ~((norm > 1 / LARGEST_NORM) & (norm < LARGEST_NORM))
    unit = flat / torch.where(doubtful, 1, norm)[..., None]
    if bool(doubtful.any()):
        unit[doubtful], zero = _unit_vectors(flat[doubtful])
        doubtful = doubtful.masked_scatter(doubtful, zero)
    return unit.view(maps.shape), doubtful


def zero_maps(maps: Tensor) -> Tensor:
    """Which feature maps are zero everywhere, (samples, transformations, channels)."""
    flat = maps.flatten(3)
    if not maps.is_cpu:
        largest: Tensor = torch.linalg.vector_norm(flat, torch.inf, dim=3)
        return largest == 0
    zero: Tensor = flat.norm(dim=3) == 0
    if bool(zero.any()):  # or their squares have vanished
        zero[zero.clone()] = (flat[zero] == 0).all(-1)
    return zero


def _unit_vectors(flat: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Vectors divided by their norms, in their type or another one, and which are zero.

    Norms are float64, which holds all squares of float32; those of float64 are taken of parts of the largest value.
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


def _cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """1 − cos of unit vectors as ‖x − y‖² / 2, which keeps its digits for small angles, where 1 − x·y loses them."""
    dark_x, dark_y = ~(x != 0).any(-1), ~(y != 0).any(-1)  # NaN is not 0
    return torch.where(dark_x ^ dark_y, 1.0, torch.sub(x, y).square_().sum(-1) / 2)
