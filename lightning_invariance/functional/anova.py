"""The ANOVA measure of invariance (paper, section 2.3) on a whole ST tensor."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

#: Of the Gauss-Legendre quadrature on [−1, 1].
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def anova(st: Tensor, paired: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    r"""Analysis of variance: do the means of an activation differ between transformations? (paper, section 2.3).

    With :math:`SS_B = n \sum_j (\bar x_{\cdot j} - \bar x)^2` and the squared deviations within columns
    :math:`SS_W`, or for ``paired=True`` the part of them that is not due to the samples
    :math:`SS_E = SS_W - m \sum_i (\bar x_{i \cdot} - \bar x)^2`:

    .. math::
        F = \frac{SS_B / (m - 1)}{SS_W / (m (n - 1))}, \qquad
        F_{paired} = \frac{SS_B / (m - 1)}{SS_E / ((m - 1)(n - 1))}

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        paired: the repeated-measures F, for the same samples under every transformation; the paper's is one-way.

    Returns:
        F in ``[0, inf]``, its p-value, and the effect size :math:`\eta_p^2 = SS_B / (SS_B + SS_{W \text{ or } E})` in
        ``[0, 1]``: tensors of ``activation_shape``. A constant activation has F = 0, p = 1 and no effect.
    """
    n, m = st.shape[:2]
    st = st - st[:1, :1]  # a shift changes nothing, and the mean of a constant would round
    columns, rows, mean = st.mean(0), st.mean(1), st.mean((0, 1))
    between = n * (columns - mean).square().sum(0)
    within = (st - columns).square().sum((0, 1))
    if paired:
        within = (st - columns - rows[:, None] + mean).square().sum((0, 1))
    d1, d2 = m - 1, (m - 1) * (n - 1) if paired else m * (n - 1)
    constant = (between == 0) & (within == 0)
    f = torch.where(constant, 0.0, (between / d1) / (within / d2))
    p = [p_value(value, d1, d2) for value in f.flatten().tolist()]
    effect = torch.where(constant, 0.0, between / (between + within))
    return f, torch.tensor(p, dtype=torch.float64).view(f.shape), effect


def p_value(f: float, d1: int, d2: int) -> float:
    r"""The probability that an F statistic with d1 and d2 degrees of freedom exceeds ``f``, by numerical integration.

    With :math:`x = d_2 / (d_2 + d_1 f)` it is :math:`\frac{1}{B} \int_0^x t^{d_2/2 - 1} (1 - t)^{d_1/2 - 1} dt`, and
    with :math:`t = \sin^2 \theta` the integrand is smooth: :math:`2 \sin^{d_2 - 1} \theta \cos^{d_1 - 1} \theta`.
    """
    if math.isnan(f) or math.isinf(f):
        return math.nan if math.isnan(f) else 0.0
    end = math.atan2(math.sqrt(d2), math.sqrt(d1 * f))
    # The integrand is negligible more than 40 of its widths below the end, or below its highest point before that.
    highest = min(end, math.atan2(math.sqrt(d2), math.sqrt(d1)))
    start = max(0.0, highest - 40 / math.sqrt(d1 + d2))
    theta = start + (end - start) * (NODES + 1) / 2
    log_b = math.lgamma(d1 / 2) + math.lgamma(d2 / 2) - math.lgamma((d1 + d2) / 2)
    logs = (d2 - 1) * np.log(np.sin(theta)) + (d1 - 1) * np.log(np.cos(theta)) + math.log(2) - log_b
    return min(1.0, float(np.sum(WEIGHTS * np.exp(logs)) * (end - start) / 2))
