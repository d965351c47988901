"""p-values of F statistics, and corrections for many hypotheses."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import betainc
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
    x = f.cpu().double()  # scipy.special.fdtrc would lose the digits of small probabilities
    share = (d2 / (d2 + d1 * x)).numpy()
    return torch.from_numpy(np.asarray(betainc(d2 / 2, d1 / 2, share))).to(f.device)
