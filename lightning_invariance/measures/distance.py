"""Distance measures of invariance (paper, section 2.5), online."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_invariance.accumulators.distances import Distance
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.aggregation import AGGREGATES, aggregate_maps
from lightning_invariance.measures.base import Measure, quotient
from lightning_invariance.measures.pair_distances import pair_distances

#: Units of distances, of which cosines have none.
UNITS = {"abs": "activation", "euclidean": "activation", "squared": "activation²", "cosine": ""}


class MeasureOfDistances(Measure):
    """A function of the transformation distance and the sample distance.

    Args:
        distance: see :class:`TransformationDistance`; so are the others.
        over: ``"activation"`` or ``"channel"``.
        samples: how many samples a group holds, or each column keeps.
        aggregate: how the values of a feature map are made one; None keeps them.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    has_intervals = True

    #: Which of the two distances the measure is made of.
    of_rows: ClassVar[bool] = True
    of_columns: ClassVar[bool] = True

    def __init__(
        self,
        distance: Distance = "abs",
        over: str = "activation",
        samples: int = 16,
        aggregate: str | None = None,
        **kwargs: Any,
    ) -> None:
        pairs = pair_distances(distance, over, samples)
        if aggregate not in AGGREGATES:
            raise ValueError(f"Expected argument `aggregate` to be one of {AGGREGATES}, but got {aggregate!r}.")
        super().__init__(pairs.needs(self.of_rows, self.of_columns), **kwargs)
        self.distance, self.over, self.samples, self.aggregate = distance, over, samples, aggregate
        self.pairs = pairs
        if self.unit and not callable(distance):
            self.unit = UNITS[distance]

    @property
    def takes_any_channel_axis(self) -> bool:
        """Not with a function, which is told that the first axis holds the channels."""
        return not callable(self.distance) and super().takes_any_channel_axis

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """The activation's, or ``(channels,)`` with ``aggregate`` or for ``over="channel"``."""
        of_channels = self.over == "channel" or self.aggregate is not None
        return (sums.n_channels,) if of_channels else sums.activation_shape

    def aggregated(self, values: Tensor, sums: Sums) -> Tensor:
        """Distances with the values of a feature map made one."""
        if self.over == "channel":
            return values  # one for each channel already
        return aggregate_maps(sums.shaped(values), self.aggregate, sums.channel_axis)


class TransformationDistance(MeasureOfDistances):
    r"""Transformation Distance (TD): how far apart an activation is under different transformations of a sample.

    The mean over samples of the average distance of all pairs of transformations (paper, section 2.5, eqs. 5 and 6):

    .. math::
        TD = \frac{1}{n} \sum_{i=1}^{n} \mathrm{AverageDistance}(\mathbf{ST}[i, :]), \qquad
        \mathrm{AverageDistance}(x_1 \dots x_m) = \frac{1}{m^2} \sum_{j,l} d(x_j, x_l)

    It lies in ``[0, inf)``, in units of the activation for ``"abs"``. Lower is more invariant; 0 is invariant. Unlike a
    variance it does not suppose one mode. It is exact.

    As output of ``forward`` and ``compute`` the metric returns

    - ``td`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` for
      ``over="channel"``. NaN, with a warning, for fewer than two transformations.

    Args:
        distance: ``"abs"``: \|x − y\|, the sum of it over a feature map. ``"squared"``: computed through the variances
            (paper, eq. 7). ``"euclidean"`` and ``"cosine"``, of feature maps. Or a function ``d(x, y)`` of broadcast
            tensors, symmetric and with d(x, x) = 0, that keeps their shape for ``over="activation"`` and reduces their
            last axis for ``over="channel"``.
        over: ``"activation"``: every scalar by itself. ``"channel"``: a feature map is one vector.
        samples: not used here; the same argument as of :class:`SampleDistance`.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel, before any
            quotient.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import TransformationDistance
        >>> td = TransformationDistance()
        >>> td.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # two samples, two transformations
        >>> td.compute()  # the mean of (0 + 2 + 2 + 0) / 4 and 0
        tensor(0.5000, dtype=torch.float64)
    """

    any_channel_axis = True
    of_columns = False
    unit = "distance"

    @property
    def is_mean_over_samples(self) -> bool:  # type: ignore[override]
        """Except for the largest value of a feature map."""
        return self.aggregate != "max"

    def value(self, sums: Sums) -> Tensor:
        """TD of every activation, or of every channel."""
        return self.aggregated(self.pairs.within_rows(sums), sums)


class SampleDistance(MeasureOfDistances):
    r"""Sample Distance (SD): how far apart an activation is for different samples.

    The mean over transformations of the average distance of all pairs of samples (paper, section 2.5, eqs. 5 and 6):

    .. math:: SD = \frac{1}{m} \sum_{j=1}^{m} \mathrm{AverageDistance}(\mathbf{ST}[:, j])

    For ``distance="squared"``, and for up to ``samples`` samples, it is exact. Otherwise it is estimated without bias,
    from m·s values for each activation, s for ``samples``, times (n − 1)/n for the pairs of a sample with itself:

    - :func:`~lightning_invariance.evaluate` and the monitor take the samples in a random order, the same for every
      batch size and number of processes. All pairs within groups of s samples, one after the other, stand for all.
      :attr:`InvarianceResult.standard_errors` has the standard error for samples drawn at random.
    - Where the order is not random (updates by hand, iterable datasets, :class:`Stratified`), each transformation keeps
      the values of s samples of its own, and their s(s − 1)/2 pairs stand for all. The choice depends on the
      ``indices`` of samples alone, or where there are none on their values and the order in which they came. The
      relative standard error is between 0.7/√(s·m) and 0.7/√s for normal distributions, and the estimate is 0 for a
      unit that fires so rarely that no kept sample fires it.

    It lies in ``[0, inf)``, in units of the activation for ``"abs"``. It says nothing of invariance by itself: it is
    the scale that :class:`NormalizedDistance` divides by.

    As output of ``forward`` and ``compute`` the metric returns

    - ``sd`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` for
      ``over="channel"``. NaN, with a warning, for fewer than two samples.

    Args:
        distance: see :class:`TransformationDistance`.
        over: ``"activation"``: every scalar by itself. ``"channel"``: a feature map is one vector.
        samples: how many samples a group holds, or each transformation keeps, s.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel, before any
            quotient.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import SampleDistance
        >>> sd = SampleDistance()
        >>> sd.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # columns (1, 5) and (3, 5)
        >>> sd.compute()  # the mean of 2 and 1
        tensor(1.5000, dtype=torch.float64)
    """

    any_channel_axis = True
    higher_is_better = None
    of_rows = False
    unit = "distance"
    relative_bias = -1.0  # pairs of a sample with itself are 1 / n of all
    least_samples, least_transformations = 2, 1

    def value(self, sums: Sums) -> Tensor:
        """SD of every activation, or of every channel."""
        return self.aggregated(self.pairs.within_columns(sums), sums)

    def standard_error(self, sums: Sums) -> Tensor | None:
        """That of SD; with ``aggregate`` no less than it, since the errors of a feature map go together."""
        errors = self.pairs.error_within_columns(sums)
        return None if errors is None else self.aggregated(errors, sums)


class NormalizedDistance(MeasureOfDistances):
    r"""Normalized Distance (ND): how much transformations matter against samples, by distances.

    Transformation distance over sample distance (paper, section 2.5, eq. 5):

    .. math:: ND = \frac{TD}{SD}, \qquad \frac{0}{0} = 1, \quad \frac{x}{0} = \infty

    It lies in ``[0, inf]`` and has no unit. Lower is more invariant: 0 is invariant; around 1 transformations matter as
    much as samples do. SD is estimated, see :class:`SampleDistance`; TD is exact. The standard error in a result is
    what that of SD makes of the quotient.

    As output of ``forward`` and ``compute`` the metric returns

    - ``nd`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` for
      ``over="channel"``. NaN, with a warning, for fewer than two samples or transformations.

    Args:
        distance: see :class:`TransformationDistance`.
        over: ``"activation"``: every scalar by itself. ``"channel"``: a feature map is one vector.
        samples: how many samples a group holds, or each transformation keeps, s.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel, before any
            quotient.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import NormalizedDistance
        >>> nd = NormalizedDistance()
        >>> nd.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # TD = 0.5, SD = 1.5
        >>> nd.compute()
        tensor(0.3333, dtype=torch.float64)
    """

    any_channel_axis = True
    is_ratio = True
    relative_bias = 1.0  # that of SD
    least_samples = 2

    def value(self, sums: Sums) -> Tensor:
        """TD / SD of every activation, or of every channel."""
        rows, columns = self.pairs.within_rows(sums), self.pairs.within_columns(sums)
        return quotient(self.aggregated(rows, sums), self.aggregated(columns, sums))

    def standard_error(self, sums: Sums) -> Tensor | None:
        """What that of SD makes of TD / SD: TD · se(SD) / SD²; 0 where the activation is dead."""
        errors = self.pairs.error_within_columns(sums)
        if errors is None:
            return None
        rows = self.aggregated(self.pairs.within_rows(sums), sums)
        columns = self.aggregated(self.pairs.within_columns(sums), sums)
        return torch.where((rows == 0) & (columns == 0), 0.0, rows * self.aggregated(errors, sums) / columns.square())
