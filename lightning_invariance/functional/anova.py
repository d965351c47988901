"""The ANOVA measure of invariance (paper, section 2.3) of a whole ST tensor."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

#: Gauss-Legendre quadrature on [−1, 1].
NODES, WEIGHTS = np.polynomial.legendre.leggauss(400)


def anova(st: Tensor, paired: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    r"""Analysis of variance: do the means of an activation differ between transformations? (paper, section 2.3).

    With :math:`SS_B = n \sum_j (\bar x_{\cdot j} - \bar x)^2`, the squared deviations within columns :math:`SS_W` and,
    without the differences between samples, :math:`SS_E = SS_W - m \sum_i (\bar x_{i \cdot} - \bar x)^2`:

    .. math::
        F = \frac{SS_B / (m - 1)}{SS_W / (m (n - 1))}, \qquad
        F_{paired} = \frac{SS_B / (m - 1)}{SS_E / ((m - 1)(n - 1))}

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        paired: repeated-measures F, with the samples as subjects; the paper's F is one-way.

    Returns:
        F in ``[0, inf]``, its p-value, and the effect size
        :math:`\eta_p^2 = SS_B / (SS_B + SS_{W \text{ or } E})` in ``[0, 1]``: tensors of ``activation_shape``. For
        ``paired=True`` the degrees of freedom of the p-value are corrected for sphericity by Greenhouse and Geisser's
        ε, pooled over the activations. A constant activation has F = 0, p = 1 and no effect.
    """
    n, m = st.shape[:2]
    # F ignores shifts; without this one the mean of a constant would be rounded.
    st = st - (st[:, :1] if paired else st[:1, :1])
    columns, rows = st.mean(0), st.mean(1)
    # Sums of equal columns may differ by rounding.
    columns = torch.where((st == st[:, :1]).all(0).all(0), 0.0, columns)
    between = n * (columns - columns.mean(0)).square().sum(0)
    deviations = st - rows[:, None] if paired else st
    deviations = deviations - deviations[:1]
    deviations = deviations - deviations.mean(0)
    within = deviations.square().sum((0, 1))
    d1, d2, epsilon = m - 1, (m - 1) * (n - 1) if paired else m * (n - 1), 1.0
    if paired and within.nansum() > 0:
        columns_of_units = deviations.reshape(n, m, -1).nan_to_num(0, 0, 0)
        s = torch.einsum("iju,ilu->jl", columns_of_units, columns_of_units)
        epsilon = max(1 / d1, float(s.trace() ** 2 / (d1 * (s @ s).trace())))
    constant = (between == 0) & (within == 0)
    f = torch.where(constant, 0.0, (between / d1) / (within / d2))
    p = [p_value(value, epsilon * d1, epsilon * d2) for value in f.flatten().tolist()]
    effect = torch.where(constant, 0.0, between / (between + within))
    return f, torch.tensor(p, dtype=torch.float64).view(f.shape), effect


def p_value(f: float, d1: float, d2: float) -> float:
    r"""The probability that an F statistic with d1 and d2 degrees of freedom exceeds ``f``, by numerical integration.

    With :math:`x = d_2 / (d_2 + d_1 f)` it is :math:`\frac{1}{B} \int_0^x t^{d_2/2 - 1} (1 - t)^{d_1/2 - 1} dt`, and
    with :math:`t = \sin^2 \theta` the integrand is smooth: :math:`2 \sin^{d_2 - 1} \theta \cos^{d_1 - 1} \theta`.
    """
    if math.isnan(f) or math.isinf(f) or f == 0:
        return math.nan if math.isnan(f) else float(f == 0)
    end = math.atan2(math.sqrt(d2), math.sqrt(d1 * f))
    # The integrand is negligible more than 40 of its widths below its maximum, or below an end before the maximum.
    highest = min(end, math.atan2(math.sqrt(d2), math.sqrt(d1)))
    start = max(0.0, highest - 40 / math.sqrt(d1 + d2))
    # In w, with π/2 − θ = w⁴, it is smooth up to θ = π/2, also for fractional degrees of freedom.
    first, last = ((math.pi / 2 - theta) ** 0.25 for theta in (end, start))
    w = first + (last - first) * (NODES + 1) / 2
    log_b = math.lgamma(d1 / 2) + math.lgamma(d2 / 2) - math.lgamma((d1 + d2) / 2)
    logs = (d2 - 1) * np.log(np.cos(w**4)) + (d1 - 1) * np.log(np.sin(w**4)) + math.log(2) - log_b
    return min(1.0, float(np.sum(WEIGHTS * np.exp(logs) * 4 * w**3) * (last - first) / 2))
