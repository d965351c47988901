"""Consistency: the agreement of the largest channel, or predicted class, between transformations."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.accumulators.winners import Winners
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
