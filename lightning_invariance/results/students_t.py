"""Student's t distribution: p-values of single statistics, and quantiles for confidence intervals."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor


def two_sided(t: float, freedom: float) -> float:
    """Return the probability of a statistic further from 0 than ``t``, for ``freedom`` degrees of freedom."""
    if math.isinf(t):
        return 0.0
    whole = freedom + t * t
    return _incomplete_beta(freedom / whole, t * t / whole, freedom / 2, 0.5)


@lru_cache(maxsize=4096)
def t_quantile(confidence: float, freedom: float) -> float:
    """Return the half-width of a two-sided interval in standard errors.

    The tail is convex, so that Newton's steps from the normal quantile, which is smaller, never overshoot.
    """
    t = NormalDist().inv_cdf((1 + confidence) / 2)
    constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    for _ in range(200):
        density = math.exp(constant - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        step = (two_sided(t, freedom) - (1 - confidence)) / (2 * density)
        t += step
        if abs(step) <= 1e-14 * t:
            break
    return t


def t_quantiles(confidence: float, freedom: Tensor) -> Tensor:
    """Interpolate :func:`t_quantile` for many degrees of freedom, with a relative error below 1e-4."""
    known = _grid(confidence)
    place = (1 - 1 / freedom.double()) * (len(known) - 1)
    below = place.floor().clamp(0, len(known) - 2).long()
    weight = (place - below).clamp(0, 1)
    return known[below] * (1 - weight) + known[below + 1] * weight


@lru_cache(maxsize=16)
def _grid(confidence: float) -> Tensor:
    """Compute quantiles for 1 / freedom = 1, 255/256, …, 1/256 and 0, which is the normal distribution."""
    of_t = [t_quantile(confidence, 256 / i) for i in range(256, 0, -1)]
    return torch.tensor([*of_t, NormalDist().inv_cdf((1 + confidence) / 2)], dtype=torch.float64)


def _incomplete_beta(x: float, complement: float, a: float, b: float) -> float:
    """Compute the regularised incomplete beta function I_x(a, b) from its continued fraction (DLMF 8.17.22).

    ``complement`` is 1 − x, an argument because the subtraction would lose digits.
    """
    if x <= 0 or complement <= 0:
        return float(x > 0)
    if x > (a + 1) / (a + b + 2):  # where the fraction of the complement converges faster
        return 1 - _incomplete_beta(complement, x, b, a)
    front = math.exp(a * math.log(x) + b * math.log(complement) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for step in range(1, 2000):
        for numerator in (
            step * (b - step) * x / ((a + 2 * step - 1) * (a + 2 * step)),
            -(a + step) * (a + b + step) * x / ((a + 2 * step) * (a + 2 * step + 1)),
        ):
            d, c = 1 / (1 + numerator * d), 1 + numerator / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a
