"""The invariance measure of Goodfellow et al. (2009) of a whole ST tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def goodfellow(st: Tensor, alpha: float = 0.01, threshold: str = "normal", sign: int = 1) -> Tensor:
    r"""Local over global firing rate (Goodfellow, Lee, Le, Saxe and Ng 2009; paper, section 3.2).

    An activation fires where ``sign`` times its value is above a threshold that a fraction ``alpha`` of all values
    should exceed. The global rate G is the fraction of all n·m values that fire; the local rate L is the fraction that
    fire within the rows with at least one value that fires.

    .. math:: S = L / G

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        alpha: fraction of values that should fire.
        threshold: ``"normal"``: mean + z·std with z from the normal distribution (the paper's adaptation);
            ``"quantile"``: the 1 − alpha quantile of the values.
        sign: 1, or -1 for activations that fire at low values.

    Returns:
        Tensor of ``activation_shape``, in ``[1, n]``; higher is more invariant. NaN for activations that never fire.
    """
    x = sign * st
    n, m = x.shape[:2]
    values = x.flatten(0, 1)
    if threshold == "normal":
        z = torch.special.ndtri(torch.tensor(1 - alpha, dtype=torch.float64)).to(x.dtype)
        level = values.mean(0) + z * values.std(0)
    else:
        level = values.sort(0, descending=True).values[int(round(alpha * (n * m), 9))]
    fires = x > level
    local = fires.to(x.dtype).mean(1).sum(0) / fires.any(1).sum(0)
    value: Tensor = local / fires.to(x.dtype).mean((0, 1))
    return value
