"""Same-equivariance measures (paper, section 2.6), online: invariance of feature maps that are mapped back."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.functional.distance import Distance
from lightning_invariance.functional.equivariance import direct_distances, unit_maps
from lightning_invariance.functional.variance import normalize as quotient
from lightning_invariance.measures.base import States
from lightning_invariance.measures.distance_sums import DistanceMeasure
from lightning_invariance.measures.mapped_back import SameEquivarianceMeasure
from lightning_invariance.measures.spread import channel_changes
from lightning_invariance.measures.variance_sums import VarianceMeasure
from lightning_invariance.transforms import TransformationSet


class VarianceSameEquivariance(SameEquivarianceMeasure, VarianceMeasure):
    r"""Variance-based same-equivariance: do feature maps move as the input does? (paper, section 2.6).

    Each column of feature maps is mapped back by the inverse of its transformation, at the map's own resolution, and
    the transformation variance of the result is taken:

    .. math::
        \mathbf{ST}'[i, j] = t_j^{-1}(A(t_j(x_i))), \qquad
        SE = \frac{1}{n} \sum_{i=1}^{n} \mathrm{Var}(\mathbf{ST}'[i, :])

    It lies in ``[0, inf)``, for unit vectors and ``over="channel"`` in ``[0, m / (m - 1)]``. Lower is more
    same-equivariant; 0 is same-equivariant. Even the identity network is above 0 where the inverse interpolates or
    pixels leave the frame: ``result.floor`` tells how much, and ``mask`` leaves those pixels out.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of the feature maps of a layer, floating
      point, ``(samples, transformations, channels, height, width)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``vse`` (:class:`~torch.Tensor`): float64 tensor ``(channels,)``, or of ``activation_shape`` for
      ``over="activation"``. NaN for feature maps that are zero throughout (0/0), which count as dead, for pixels
      outside the mask, and, with a warning, for fewer than two transformations.

    Args:
        transformations: the columns, with inverses; :func:`~lightning_invariance.evaluate` gives its own.
        normalize: divide each feature map by its euclidean norm, as the paper does.
        over: ``"channel"``: a feature map is one vector; ``"activation"``: every pixel by itself.
        mask: leave out pixels that some transformation of the set moves out of the frame. A number larger than 1 also
            leaves out pixels fewer than so many pixels of the map away, for what a layer sees around a pixel.
        normalized_by: ``"samples"`` divides by the sample variance of ST'; 0/0 is 1, x/0 is inf.
        input_size: height and width of the network's input, where the maps are of another size.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, the transformations have no inverses, or blocks do not fit.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance import quarter_turns
        >>> from lightning_invariance.measures import VarianceSameEquivariance
        >>> t = quarter_turns()
        >>> vse = VarianceSameEquivariance(t)
        >>> vse.update(t(torch.rand(2, 3, 8, 8)))  # the identity network
        >>> vse.compute()
        tensor([0., 0., 0.], dtype=torch.float64)
    """

    def __init__(
        self,
        transformations: TransformationSet | None = None,
        normalize: bool = True,
        over: str = "channel",
        mask: bool | int = False,
        normalized_by: str | None = None,
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        # Of whole feature maps, the response to each transformation is all that the variance needs.
        self._whole = over == "channel" and normalized_by is None
        super().__init__(squared=True, aggregate=None, response=self._whole, **kwargs)
        if over not in ("activation", "channel"):
            raise ValueError(f'Expected argument `over` to be "activation" or "channel", but got {over!r}.')
        self.over = over
        self._configure(transformations, normalize, mask, normalized_by, input_size)

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """Shared by measures that map back in the same way."""
        about = (id(self.transformations), *self._how)
        return frozenset([(VarianceSameEquivariance, self._whole, *about)])

    def compute(self) -> Tensor:
        """The value of every channel, or of every activation."""
        by_samples = self.normalized_by is not None
        if not self._enough(samples=2 if by_samples else 1):
            nan = self._undefined()
            return nan if self.over == "activation" else nan.flatten(1).sum(1)
        if self._whole:
            value = self.changes.sum(0) / (self.n_samples * (self.n_transformations - 1))
        else:
            value = self._over(self._transformation_variance())
        if by_samples:
            value = quotient(value, self._over(self._sample_variance()))
        return self._finished(value, self.over)

    def response(self) -> Tensor | None:
        """The part of each transformation in the value, ``(m,)``: its mean is that of the channels.

        None for ``over="activation"`` or ``normalized_by="samples"``.
        """
        if not self._whole or not self._enough():
            return None
        m = self.n_transformations
        return torch.where(self.lit > 0, self.changes, torch.nan).nanmean(1) * m / (self.n_samples * (m - 1))

    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        if not self._whole:
            super()._add(x, **of_rows)
            return
        changes = channel_changes(x, int(self.activation_shape[0]), None)
        self.changes = self.changes + changes if self.changes.numel() else changes

    def _over(self, values: Tensor) -> Tensor:
        return values if self.over == "activation" else values.flatten(1).sum(1)

    def _merge(self, a: States, b: States) -> States:
        return {**super()._merge(a, b), **self._merge_lit(a, b)}


class DistanceSameEquivariance(SameEquivarianceMeasure, DistanceMeasure):
    r"""Distance-based same-equivariance: do feature maps move as the input does? (paper, section 2.6, eq. 8).

    Each column of feature maps is mapped back by the inverse of its transformation, at the map's own resolution, and
    the transformation distance of the result is taken:

    .. math::
        \mathbf{ST}'[i, j] = t_j^{-1}(A(t_j(x_i))), \qquad
        SE = \frac{1}{n} \sum_{i=1}^{n} \mathrm{AverageDistance}(\mathbf{ST}'[i, :])

    It lies in ``[0, inf)``, for unit vectors and the euclidean distance in ``[0, 2]``. Lower is more same-equivariant;
    0 is same-equivariant. Even the identity network is above 0 where the inverse interpolates or pixels leave the
    frame: ``result.floor`` tells how much, and ``mask`` leaves those pixels out.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of the feature maps of a layer, floating
      point, ``(samples, transformations, channels, height, width)``.
    - ``indices`` (:class:`~torch.Tensor`, optional): whole numbers that name the samples, ``(samples,)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``dse`` (:class:`~torch.Tensor`): float64 tensor ``(channels,)``, or of ``activation_shape`` for
      ``over="activation"``. NaN for feature maps that are zero throughout (0/0), which count as dead, for pixels
      outside the mask, and, with a warning, for fewer than two transformations.

    Args:
        transformations: the columns, with inverses; :func:`~lightning_invariance.evaluate` gives its own.
        distance: see :class:`TransformationDistance`; by default ``"euclidean"`` of feature maps, ``"abs"`` of pixels.
        normalize: divide each feature map by its euclidean norm, as the paper does.
        over: ``"channel"``: a feature map is one vector; ``"activation"``: every pixel by itself.
        mask: see :class:`VarianceSameEquivariance`.
        normalized_by: ``"samples"`` divides by the sample distance of ST'; 0/0 is 1, x/0 is inf.
        input_size: height and width of the network's input, where the maps are of another size.
        samples: how many samples each transformation keeps for ``normalized_by``; see :class:`SampleDistance`.
        formulation: ``"direct"`` is the paper's first formulation, the mean of ‖A(t(x)) − t(A(x))‖ over samples and
            transformations, of which one must be the identity. By default ``"pairs"``, eq. 8, which also sees how
            different transformations differ from each other.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, the transformations have no inverses, or blocks do not fit.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance import quarter_turns
        >>> from lightning_invariance.measures import DistanceSameEquivariance
        >>> t = quarter_turns()
        >>> dse = DistanceSameEquivariance(t)
        >>> dse.update(t(torch.rand(2, 3, 8, 8)))  # the identity network
        >>> dse.compute()
        tensor([0., 0., 0.], dtype=torch.float64)
    """

    def __init__(
        self,
        transformations: TransformationSet | None = None,
        distance: Distance | None = None,
        normalize: bool = True,
        over: str = "channel",
        mask: bool | int = False,
        normalized_by: str | None = None,
        input_size: tuple[int, int] | None = None,
        samples: int = 16,
        formulation: str = "pairs",
        **kwargs: Any,
    ) -> None:
        if formulation not in ("pairs", "direct"):
            raise ValueError(f'Expected argument `formulation` to be "pairs" or "direct", but got {formulation!r}.')
        if formulation == "direct" and (normalized_by is not None or distance == "squared"):
            raise ValueError(
                'Expected argument `formulation` to be "pairs" with `normalized_by` or `distance="squared"`,'
                f" but got {formulation!r}."
            )
        self._direct = formulation == "direct"
        self._by_samples = normalized_by is not None
        chosen = distance if distance is not None else "abs" if over == "activation" else "euclidean"
        super().__init__(chosen, over, samples, aggregate=None, **kwargs)
        self._configure(transformations, normalize, mask, normalized_by, input_size)

    @property
    def needs_columns(self) -> bool:  # type: ignore[override]
        """Whether samples are kept."""
        return self._by_samples

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """Shared by measures that map back in the same way."""
        about = (id(self.transformations), *self._how, self._direct)
        return frozenset((DistanceSameEquivariance, part, *about) for part in super().update_rule)

    def _mapped(self, x: Tensor, transformations: TransformationSet) -> tuple[Tensor, Tensor]:
        if not self._direct:
            return super()._mapped(x, transformations)
        how = self.distance, self.normalize, self.over, self.mask, self.input_size
        return direct_distances(x, transformations, *how), unit_maps(x)[1].logical_not().sum((0, 1))

    def _row_distances(self, x: Tensor) -> Tensor:
        if not self._direct:
            return super()._row_distances(x)
        return x.shape[1] * x.double().sum((0, 1))  # distances already, whose mean is over m, not m²

    def compute(self) -> Tensor:
        """The value of every channel, or of every activation."""
        if not self._enough(samples=2 if self._by_samples else 1):
            return self._undefined()
        value = self._transformation_distance()
        if self._by_samples:
            value = quotient(value, self._sample_distance())
        return self._finished(value, self.over)

    def _merge(self, a: States, b: States) -> States:
        return {**super()._merge(a, b), **self._merge_lit(a, b)}
