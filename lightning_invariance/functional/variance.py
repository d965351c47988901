"""Variance measures of invariance (paper, section 2.4) of a whole ST tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def transformation_variance(st: Tensor, squared: bool = True) -> Tensor:
    r"""Transformation Variance: the variance over transformations of a sample (paper, eq. 2).

    .. math:: TV = \frac{1}{n} \sum_{i=1}^{n} \mathrm{Var}(\mathbf{ST}[i, :])

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        squared: if false, the mean of standard deviations instead of variances.

    Returns:
        Tensor of ``activation_shape``, in ``[0, inf)``, in units of the activation squared; 0 is invariant.
    """
    variance = st.var(dim=1)
    return (variance if squared else variance.sqrt()).mean(dim=0)


def sample_variance(st: Tensor, squared: bool = True) -> Tensor:
    r"""Sample Variance: the variance over samples (paper, eq. 3).

    .. math:: SV = \frac{1}{m} \sum_{j=1}^{m} \mathrm{Var}(\mathbf{ST}[:, j])

    Arguments, shape, range and unit are as for :func:`transformation_variance`.
    """
    variance = st.var(dim=0)
    return (variance if squared else variance.sqrt()).mean(dim=0)


def normalized_variance(st: Tensor, squared: bool = True) -> Tensor:
    r"""Normalized Variance: transformation variance over sample variance (paper, eq. 4).

    .. math:: NV = \frac{TV}{SV}, \qquad \frac{0}{0} = 1, \quad \frac{x}{0} = \infty

    Args:
        st: ST tensor ``(samples, transformations, *activation_shape)``.
        squared: if false, the quotient of mean standard deviations.

    Returns:
        Tensor of ``activation_shape``, in ``[0, inf]``, without unit; 0 is invariant, below 1 approximately invariant.
    """
    return quotient(transformation_variance(st, squared), sample_variance(st, squared))


def quotient(transformation: Tensor, sample: Tensor) -> Tensor:
    """Divide with the paper's special cases (section 2.4.3): 0/0 is 1 (dead activation), x/0 is inf."""
    dead = (transformation == 0) & (sample == 0)
    return torch.where(dead, 1.0, transformation / sample)
