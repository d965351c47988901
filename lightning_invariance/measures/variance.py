"""Variance measures of invariance (paper, section 2.4), online: one pass over complete rows of the ST matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_invariance.functional.variance import aggregate_maps, normalize
from lightning_invariance.measures.variance_sums import VarianceMeasure


class TransformationVariance(VarianceMeasure):
    r"""Transformation Variance (TV): how much an activation varies when a sample is transformed.

    The mean over samples of the variance over transformations (paper, section 2.4.1, eq. 2):

    .. math:: TV = \frac{1}{n} \sum_{i=1}^{n} \mathrm{Var}(\mathbf{ST}[i, :])

    where Var is the sample variance, with m − 1 in the denominator. It lies in ``[0, inf)``, in units of the activation
    squared. Lower is more invariant; 0 is invariant. Activations of different layers have different units: compare
    them with :class:`NormalizedVariance`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``tv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` with ``aggregate``.
      NaN, with a warning, for fewer than two transformations.

    Args:
        squared: if false, the mean of the standard deviations instead of the variances, in units of the activation.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel.
        response: also find which transformations change the layer; see :meth:`response`.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, or blocks do not fit together.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import TransformationVariance
        >>> tv = TransformationVariance()
        >>> tv.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # 2 samples, 2 transformations, a scalar activation
        >>> tv.compute()
        tensor(1., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The value of every activation."""
        return self._aggregated(self._transformation_variance() if self._enough() else self._undefined())

    def response(self) -> Tensor | None:
        r"""What each transformation does to the layer, ``(m,)``; None without ``response=True``.

        Half the mean squared change of an activation from its value under the identity, which is the transformation
        variance of that pair of transformations; averaged over the activations of the layer. For a set that knows of
        no identity the mean squared deviation from the mean over the transformations, times m / (m − 1), whose mean
        over the transformations is the transformation variance.
        """
        changes = self._changes()
        return None if changes is None else changes.mean(1)


class SampleVariance(VarianceMeasure):
    r"""Sample Variance (SV): how much an activation varies from sample to sample.

    The mean over transformations of the variance over samples (paper, section 2.4.2, eq. 3):

    .. math:: SV = \frac{1}{m} \sum_{j=1}^{m} \mathrm{Var}(\mathbf{ST}[:, j])

    where Var is the sample variance, with n − 1 in the denominator. It lies in ``[0, inf)``, in units of the activation
    squared. It says nothing of invariance by itself: it is the scale that :class:`NormalizedVariance` divides by.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``sv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` with ``aggregate``.
      NaN, with a warning, for fewer than two samples.

    Args:
        squared: if false, the mean of the standard deviations instead of the variances, in units of the activation.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, or blocks do not fit together.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import SampleVariance
        >>> sv = SampleVariance()
        >>> sv.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # columns (1, 5) and (3, 5)
        >>> sv.compute()
        tensor(5., dtype=torch.float64)
    """

    higher_is_better = None
    _responds = False

    def compute(self) -> Tensor:
        """The value of every activation."""
        enough = self._enough(samples=2, transformations=1)
        return self._aggregated(self._sample_variance() if enough else self._undefined())


class NormalizedVariance(VarianceMeasure):
    r"""Normalized Variance (NV): how much transformations matter against samples.

    Transformation variance over sample variance (paper, section 2.4.3, eq. 4):

    .. math:: NV = \frac{TV}{SV}, \qquad \frac{0}{0} = 1, \quad \frac{x}{0} = \infty

    It lies in ``[0, inf]`` and has no unit. Lower is more invariant: 0 is invariant; below 1, transformations change
    the activation less than samples do; 1 also marks dead activations, which never change; infinite are those that
    change with the transformation alone.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``nv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` with ``aggregate``.
      NaN, with a warning, for fewer than two samples or transformations.

    Args:
        squared: if false, the quotient of mean standard deviations instead of mean variances.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map, of both variances before the quotient, gives
            one value for each channel. The paper takes the quotient of every activation first, as the default does.
        response: also find which transformations change the layer; see :meth:`response`.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, or blocks do not fit together.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import NormalizedVariance
        >>> nv = NormalizedVariance()
        >>> nv.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # TV = 1, SV = 5
        >>> nv.compute()
        tensor(0.2000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The value of every activation."""
        if not self._enough(samples=2):
            return self._aggregated(self._undefined())
        return normalize(self._aggregated(self._transformation_variance()), self._aggregated(self._sample_variance()))

    def response(self) -> Tensor | None:
        """What each transformation does to the layer, ``(m,)``; None without ``response=True``.

        That of :meth:`TransformationVariance.response` over the sample variance, each averaged over the feature map
        before the quotient, and the mean over the channels where it is finite: 0 is a transformation that the layer
        does not notice; 1 one that changes it as much as another sample does.
        """
        changes = self._changes()
        if changes is None:
            return None
        quotient = changes / aggregate_maps(self._sample_variance(), "mean")
        return torch.where(quotient.isfinite(), quotient, torch.nan).nanmean(1)
