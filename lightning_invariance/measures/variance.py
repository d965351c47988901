"""Variance measures of invariance (paper, section 2.4)."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators import Deviations
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.aggregation import AGGREGATES, aggregate_maps, aggregated_shape
from lightning_invariance.measures.base import Measure, quotient


class MeasureOfVariances(Measure):
    """Base of the variance measures, with the arguments of :class:`TransformationVariance`."""

    has_intervals = True

    #: Whether the argument ``response`` may be true.
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
        """The value, given TV and SV of every activation or, after aggregation, of every channel."""

    def value(self, sums: Sums) -> Tensor:
        """The value of every activation, or of every channel."""
        variances = transformation_variance(sums, self.squared), sample_variance(sums, self.squared)
        return self.aggregated(*variances, sums.channel_axis)

    def aggregated(self, transformation: Tensor, sample: Tensor, channel_axis: int) -> Tensor:
        """Aggregate TV and SV of every activation, in ``activation_shape``, and compute the value from them."""
        parts = (aggregate_maps(variance, self.aggregate, channel_axis) for variance in (transformation, sample))
        return self.of_variances(*parts)

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """``activation_shape``, or what is left of it with ``aggregate``."""
        return aggregated_shape(sums.activation_shape, self.aggregate, sums.channel_axis)


def transformation_variance(sums: Sums, squared: bool = True) -> Tensor:
    """TV (paper, eq. 2) from the states of ``Deviations(squared)``, in ``activation_shape``."""
    mean = sums["row_spread"] / sums.n_samples
    return sums.shaped(mean / (sums.n_transformations - 1) if squared else mean)


def sample_variance(sums: Sums, squared: bool = True) -> Tensor:
    """SV (paper, eq. 3) from the states of ``Deviations(squared)``, in ``activation_shape``."""
    variance = sums["column_spread"].clamp_min(0) / (sums.n_samples - 1)
    return sums.shaped(variance[0] / sums.n_transformations if squared else variance.sqrt().mean(0))


class TransformationVariance(MeasureOfVariances):
    r"""Transformation Variance (TV): the variance of an activation over transformations of a sample.

    The mean over samples of the variance over transformations (paper, section 2.4.1, eq. 2):

    .. math:: TV = \frac{1}{n} \sum_{i=1}^{n} \mathrm{Var}(\mathbf{ST}[i, :])

    where Var is the sample variance, with m − 1 in the denominator. It is in ``[0, inf)``, in units of the activation
    squared. Lower is more invariant; 0 is invariant. Units differ between layers: compare activations of different
    layers with :class:`NormalizedVariance`.

    The value has ``activation_shape``, or is ``(channels,)`` with ``aggregate``. It is NaN, with a warning, for fewer
    than two transformations.

    Args:
        squared: if false, average standard deviations instead of variances, in units of the activation.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` of the variances in a feature map, before any quotient, gives one
            value for each channel; ``"layer"`` sums over the layer, and the value is a scalar; None keeps a value for
            each activation.
        response: also measure which transformations change the layer; see :meth:`response`.

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

    def of_variances(self, transformation: Tensor, sample: Tensor) -> Tensor:
        """TV."""
        return transformation

    def response_of(self, sums: Sums) -> Tensor | None:
        """How much each transformation changes the layer, ``(m,)``; None without ``response=True``.

        Half the mean squared difference between an activation and its value under the identity, averaged over the
        layer: the transformation variance of the pair of transformations. For a set without a known identity, the mean
        squared deviation from the mean over transformations, times m / (m − 1): its mean over transformations is TV.
        """
        changes = mean_changes(sums)
        return None if changes is None else changes.mean(1)


class SampleVariance(MeasureOfVariances):
    r"""Sample Variance (SV): the variance of an activation over samples.

    The mean over transformations of the variance over samples (paper, section 2.4.2, eq. 3):

    .. math:: SV = \frac{1}{m} \sum_{j=1}^{m} \mathrm{Var}(\mathbf{ST}[:, j])

    where Var is the sample variance, with n − 1 in the denominator. It is in ``[0, inf)``, in units of the activation
    squared. By itself it says nothing of invariance: it is the denominator of :class:`NormalizedVariance`.

    The value has ``activation_shape``, or is ``(channels,)`` with ``aggregate``. It is NaN, with a warning, for fewer
    than two samples.

    Args: see :class:`TransformationVariance`; ``response`` must be false.

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
    r"""Normalized Variance (NV): transformation variance divided by sample variance (paper, section 2.4.3, eq. 4).

    .. math:: NV = \frac{TV}{SV}, \qquad \frac{0}{0} = 1, \quad \frac{x}{0} = \infty

    It is in ``[0, inf]`` and has no unit. Lower is more invariant: 0 is invariant; below 1, transformations change the
    activation less than samples do. It is 1 for dead activations, which never change, and infinite for activations that
    change with the transformation alone.

    The value has ``activation_shape``, or is ``(channels,)`` with ``aggregate``. It is NaN, with a warning, for fewer
    than two samples or transformations.

    Args: see :class:`TransformationVariance`. With ``aggregate`` both variances are aggregated before the quotient;
        the paper, as the default, divides for every activation. With ``"layer"`` it is ΣTV / ΣSV, the generalisation
        in latent space of Kvinge et al. (2022) up to constants.

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

    @property
    def denominator(self) -> str | None:  # type: ignore[override]
        """The sum of the sample variance, where the value is a quotient of sums."""
        return "column_spread" if self.squared and self.aggregate in (None, "mean", "layer") else None

    def of_variances(self, transformation: Tensor, sample: Tensor) -> Tensor:
        """TV / SV."""
        return quotient(transformation, sample)

    def response_of(self, sums: Sums) -> Tensor | None:
        """How much each transformation changes the layer compared to samples, ``(m,)``; None without ``response=True``.

        :meth:`TransformationVariance.response_of` divided by the sample variance, each averaged over the feature map,
        and then the mean over channels with a finite quotient: 0 for no change; 1 for a change as large as between two
        samples.
        """
        changes = mean_changes(sums)
        if changes is None:
            return None
        ratio = changes / aggregate_maps(sample_variance(sums), "mean", sums.channel_axis)
        return torch.where(ratio.isfinite(), ratio, torch.nan).nanmean(1)


def mean_changes(sums: Sums) -> Tensor | None:
    """The mean over samples and positions of the state ``changes``, ``(m, channels)``; None without ``response``."""
    if "changes" not in sums or not sums["changes"].numel():
        return None
    positions = math.prod(sums.activation_shape) // sums.n_channels
    return sums["changes"] / (sums.n_samples * positions)
