"""Agreement of transformations on the largest channel, or predicted class: Consistency and EffectiveInvariance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.accumulators.winners import Confidences, Winners
from lightning_invariance.measures.base import Measure


class Consistency(Measure):
    r"""Consistency: the fraction of pairs of transformations under which one channel has the largest value.

    For the output of a classifier it is top-1 consistency (Zhang 2019): how often two transformations of a sample get
    one prediction. With :math:`n_c` transformations under which channel c is largest,

    .. math:: \frac{1}{n} \sum_{i=1}^{n} \sum_c \frac{n_c (n_c - 1)}{m (m - 1)}

    It is in ``[0, 1]`` and has no unit. Higher is more invariant; at 1 no transformation changes the largest channel.
    In feature maps the channels are compared at each position, and positions are averaged.

    The value is a scalar. It is NaN where an activation is NaN, for layers with one channel and, with a warning, for
    fewer than two transformations.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import Consistency
        >>> consistency = Consistency()
        >>> consistency.update(torch.tensor([[[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]]]))  # channels 1, 1 and 0 are largest
        >>> consistency.compute()  # one of three pairs agrees
        tensor(0.3333, dtype=torch.float64)
    """

    any_channel_axis = True
    needs = (Winners(),)
    higher_is_better = True
    has_intervals = True

    def value(self, sums: Sums) -> Tensor:
        """The mean fraction of pairs that agree."""
        fraction = sums["agreements"] / sums.n_samples
        return fraction if sums.n_channels > 1 else torch.full_like(fraction, torch.nan)

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """One value for the layer."""
        return ()


class EffectiveInvariance(Measure):
    r"""Effective invariance: agreement with the prediction on x, weighted by the confidence (Deng et al. 2022).

    With the class :math:`\hat y` predicted on x and :math:`\hat y_t` on t(x), and the probabilities p and p_t of
    :math:`\hat y` on both,

    .. math:: EI(x, t) = \sqrt{p\,p_t} \text{ if } \hat y_t = \hat y, \text{ else } 0

    averaged over samples and over the transformations other than the identity. It is in ``[0, 1]`` and has no unit.
    Higher is more invariant, and more confident; 1 are equal predictions without doubt. It needs no targets. It is
    meant for the output of a classifier; in feature maps the channels are compared at each position.

    The value is a scalar. It is NaN where an activation is NaN, and for layers with one channel.

    Args:
        probabilities: whether the layer gives probabilities. By default it gives logits, and softmax over the channels
            is applied.

    Raises:
        ValueError: In an evaluation, if the transformations do not include the identity. Where the measure is updated
            by hand, the first column is x; ``prepare`` says otherwise.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import EffectiveInvariance
        >>> measure = EffectiveInvariance(probabilities=True)
        >>> measure.update(torch.tensor([[[0.1, 0.9], [0.6, 0.4], [0.6, 0.4]]]))  # another class wins: 0
        >>> measure.update(torch.tensor([[[0.1, 0.9], [0.6, 0.4], [0.1, 0.9]]]))  # 0 and 0.9
        >>> measure.compute()
        tensor(0.2250, dtype=torch.float64)
    """

    any_channel_axis = True
    higher_is_better = True
    has_intervals = True

    def __init__(self, probabilities: bool = False, **kwargs: Any) -> None:
        super().__init__([Confidences(probabilities)], **kwargs)
        self.probabilities = probabilities

    def value(self, sums: Sums) -> Tensor:
        """The mean over samples."""
        found = sums["confidences"] / sums.n_samples
        return found if sums.n_channels > 1 else torch.full_like(found, torch.nan)

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """One value for the layer."""
        return ()
