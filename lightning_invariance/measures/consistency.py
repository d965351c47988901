"""Whether the same unit of a layer wins under all transformations."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.accumulators.winners import Winners
from lightning_invariance.measures.base import Measure


class Consistency(Measure):
    r"""Consistency: for how many pairs of transformations the same unit of a layer has the largest value.

    Of the output of a classifier it is the share of pairs of transformations under which the prediction is the same
    (top-1 consistency, Zhang 2019). With :math:`n_c` transformations under which unit c wins,

    .. math:: \frac{1}{n} \sum_{i=1}^{n} \sum_c \frac{n_c (n_c - 1)}{m (m - 1)}

    It lies in ``[0, 1]`` and has no unit. Higher is more invariant; 1 is a winner that no transformation changes. It is
    one number for the layer. In feature maps the channels of each position compete, and positions are averaged.

    As output of ``forward`` and ``compute`` the metric returns

    - ``consistency`` (:class:`~torch.Tensor`): float64 scalar; NaN where an activation is NaN, where the layer has one
      unit, which always wins, and, with a warning, for fewer than two transformations.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import Consistency
        >>> consistency = Consistency()
        >>> consistency.update(torch.tensor([[[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]]]))  # 1, 1 and 0 win
        >>> consistency.compute()  # one pair of three
        tensor(0.3333, dtype=torch.float64)
    """

    any_channel_axis = True
    needs = (Winners(),)
    higher_is_better = True
    has_intervals = True
    is_mean_over_samples = True

    def value(self, sums: Sums) -> Tensor:
        """The mean share of pairs with one winner."""
        share = sums["agreements"] / sums.n_samples
        return share if sums.n_channels > 1 else torch.full_like(share, torch.nan)

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """One number for the layer."""
        return ()
