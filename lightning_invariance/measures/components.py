"""Intraclass correlation and main effect: variance components of samples, transformations and their interaction."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_invariance.accumulators import Deviations, PairedDeviations
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.base import Measure


def mean_squares(sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """The mean squares R of samples, C of transformations and E of their interaction, each ``(activations,)``."""
    n = sums.n_samples
    of_transformations, of_interaction = paired_mean_squares(sums)
    interaction = sums["paired_error"].clamp_min(0)
    of_samples = (sums["column_spread"][0] - interaction).clamp_min(0)
    return of_samples / (n - 1), of_transformations, of_interaction


def paired_mean_squares(sums: Sums) -> tuple[Tensor, Tensor]:
    """The mean squares C of transformations and E of their interaction with samples, each ``(activations,)``.

    They come from differences within rows, and keep their digits where columns lie far apart.
    """
    n, m = sums.n_samples, sums.n_transformations
    means = sums["paired_means"] - sums["paired_means"][0]  # so that C is exactly 0 for equal columns
    between = n * (means - means.mean(0)).square().sum(0)
    return between / (m - 1), sums["paired_error"].clamp_min(0) / ((n - 1) * (m - 1))


class IntraclassCorrelation(Measure):
    r"""Intraclass Correlation (ICC): how well the value under one transformation predicts the value under another.

    Samples are the subjects and transformations the raters of ICC(C,1) and ICC(A,1) (Shrout and Fleiss 1979; McGraw and
    Wong 1996). With the mean squares R between samples, C between transformations and E of their interaction:

    .. math:: ICC(C,1) = \frac{R - E}{R + (m - 1) E}, \qquad
        ICC(A,1) = \frac{R - E}{R + (m - 1) E + \frac{m}{n} (C - E)}

    ICC(C,1) is in ``[-1 / (m - 1), 1]``, ICC(A,1) in ``[-inf, 1]``; neither has a unit. Higher is more invariant: 1 is
    invariant, and around 0 the sample cannot be recognised after a transformation. ICC(C,1) ignores shifts that are
    equal for all samples, ICC(A,1) does not.

    The normalised variance is :math:`1 - ICC(C,1) + \frac{\sigma_T^2}{\sigma_S^2 + \sigma_E^2}` with the variance
    components of transformations, samples and interaction, as estimated from the mean squares. It is above 1 exactly
    where the main effect of the transformations exceeds the main effect of the samples.

    The value has ``activation_shape``. It is NaN for activations that never change, or (but for ICC(A,1)) only with the
    transformation, and with a warning for fewer than two samples or transformations.

    Args:
        agreement: compute ICC(A,1) instead of ICC(C,1).

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import IntraclassCorrelation
        >>> icc = IntraclassCorrelation()
        >>> icc.update(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))  # every sample is shifted by 1
        >>> icc.compute()
        tensor(1., dtype=torch.float64)
    """

    any_channel_axis = True
    needs = (Deviations(), PairedDeviations())
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
        r, c, e = mean_squares(sums)
        total = r + (m - 1) * e
        if self.agreement:
            total = total + m / n * (c - e)
        return (r - e) / total


class MainEffect(Measure):
    r"""Main effect: the fraction of the transformation variance that is common to all samples.

    The transformation variance is the sum of a main effect and an interaction, :math:`TV = \frac{C + (n - 1) E}{n}`
    with the mean squares of :class:`IntraclassCorrelation`. The main effect is :math:`\frac{C / n}{TV}`.

    It is in ``[0, 1]`` and has no unit; neither direction is more invariant. At 1 a transformation shifts all samples
    by one amount, which a bias could undo; near 1/n each sample changes in its own way.

    The value has ``activation_shape``. It is NaN for activations that no transformation changes and, with a warning,
    for fewer than two samples or transformations.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import MainEffect
        >>> effect = MainEffect()
        >>> effect.update(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))  # every sample is shifted by 1
        >>> effect.compute()
        tensor(1., dtype=torch.float64)
    """

    any_channel_axis = True
    needs = (PairedDeviations(),)
    higher_is_better = None
    least_samples = 2

    def value(self, sums: Sums) -> Tensor:
        """C / (C + (n − 1) E) of every activation."""
        effect, interaction = paired_mean_squares(sums)
        return effect / (effect + (sums.n_samples - 1) * interaction)
