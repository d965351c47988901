"""Distance measures of invariance (paper, section 2.5)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_invariance.accumulators.distances import Distance
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.aggregation import AGGREGATES, aggregate_maps, aggregated_shape
from lightning_invariance.measures.base import Measure, quotient
from lightning_invariance.measures.pair_distances import pair_distances

#: Units of the named distances; cosines have none.
UNITS = {"abs": "activation", "euclidean": "activation", "squared": "activation²", "cosine": ""}


class MeasureOfDistances(Measure):
    """Base of the distance measures, with the arguments of :class:`TransformationDistance`."""

    has_intervals = True

    #: Whether the measure uses the transformation distance (rows of the ST matrix) and the sample distance (columns).
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
        """False for a function as ``distance``, which gets channels first."""
        return not callable(self.distance) and super().takes_any_channel_axis

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """``activation_shape``, ``(channels,)`` with ``over="channel"``, or as ``aggregate`` says."""
        if self.over != "activation":
            return (sums.n_channels,) if self.over == "channel" else ()
        return aggregated_shape(sums.activation_shape, self.aggregate, sums.channel_axis)

    def aggregated(self, values: Tensor, sums: Sums) -> Tensor:
        """Apply ``aggregate`` to distances of all activations."""
        if self.over != "activation":
            return values  # one for each channel, or one
        return aggregate_maps(sums.shaped(values), self.aggregate, sums.channel_axis)


class TransformationDistance(MeasureOfDistances):
    r"""Transformation Distance (TD): the mean distance of an activation between transformations of a sample.

    The mean over samples of the average distance of all pairs of transformations (paper, section 2.5, eqs. 5 and 6):

    .. math::
        TD = \frac{1}{n} \sum_{i=1}^{n} \mathrm{AverageDistance}(\mathbf{ST}[i, :]), \qquad
        \mathrm{AverageDistance}(x_1 \dots x_m) = \frac{1}{m^2} \sum_{j,l} d(x_j, x_l)

    It is exact, in ``[0, inf)``, and in units of the activation for ``"abs"``. Lower is more invariant; 0 is invariant.
    Unlike a variance, it assumes no unimodal distribution.

    The value has ``activation_shape``, or is ``(channels,)`` for ``over="channel"`` or with ``aggregate``. It is NaN,
    with a warning, for fewer than two transformations.

    Args:
        distance: ``"abs"``: \|x − y\|, summed over a feature map. ``"squared"``: computed from the variances (paper,
            eq. 7). ``"euclidean"`` and ``"cosine"``: of feature maps only. Or a symmetric function ``d(x, y)`` of
            broadcast tensors with d(x, x) = 0, which keeps their shape for ``over="activation"`` and reduces their last
            axis for ``over="channel"``.
        over: ``"activation"``: every scalar by itself. ``"channel"``: a feature map is one vector. ``"layer"``: all
            activations of a layer are one vector, and the value is a scalar.
        samples: s, the number of samples in each group, or that each column keeps; see :class:`SampleDistance`. It has
            no effect on TD.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` of the distances in a feature map, before any quotient, gives one
            value for each channel; ``"layer"`` sums over the layer; None keeps a value for each activation.

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

    def value(self, sums: Sums) -> Tensor:
        """TD of every activation, or of every channel."""
        return self.aggregated(self.pairs.within_rows(sums), sums)


class SampleDistance(MeasureOfDistances):
    r"""Sample Distance (SD): the mean distance of an activation between samples.

    The mean over transformations of the average distance of all pairs of samples (paper, section 2.5, eqs. 5 and 6):

    .. math:: SD = \frac{1}{m} \sum_{j=1}^{m} \mathrm{AverageDistance}(\mathbf{ST}[:, j])

    It is exact for ``distance="squared"``, and for up to s samples (``samples=s``). Otherwise it is estimated without
    bias from the pairs within subsets of s samples, times (n − 1)/n for the pairs of a sample with itself:

    - :func:`~lightning_invariance.evaluate` and the monitor draw samples in a random order, which depends on neither
      batch size nor number of processes, and average over all pairs within consecutive groups of s samples.
      :attr:`InvarianceResult.standard_errors` has the standard error for samples drawn at random.
    - Where the order is not random (updates by hand, iterable datasets, :class:`Stratified`), each transformation keeps
      the values of s samples of its own and averages over their s(s − 1)/2 pairs. The ``indices`` of samples alone
      determine the choice; without indices, their values and order do. The relative standard error is between
      0.7/√(s·m) and 0.7/√s for normal distributions. The estimate is 0 for an activation that no kept sample changes.

    It is in ``[0, inf)``, in units of the activation for ``"abs"``. By itself it says nothing of invariance: it is the
    denominator of :class:`NormalizedDistance`.

    The value has ``activation_shape``, or is ``(channels,)`` for ``over="channel"`` or with ``aggregate``. It is NaN,
    with a warning, for fewer than two samples.

    Args: see :class:`TransformationDistance`.

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
    relative_bias = -1.0  # 1 / n of the pairs are of a sample with itself
    least_samples, least_transformations = 2, 1

    def value(self, sums: Sums) -> Tensor:
        """SD of every activation, or of every channel."""
        return self.aggregated(self.pairs.within_columns(sums), sums)

    def standard_error(self, sums: Sums) -> Tensor | None:
        """The standard error of SD; with ``aggregate`` an upper bound, since errors in a feature map correlate."""
        errors = self.pairs.error_within_columns(sums)
        return None if errors is None else self.aggregated(errors, sums)


class NormalizedDistance(MeasureOfDistances):
    r"""Normalized Distance (ND): transformation distance divided by sample distance (paper, section 2.5, eq. 5).

    .. math:: ND = \frac{TD}{SD}, \qquad \frac{0}{0} = 1, \quad \frac{x}{0} = \infty

    It is in ``[0, inf]`` and has no unit. Lower is more invariant: 0 is invariant; around 1 transformations matter as
    much as samples do. :class:`TransformationDistance` is exact, :class:`SampleDistance` is estimated; the standard
    error of ND in a result contains the error of SD only. ``NormalizedDistance("euclidean", over="layer")`` is the
    sensitivity Sens of Speicher et al. (2024).

    The value has ``activation_shape``, or is ``(channels,)`` for ``over="channel"`` or with ``aggregate``. It is NaN,
    with a warning, for fewer than two samples or transformations.

    Args: see :class:`TransformationDistance`.

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
    relative_bias = 1.0  # opposite to SD, the denominator
    least_samples = 2

    def value(self, sums: Sums) -> Tensor:
        """TD / SD of every activation, or of every channel."""
        rows, columns = self.pairs.within_rows(sums), self.pairs.within_columns(sums)
        return quotient(self.aggregated(rows, sums), self.aggregated(columns, sums))

    def standard_error(self, sums: Sums) -> Tensor | None:
        """TD · se(SD) / SD², where se is the standard error; 0 for dead activations."""
        errors = self.pairs.error_within_columns(sums)
        if errors is None:
            return None
        rows = self.aggregated(self.pairs.within_rows(sums), sums)
        columns = self.aggregated(self.pairs.within_columns(sums), sums)
        return torch.where((rows == 0) & (columns == 0), 0.0, rows * self.aggregated(errors, sums) / columns.square())
