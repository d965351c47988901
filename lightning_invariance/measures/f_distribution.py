"""p-values of F statistics, and corrections for many hypotheses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CORRECTIONS = ("bonferroni", "holm", "fdr_bh")


def rejected(p: Tensor, alpha: float, correction: str | None) -> Tensor:
    """Decide which hypotheses are rejected at level ``alpha``: bool of the shape of ``p``, false for NaN.

    Args:
        p: p-values of any shape, which are corrected together.
        alpha: the error rate, in (0, 1).
        correction: ``"bonferroni"`` and ``"holm"`` bound the probability of any false rejection, ``"fdr_bh"``
            (Benjamini and Hochberg) the expected fraction of false rejections; None compares each p with ``alpha``.
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
    return torch.where(whole.isinf(), 0.0, regularized_beta(d2 / whole, d1 * f / whole, d2 / 2, d1 / 2))


def regularized_beta(x: Tensor, complement: Tensor, a: float, b: float) -> Tensor:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22).

    ``complement`` is 1 − x, an argument because the difference would lose digits for x near 1.
    """
    mirrored = x > (a + 1) / (a + b + 2)  # the fraction of 1 − I_{1 − x}(b, a) converges faster there
    a_and_b = x.new_tensor([a, b])  # with Python's numbers `where` would return float32
    first, second = torch.where(mirrored, a_and_b[1], a_and_b[0]), torch.where(mirrored, a_and_b[0], a_and_b[1])
    x_or_complement, other = torch.where(mirrored, complement, x), torch.where(mirrored, x, complement)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)  # symmetric in a and b
    beta = _beta_fraction(x_or_complement, other, first, second, log_beta)
    return torch.where(mirrored, 1 - beta, beta).clamp(0, 1) + 0 * x  # NaN stays NaN


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
            # Most values converge in few steps: continue with the others only.
            fraction[waiting] = value
            waiting, value, c, d, x, a, b = (v[unfinished] for v in (waiting, value, c, d, x, a, b))
            if not len(waiting):
                break
    fraction[waiting] = value
    return front * fraction.view(shape)
