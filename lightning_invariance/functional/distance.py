"""Distance measures of invariance (paper, section 2.5) of a whole ST tensor."""

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
    """Compute distances between activations, or between feature maps.

    Args:
        x: ``(..., channels, positions)``, or any shape that broadcasts with ``y``.
        y: as ``x``.
        distance: ``"abs"``, ``"squared"``, ``"euclidean"``, ``"cosine"`` (1 − cosine of the angle; 0 for two zero maps,
            1 for one), or a function ``d(x, y)`` of broadcast tensors.
        over: ``"activation"``: every scalar by itself. ``"channel"`` (and ``"layer"``): the last axis is one vector,
            which a function must reduce.

    Returns:
        Distances in the broadcast shape, without the last axis for ``over="channel"``.
    """
    if callable(distance):
        value: Tensor = distance(x, y)
        return value
    if distance == "cosine":
        one_zero = (x == 0).all(-1) ^ (y == 0).all(-1)  # NaN is not 0
        difference = _unit(x) - _unit(y)
        return torch.where(one_zero, 1.0, difference.square().sum(-1) / 2).to(x.dtype)
    if over == "activation":
        return (x - y).square() if distance == "squared" else (x - y).abs()
    if distance == "euclidean":
        norm: Tensor = (x - y).norm(dim=-1)
        return norm
    return ((x - y).square() if distance == "squared" else (x - y).abs()).sum(-1)


def average_distance(x: Tensor, distance: Distance = "abs", over: str = "activation") -> Tensor:
    r"""Mean distance of all pairs along the first axis, including each value with itself (paper, eq. 6).

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
    r"""Transformation Distance: the mean distance between transformations of a sample (paper, eq. 5).

    .. math:: TD = \frac{1}{n} \sum_{i=1}^{n} \mathrm{AverageDistance}(\mathbf{ST}[i, :])

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        distance: see :func:`distance_between`.
        over: see :func:`distance_between`; ``"layer"`` takes all activations as one vector.

    Returns:
        Tensor of ``activation_shape``, ``(channels,)`` for ``over="channel"``, or ``()`` for ``over="layer"``; in
        ``[0, inf)``, where 0 is invariant.
    """
    rows = _channels_first(st, over).transpose(0, 1)
    return _shaped(average_distance(rows, distance, over).mean(0), st, over)


def sample_distance(st: Tensor, distance: Distance = "abs", over: str = "activation") -> Tensor:
    r"""Sample Distance: the mean distance between samples (paper, eq. 5).

    .. math:: SD = \frac{1}{m} \sum_{j=1}^{m} \mathrm{AverageDistance}(\mathbf{ST}[:, j])

    Arguments and shape are as for :func:`transformation_distance`; in ``[0, inf)``.
    """
    return _shaped(average_distance(_channels_first(st, over), distance, over).mean(0), st, over)


def normalized_distance(st: Tensor, distance: Distance = "abs", over: str = "activation") -> Tensor:
    """Normalized Distance: transformation distance over sample distance (paper, eq. 5); 0/0 is 1, x/0 is inf.

    Arguments and shape are as for :func:`transformation_distance`; in ``[0, inf]``; 0 is invariant.
    """
    return quotient(transformation_distance(st, distance, over), sample_distance(st, distance, over))


def _unit(x: Tensor) -> Tensor:
    """Divide vectors along the last axis by their norms: 1 − cos is then half the square of their difference.

    In float64, since float32 cannot resolve nearly parallel unit vectors. 0 stays 0, and infinite values become NaN.
    """
    vectors = x.double() if has_float64(x.device) else x
    vectors = vectors / _or_one(vectors.abs().amax(-1, keepdim=True))  # squares neither underflow nor overflow
    return vectors / _or_one(vectors.norm(dim=-1, keepdim=True))


def _or_one(sizes: Tensor) -> Tensor:
    return sizes.masked_fill(sizes == 0, 1)


def _channels_first(st: Tensor, over: str) -> Tensor:
    """``(n, m, channels, positions)``; one channel for ``over="layer"``."""
    n, m, *shape = st.shape
    return st.reshape(n, m, shape[0] if shape and over != "layer" else 1, -1)


def _shaped(values: Tensor, st: Tensor, over: str) -> Tensor:
    return values if over == "channel" else values.reshape(() if over == "layer" else st.shape[2:])
