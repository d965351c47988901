"""The F distribution, and which of many hypotheses are rejected."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

CORRECTIONS = ("bonferroni", "holm", "fdr_bh")


def rejected_f(f: Tensor, d1: float, d2: float, alpha: float, correction: str | None) -> Tensor:
    """Which F statistics are rejected at level ``alpha``; NaN are not.

    Without a correction, and for Bonferroni's, F is compared with a critical value, which needs no p-values.
    """
    if correction not in (None, "bonferroni"):
        return rejected(f_survival(f, d1, d2), alpha, correction)
    return f >= _critical(d1, d2, alpha / (1 if correction is None else max(int((~f.isnan()).sum()), 1)))


@lru_cache(maxsize=1024)
def _critical(d1: float, d2: float, level: float) -> float:
    """The smallest F whose p-value does not exceed ``level``."""
    low, high = 0.0, 1.0
    while float(f_survival(torch.tensor([high]), d1, d2)) > level:
        high = 2 * high
    for _ in range(10):  # each step takes one of 64 parts: down to the last bit
        places = torch.linspace(low, high, 65, dtype=torch.float64)
        above = int((f_survival(places, d1, d2) > level).sum())
        low, high = float(places[above - 1]), float(places[min(above, 64)])
    return high


def rejected(p: Tensor, alpha: float, correction: str | None) -> Tensor:
    """Which hypotheses are rejected at level ``alpha``; NaN are none.

    Args:
        p: p-values of any shape; all of them are one family.
        alpha: the error rate, in (0, 1).
        correction: ``"bonferroni"`` and ``"holm"`` bound the chance of any false rejection, ``"fdr_bh"`` (Benjamini
            and Hochberg) the expected share of false ones among the rejected; None tests each by itself.
    """
    known = p.flatten().nan_to_num(nan=torch.inf)
    k = int(known.isfinite().sum())
    if correction in (None, "bonferroni"):
        return p <= alpha / (1 if correction is None else max(k, 1))
    ordered, order = known.sort()
    rank = torch.arange(1, len(known) + 1, device=p.device)
    if correction == "holm":
        passes = (ordered <= alpha / (k + 1 - rank).clamp_min(1)).long().cumprod(0).bool()
    else:
        below = ordered <= alpha * rank / max(k, 1)
        passes = rank <= (rank * below).max()
    return torch.zeros_like(passes).scatter(0, order, passes & ordered.isfinite()).view(p.shape)


def f_survival(f: Tensor, d1: float, d2: float) -> Tensor:
    """The probability of an F statistic with d1 and d2 degrees of freedom above ``f``, in float64."""
    f = f.double()
    whole = d2 + d1 * f
    return torch.where(f.isinf(), 0.0, regularized_beta(d2 / whole, d1 * f / whole, d2 / 2, d1 / 2))


def regularized_beta(x: Tensor, complement: Tensor, a: float, b: float) -> Tensor:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22).

    Args:
        x: in [0, 1], float64.
        complement: 1 − x, given apart because the difference loses digits for x near 1.
        a: above 0.
        b: above 0.
    """
    mirrored = x > (a + 1) / (a + b + 2)  # where the fraction of 1 − I_{1 − x}(b, a) converges faster
    a_and_b = x.new_tensor([a, b])  # of Python's numbers `where` would make float32
    first, second = torch.where(mirrored, a_and_b[1], a_and_b[0]), torch.where(mirrored, a_and_b[0], a_and_b[1])
    x_or_complement, other = torch.where(mirrored, complement, x), torch.where(mirrored, x, complement)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)  # the same for both
    found = _beta_fraction(x_or_complement, other, first, second, log_beta)
    return torch.where(mirrored, 1 - found, found).clamp(0, 1) + 0 * x


def _beta_fraction(x: Tensor, complement: Tensor, a: Tensor, b: Tensor, log_beta: float) -> Tensor:
    """x^a (1 − x)^b / (a B(a, b)) over the continued fraction, by the modified Lentz method."""
    front = torch.exp(a * x.log() + b * complement.log() - log_beta) / a
    tiny = 1e-300
    shape, (x, a, b) = x.shape, (values.flatten() for values in (x, a, b))
    c, d = torch.ones_like(x), 1 - (a + b) * x / (a + 1)
    d = 1 / torch.where(d.abs() < tiny, tiny, d)
    fraction, value, waiting = d.clone(), d, torch.arange(x.numel(), device=x.device)
    for step in range(1, 2000):
        for numerator in (
            step * (b - step) * x / ((a + 2 * step - 1) * (a + 2 * step)),
            -(a + step) * (a + b + step) * x / ((a + 2 * step) * (a + 2 * step + 1)),
        ):
            d, c = 1 + numerator * d, 1 + numerator / c
            d, c = 1 / torch.where(d.abs() < tiny, tiny, d), torch.where(c.abs() < tiny, tiny, c)
            value = value * d * c
        unfinished = (d * c - 1).abs() > 1e-15
        if step % 8 == 0 or not bool(unfinished.any()):
            # Most need few steps: go on with the others only.
            fraction[waiting] = value
            waiting, value, c, d, x, a, b = (v[unfinished] for v in (waiting, value, c, d, x, a, b))
            if not len(waiting):
                break
    fraction[waiting] = value
    return front * fraction.view(shape)
