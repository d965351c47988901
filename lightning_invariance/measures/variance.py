"""Variance measures of invariance (paper, section 2.4), online: one pass over complete rows of the ST matrix."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators import Deviations
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.aggregation import AGGREGATES, aggregate_maps
from lightning_invariance.measures.base import Measure, quotient


class MeasureOfVariances(Measure):
    """A function of the transformation variance and the sample variance of each activation.

    Rows and columns of the ST matrix may be walked separately for such measures, in little memory.

    Args:
        squared: whether variances or standard deviations are averaged.
        aggregate: how the values of a feature map are made one; None keeps them.
        response: whether changes under each transformation are kept.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range.
    """

    has_intervals = True

    #: Whether the measure can tell what each transformation does.
    has_response = True

    def __init__(
        self, squared: bool = True, aggregate: str | None = None, response: bool = False, **kwargs: Any
    ) -> None:
        if not isinstance(squared, bool):
            raise ValueError(f"Expected argument `squared` to be a bool, but got {squared!r}.")
        if aggregate not in AGGREGATES:
            raise ValueError(f"Expected argument `aggregate` to be one of {AGGREGATES}, but got {aggregate!r}.")
        if not isinstance(response, bool) or (response and not (squared and self.has_response)):
            raise ValueError(
                "Expected argument `response` to be a bool, true only for TransformationVariance and NormalizedVariance"
                f" with `squared=True`, but got {response!r}."
            )
        super().__init__([Deviations(squared, response)], **kwargs)
        self.squared, self.aggregate, self.with_response = squared, aggregate, response
        if not squared:
            self.unit = self.unit.removesuffix("²")

    @abstractmethod
    def of_variances(self, transformation: Tensor, sample: Tensor) -> Tensor:
        """The value, given TV and SV of every activation, or aggregated for every channel."""

    def value(self, sums: Sums) -> Tensor:
        """What the measure is for every activation."""
        variances = transformation_variance(sums, self.squared), sample_variance(sums, self.squared)
        return self.aggregated(*variances, sums.channel_axis)

    def aggregated(self, transformation: Tensor, sample: Tensor, channel_axis: int) -> Tensor:
        """The value, given TV and SV of every activation, in its shape."""
        parts = (aggregate_maps(variance, self.aggregate, channel_axis) for variance in (transformation, sample))
        return self.of_variances(*parts)

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """The activation's, or ``(channels,)`` with ``aggregate``."""
        return sums.activation_shape if self.aggregate is None else (sums.n_channels,)


def transformation_variance(sums: Sums, squared: bool = True) -> Tensor:
    r"""TV (paper, eq. 2) of the states of ``Deviations(squared)``: of the activation's shape."""
    mean = sums["row_spread"] / sums.n_samples
    return sums.shaped(mean / (sums.n_transformations - 1) if squared else mean)


def sample_variance(sums: Sums, squared: bool = True) -> Tensor:
    r"""SV (paper, eq. 3) of the states of ``Deviations(squared)``: of the activation's shape."""
    variance = sums["column_spread"].clamp_min(0) / (sums.n_samples - 1)
    return sums.shaped(variance[0] / sums.n_transformations if squared else variance.sqrt().mean(0))


class TransformationVariance(MeasureOfVariances):
    r"""Transformation Variance (TV): how much an activation varies when a sample is transformed.

    The mean over samples of the variance over transformations (paper, section 2.4.1, eq. 2):

    .. math:: TV = \frac{1}{n} \sum_{i=1}^{n} \mathrm{Var}(\mathbf{ST}[i, :])

    where Var is the sample variance, with m − 1 in the denominator. It lies in ``[0, inf)``, in units of the activation
    squared. Lower is more invariant; 0 is invariant. Activations of different layers have different units: compare
    them with :class:`NormalizedVariance`.

    As output of ``forward`` and ``compute`` the metric returns

    - ``tv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` with ``aggregate``.
      NaN, with a warning, for fewer than two transformations.

    Args:
        squared: if false, the mean of the standard deviations instead of the variances, in units of the activation.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel.
        response: also find which transformations change the layer; see :meth:`response`.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import TransformationVariance
        >>> tv = TransformationVariance()
        >>> tv.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # 2 samples, 2 transformations, a scalar activation
        >>> tv.compute()
        tensor(1., dtype=torch.float64)
    """

    any_channel_axis = True
    unit = "activation²"
    has_response_intervals = True

    @property
    def is_mean_over_samples(self) -> bool:  # type: ignore[override]
        """Except for the largest value of a feature map."""
        return self.aggregate != "max"

    def of_variances(self, transformation: Tensor, sample: Tensor) -> Tensor:
        """TV."""
        return transformation

    def response_of(self, sums: Sums) -> Tensor | None:
        r"""What each transformation does to the layer, ``(m,)``; None without ``response=True``.

        Half the mean squared change of an activation from its value under the identity, which is the transformation
        variance of that pair of transformations; averaged over the activations of the layer. For a set that knows of
        no identity the mean squared deviation from the mean over the transformations, times m / (m − 1), whose mean
        over the transformations is the transformation variance.
        """
        changes = mean_changes(sums)
        return None if changes is None else changes.mean(1)


class SampleVariance(MeasureOfVariances):
    r"""Sample Variance (SV): how much an activation varies from sample to sample.

    The mean over transformations of the variance over samples (paper, section 2.4.2, eq. 3):

    .. math:: SV = \frac{1}{m} \sum_{j=1}^{m} \mathrm{Var}(\mathbf{ST}[:, j])

    where Var is the sample variance, with n − 1 in the denominator. It lies in ``[0, inf)``, in units of the activation
    squared. It says nothing of invariance by itself: it is the scale that :class:`NormalizedVariance` divides by.

    As output of ``forward`` and ``compute`` the metric returns

    - ``sv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` with ``aggregate``.
      NaN, with a warning, for fewer than two samples.

    Args:
        squared: if false, the mean of the standard deviations instead of the variances, in units of the activation.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import SampleVariance
        >>> sv = SampleVariance()
        >>> sv.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # columns (1, 5) and (3, 5)
        >>> sv.compute()
        tensor(5., dtype=torch.float64)
    """

    any_channel_axis = True
    higher_is_better = None
    unit = "activation²"
    has_response = False
    least_samples, least_transformations = 2, 1

    def of_variances(self, transformation: Tensor, sample: Tensor) -> Tensor:
        """SV."""
        return sample


class NormalizedVariance(MeasureOfVariances):
    r"""Normalized Variance (NV): how much transformations matter against samples.

    Transformation variance over sample variance (paper, section 2.4.3, eq. 4):

    .. math:: NV = \frac{TV}{SV}, \qquad \frac{0}{0} = 1, \quad \frac{x}{0} = \infty

    It lies in ``[0, inf]`` and has no unit. Lower is more invariant: 0 is invariant; below 1, transformations change
    the activation less than samples do; 1 also marks dead activations, which never change; infinite are those that
    change with the transformation alone.

    As output of ``forward`` and ``compute`` the metric returns

    - ``nv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` with ``aggregate``.
      NaN, with a warning, for fewer than two samples or transformations.

    Args:
        squared: if false, the quotient of mean standard deviations instead of mean variances.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map, of both variances before the quotient, gives
            one value for each channel. The paper takes the quotient of every activation first, as the default does.
        response: also find which transformations change the layer; see :meth:`response`.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import NormalizedVariance
        >>> nv = NormalizedVariance()
        >>> nv.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # TV = 1, SV = 5
        >>> nv.compute()
        tensor(0.2000, dtype=torch.float64)
    """

    any_channel_axis = True
    is_ratio = True
    has_response_intervals = True
    least_samples = 2

    def of_variances(self, transformation: Tensor, sample: Tensor) -> Tensor:
        """TV / SV."""
        return quotient(transformation, sample)

    def response_of(self, sums: Sums) -> Tensor | None:
        """What each transformation does to the layer, ``(m,)``; None without ``response=True``.

        That of :meth:`TransformationVariance.response_of` over the sample variance, each averaged over the feature map
        before the quotient, and the mean over the channels where it is finite: 0 is a transformation that the layer
        does not notice; 1 one that changes it as much as another sample does.
        """
        changes = mean_changes(sums)
        if changes is None:
            return None
        ratio = changes / aggregate_maps(sample_variance(sums), "mean", sums.channel_axis)
        return torch.where(ratio.isfinite(), ratio, torch.nan).nanmean(1)


def mean_changes(sums: Sums) -> Tensor | None:
    """What each transformation contributes to the variance of each channel's mean activation, ``(m, channels)``."""
    if "changes" not in sums or not sums["changes"].numel():
        return None
    positions = math.prod(sums.activation_shape) // sums.n_channels
    return sums["changes"] / (sums.n_samples * positions)
