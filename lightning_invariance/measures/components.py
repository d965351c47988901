"""Where the variance of an activation comes from: samples, transformations, or what each sample makes of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_invariance.accumulators import Deviations, means_of
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.base import Measure


class MeanSquares(NamedTuple):
    """The mean squares of the two-way layout, each ``(activations,)``.

    Attributes:
        samples: between rows, MSR.
        transformations: between columns, MSC.
        rest: of the interaction, MSE: what each sample makes of each transformation in its own way.
    """

    samples: Tensor
    transformations: Tensor
    rest: Tensor


def mean_squares(sums: Sums) -> MeanSquares:
    """The mean squares, given the states of ``Deviations(exact=True)``: the rest is a difference of sums."""
    n, m = sums.n_samples, sums.n_transformations
    means = means_of(sums.states)
    between = n * (means - means.mean(0)).square().sum(0)
    rest = (sums["row_spread"] - between).clamp_min(0)
    of_samples = (sums["column_spread"][0] - rest).clamp_min(0)
    return MeanSquares(of_samples / (n - 1), between / (m - 1), rest / ((n - 1) * (m - 1)))


class IntraclassCorrelation(Measure):
    r"""Intraclass Correlation (ICC): how well a value under one transformation tells that under another.

    Transformations take the place of raters, samples that of subjects (Shrout and Fleiss 1979; McGraw and Wong 1996,
    ICC(C,1) and ICC(A,1)). With the mean squares between samples R, between transformations C, and of the rest E:

    .. math:: ICC(C,1) = \frac{R - E}{R + (m - 1) E}, \qquad
        ICC(A,1) = \frac{R - E}{R + (m - 1) E + \frac{m}{n} (C - E)}

    ICC(C,1) lies in ``[-1 / (m - 1), 1]``, ICC(A,1) in ``[-inf, 1]``; they have no unit. Higher is more invariant: 1 is
    invariant, around 0 transformations leave nothing of the sample. ICC(C,1) forgives a transformation that shifts all
    samples alike, ICC(A,1) does not.
    The normalised variance is :math:`1 - ICC(C,1) + \frac{\sigma_T^2}{\sigma_S^2 + \sigma_E^2}`, with the variance
    components of transformations, samples and the rest, estimated from the mean squares: a unit is above 1 exactly
    where the common effect of the transformations exceeds that of the samples.

    As output of ``forward`` and ``compute`` the metric returns

    - ``icc`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``; NaN for activations that never change,
      and, with a warning, for fewer than two samples or transformations.

    Args:
        agreement: ICC(A,1) instead of ICC(C,1).
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``agreement`` is no bool.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import IntraclassCorrelation
        >>> icc = IntraclassCorrelation()
        >>> icc.update(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))  # every sample is shifted alike
        >>> icc.compute()
        tensor(1., dtype=torch.float64)
    """

    any_channel_axis = True
    needs = (Deviations(exact=True),)
    higher_is_better = True
    least_samples = 2

    def __init__(self, agreement: bool = False, **kwargs: Any) -> None:
        if not isinstance(agreement, bool):
            raise ValueError(f"Expected argument `agreement` to be a bool, but got {agreement!r}.")
        super().__init__(**kwargs)
        self.agreement = agreement

    def value(self, sums: Sums) -> Tensor:
        """ICC(C,1) or ICC(A,1) of every activation."""
        n, m = sums.n_samples, sums.n_transformations
        found = mean_squares(sums)
        whole = found.samples + (m - 1) * found.rest
        if self.agreement:
            whole = whole + m / n * (found.transformations - found.rest)
        return torch.where(Deviations().dead(sums.states), torch.nan, (found.samples - found.rest) / whole)


class MainEffect(Measure):
    r"""Main effect: which part of the transformation variance moves all samples alike.

    The transformation variance is the sum of a main effect and an interaction, :math:`TV = \frac{C + (n - 1) E}{n}`
    with the mean squares of :class:`IntraclassCorrelation`. The main effect is :math:`\frac{C / n}{TV}`.

    It lies in ``[0, 1]``, and has no unit. 1: a transformation shifts the activation by the same for every sample, as a
    bias could undo. Near 1/n: each sample changes in its own way. Neither is more invariant.

    As output of ``forward`` and ``compute`` the metric returns

    - ``main_effect`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``; NaN for activations that no
      transformation changes, and, with a warning, for fewer than two samples or transformations.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import MainEffect
        >>> effect = MainEffect()
        >>> effect.update(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))  # every sample is shifted alike
        >>> effect.compute()
        tensor(1., dtype=torch.float64)
    """

    any_channel_axis = True
    needs = (Deviations(exact=True),)
    higher_is_better = None
    least_samples = 2

    def value(self, sums: Sums) -> Tensor:
        """The part of the main effect in the transformation variance of every activation."""
        found = mean_squares(sums)
        variance = sums["row_spread"] / (sums.n_samples * (sums.n_transformations - 1))
        return torch.where(variance == 0, torch.nan, (found.transformations / sums.n_samples / variance).clamp(0, 1))
