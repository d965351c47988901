"""The invariance measure of Goodfellow et al. (2009) on a whole ST tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def goodfellow(st: Tensor, alpha: float = 0.01, threshold: str = "normal", sign: int = 1) -> Tensor:
    r"""Local over global firing rate (Goodfellow, Lee, Le, Saxe and Ng 2009; paper, section 3.2).

    A unit fires where ``sign`` times its activation lies above a threshold that a share ``alpha`` of all values should
    exceed. The global rate G is the share of all n·m values that fire; the local rate L is the share of values that
    fire in the trajectories (rows) of the samples that fire the unit somewhere.

    .. math:: S = L / G

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        alpha: share of values that should fire.
        threshold: ``"normal"``: mean + z·std with z from the normal distribution (the paper's adaptation);
            ``"quantile"``: of the values themselves.
        sign: 1, or -1 for units that fire when they are low.

    Returns:
        Tensor of ``activation_shape``, in ``[1, n]``; higher is more invariant. NaN for units that never fire.
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
