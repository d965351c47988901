"""Distance measures of invariance (paper, section 2.5), online."""

from __future__ import annotations

from torch import Tensor

from lightning_invariance.functional.variance import normalize
from lightning_invariance.measures.distance_sums import DistanceMeasure


class TransformationDistance(DistanceMeasure):
    r"""Transformation Distance (TD): how far apart an activation is under different transformations of a sample.

    The mean over samples of the average distance of all pairs of transformations (paper, section 2.5, eqs. 5 and 6):

    .. math::
        TD = \frac{1}{n} \sum_{i=1}^{n} \mathrm{AverageDistance}(\mathbf{ST}[i, :]), \qquad
        \mathrm{AverageDistance}(x_1 \dots x_m) = \frac{1}{m^2} \sum_{j,l} d(x_j, x_l)

    It lies in ``[0, inf)``, in units of the activation for ``"abs"``. Lower is more invariant; 0 is invariant. Unlike a
    variance it does not suppose one mode. It is exact.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.

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
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, or blocks do not fit together.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import TransformationDistance
        >>> td = TransformationDistance()
        >>> td.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # two samples, two transformations
        >>> td.compute()  # the mean of (0 + 2 + 2 + 0) / 4 and 0
        tensor(0.5000, dtype=torch.float64)
    """

    needs_columns = False

    def compute(self) -> Tensor:
        """The value of every activation, or of every channel."""
        return self._aggregated(self._transformation_distance() if self._enough() else self._undefined())


class SampleDistance(DistanceMeasure):
    r"""Sample Distance (SD): how far apart an activation is for different samples.

    The mean over transformations of the average distance of all pairs of samples (paper, section 2.5, eqs. 5 and 6):

    .. math:: SD = \frac{1}{m} \sum_{j=1}^{m} \mathrm{AverageDistance}(\mathbf{ST}[:, j])

    For ``distance="squared"``, and for up to ``samples`` samples, it is exact. Otherwise it is estimated, without bias:
    each transformation keeps the values of ``samples`` samples of its own, and their s(s − 1)/2 pairs stand for all,
    times (n − 1)/n for the pairs of a sample with itself. The choice does not depend on order, batches or processes.
    The relative standard error is about 0.7/√s for one transformation and a normal distribution, and falls to
    0.7/√(s·m) as the transformations of a sample have less in common; m·s values are kept for each activation. Of a
    unit that fires so rarely that no kept sample fires it the estimate is 0.

    It lies in ``[0, inf)``, in units of the activation for ``"abs"``. It says nothing of invariance by itself: it is
    the scale that :class:`NormalizedDistance` divides by.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.
    - ``indices`` (:class:`~torch.Tensor`, optional): whole numbers that name the samples, ``(samples,)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``sd`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` for
      ``over="channel"``. NaN, with a warning, for fewer than two samples.

    Args:
        distance: see :class:`TransformationDistance`.
        over: ``"activation"``: every scalar by itself. ``"channel"``: a feature map is one vector.
        samples: how many samples each transformation keeps, s.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel, before any
            quotient.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, or blocks do not fit together.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import SampleDistance
        >>> sd = SampleDistance()
        >>> sd.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # columns (1, 5) and (3, 5)
        >>> sd.compute()  # the mean of 2 and 1
        tensor(1.5000, dtype=torch.float64)
    """

    higher_is_better = None
    needs_rows = False

    def compute(self) -> Tensor:
        """The value of every activation, or of every channel."""
        enough = self._enough(samples=2, transformations=1)
        return self._aggregated(self._sample_distance() if enough else self._undefined())


class NormalizedDistance(DistanceMeasure):
    r"""Normalized Distance (ND): how much transformations matter against samples, by distances.

    Transformation distance over sample distance (paper, section 2.5, eq. 5):

    .. math:: ND = \frac{TD}{SD}, \qquad \frac{0}{0} = 1, \quad \frac{x}{0} = \infty

    It lies in ``[0, inf]`` and has no unit. Lower is more invariant: 0 is invariant; around 1 transformations matter as
    much as samples do. SD is estimated from ``samples`` samples, see :class:`SampleDistance`; TD is exact.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.
    - ``indices`` (:class:`~torch.Tensor`, optional): whole numbers that name the samples, ``(samples,)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``nd`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` for
      ``over="channel"``. NaN, with a warning, for fewer than two samples or transformations.

    Args:
        distance: see :class:`TransformationDistance`.
        over: ``"activation"``: every scalar by itself. ``"channel"``: a feature map is one vector.
        samples: how many samples each transformation keeps, s.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel, before any
            quotient.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, or blocks do not fit together.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import NormalizedDistance
        >>> nd = NormalizedDistance()
        >>> nd.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # TD = 0.5, SD = 1.5
        >>> nd.compute()
        tensor(0.3333, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The value of every activation, or of every channel."""
        if not self._enough(samples=2):
            return self._aggregated(self._undefined())
        return normalize(self._aggregated(self._transformation_distance()), self._aggregated(self._sample_distance()))
