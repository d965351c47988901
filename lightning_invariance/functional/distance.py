"""Distance measures of invariance (paper, section 2.5) on a whole ST tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_invariance.functional.variance import quotient
from lightning_invariance.precision import has_float64

#: A distance by name, or a function of two broadcast tensors; see :func:`distance_between`.
Distance: TypeAlias = str | Callable[[Tensor, Tensor], Tensor]

DISTANCES = ("abs", "squared", "euclidean", "cosine")


def distance_between(x: Tensor, y: Tensor, distance: Distance = "abs", over: str = "activation") -> Tensor:
    """The distance of two activations, or of two feature maps.

    Args:
        x: ``(..., channels, positions)``, or anything that broadcasts with ``y``.
        y: as ``x``.
        distance: ``"abs"``, ``"squared"``, ``"euclidean"``, ``"cosine"`` (1 − cosine of the angle; 0 for two zero maps,
            1 for one), or a function ``d(x, y)`` of broadcast tensors.
        over: ``"activation"``: every scalar is compared with its like. ``"channel"``: the last axis is one vector; a
            function must reduce it.

    Returns:
        Distances of the shape of ``x``, without the last axis for ``over="channel"``.
    """
    if callable(distance):
        found: Tensor = distance(x, y)
        return found
    if distance == "cosine":
        one_zero = (x == 0).all(-1) ^ (y == 0).all(-1)  # NaN is not 0
        apart = _unit(x) - _unit(y)
        return torch.where(one_zero, 1.0, apart.square().sum(-1) / 2).to(x.dtype)
    if over == "activation":
        return (x - y).square() if distance == "squared" else (x - y).abs()
    if distance == "euclidean":
        norm: Tensor = (x - y).norm(dim=-1)
        return norm
    return ((x - y).square() if distance == "squared" else (x - y).abs()).sum(-1)


def average_distance(x: Tensor, distance: Distance = "abs", over: str = "activation") -> Tensor:
    r"""Mean distance of all pairs along the first axis, each with itself included (paper, eq. 6).

    .. math:: \frac{1}{n^2} \sum_{i=1}^{n} \sum_{j=1}^{n} d(x_i, x_j)

    Args:
        x: ``(values, ..., channels, positions)``.
        distance: see :func:`distance_between`.
        over: see :func:`distance_between`.
    """
    total = torch.zeros(())
    for i in range(len(x)):
        for j in range(len(x)):
            total = total + distance_between(x[i], x[j], distance, over)
    return total / len(x) ** 2


def transformation_distance(st: Tensor, distance: Distance = "abs", over: str = "activation") -> Tensor:
    r"""Transformation Distance: how far apart an activation is under different transformations (paper, eq. 5).

    .. math:: TD = \frac{1}{n} \sum_{i=1}^{n} \mathrm{AverageDistance}(\mathbf{ST}[i, :])

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        distance: see :func:`distance_between`.
        over: ``"activation"`` or ``"channel"``.

    Returns:
        Tensor of ``activation_shape``, or ``(channels,)``, in ``[0, inf)``; 0 is invariant.
    """
    rows = _channels_first(st).transpose(0, 1)
    return _shaped(average_distance(rows, distance, over).mean(0), st, over)


def sample_distance(st: Tensor, distance: Distance = "abs", over: str = "activation") -> Tensor:
    r"""Sample Distance: how far apart an activation is for different samples (paper, eq. 6).

    .. math:: SD = \frac{1}{m} \sum_{j=1}^{m} \mathrm{AverageDistance}(\mathbf{ST}[:, j])

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        distance: see :func:`distance_between`.
        over: ``"activation"`` or ``"channel"``.

    Returns:
        Tensor of ``activation_shape``, or ``(channels,)``, in ``[0, inf)``.
    """
    return _shaped(average_distance(_channels_first(st), distance, over).mean(0), st, over)


def normalized_distance(st: Tensor, distance: Distance = "abs", over: str = "activation") -> Tensor:
    r"""Normalized Distance: transformation distance over sample distance (paper, eq. 5); 0/0 is 1, x/0 is inf.

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        distance: see :func:`distance_between`.
        over: ``"activation"`` or ``"channel"``.

    Returns:
        Tensor of ``activation_shape``, or ``(channels,)``, in ``[0, inf]``; 0 is invariant.
    """
    return quotient(transformation_distance(st, distance, over), sample_distance(st, distance, over))


def _unit(x: Tensor) -> Tensor:
    """Vectors along the last axis divided by their norms; 1 − cos is then half the square of their difference.

    In float64, since float32 rounds unit vectors that are nearly parallel. 0 stays 0, and what is infinite becomes NaN.
    """
    parts = x.double() if has_float64(x.device) else x
    parts = parts / _or_one(parts.abs().amax(-1, keepdim=True))  # whose squares neither vanish nor overflow
    return parts / _or_one(parts.norm(dim=-1, keepdim=True))


def _or_one(sizes: Tensor) -> Tensor:
    return sizes.masked_fill(sizes == 0, 1)


def _channels_first(st: Tensor) -> Tensor:
    """``(n, m, channels, positions)``."""
    n, m, *shape = st.shape
    return st.reshape(n, m, shape[0] if shape else 1, -1)


def _shaped(values: Tensor, st: Tensor, over: str) -> Tensor:
    return values if over == "channel" else values.reshape(st.shape[2:])
