"""Same-equivariance measures (paper, section 2.6), online: invariance of feature maps that are mapped back."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators import Accumulator, Changes, Deviations, DirectDistances, MappedBack
from lightning_invariance.accumulators.distances import Distance
from lightning_invariance.accumulators.mapped_back import BackMapping, check_inverses
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.aggregation import aggregate_maps
from lightning_invariance.measures.base import Measure, quotient
from lightning_invariance.measures.pair_distances import pair_distances
from lightning_invariance.measures.variance import sample_variance, transformation_variance
from lightning_invariance.transforms import TransformationSet


class SameEquivariance(Measure):
    """What both measures share: sums over feature maps that are mapped back, for each channel or each pixel.

    Args:
        needs: the accumulator.
        mapping: how maps are mapped back.
        over: ``"channel"`` or ``"activation"``.
        normalized_by: None or ``"samples"``.
        kwargs: additional arguments of ``torchmetrics.Metric``.
    """

    has_floor = True
    has_intervals = True

    def __init__(
        self, needs: Accumulator, mapping: BackMapping, over: str, normalized_by: str | None, **kwargs: Any
    ) -> None:
        super().__init__([needs], **kwargs)
        self.transformations, self.normalize, self.mask = mapping.transformations, mapping.normalize, mapping.mask
        self.input_size, self.over, self.normalized_by = mapping.input_size, over, normalized_by

    @property
    def is_ratio(self) -> bool:  # type: ignore[override]
        """Whether the measure is divided by that of samples."""
        return self.normalized_by is not None

    @property
    def least_samples(self) -> int:  # type: ignore[override]
        """Two where the measure is divided by that of samples."""
        return 1 if self.normalized_by is None else 2

    @property
    def is_mean_over_samples(self) -> bool:  # type: ignore[override]
        """Whether the measure is not divided by that of samples."""
        return self.normalized_by is None

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """``(channels,)``, or the activation's shape for ``over="activation"``."""
        return sums.activation_shape if self.over == "activation" else (sums.n_channels,)

    @abstractmethod
    def of_maps(self, sums: Sums) -> Tensor:
        """The value, given sums over feature maps whose channels come first."""

    def value(self, sums: Sums) -> Tensor:
        """SE of every channel, or of every activation."""
        value = self.defined(self.of_maps(sums.channels_first()), sums.channels_first())
        return value.movedim(0, sums.channel_axis) if self.over == "activation" else value

    def defined(self, value: Tensor, sums: Sums) -> Tensor:
        """NaN where a feature map was zero throughout (0/0 as a unit vector), and for pixels outside the mask."""
        value = value.view(self.value_shape(sums))
        lit = sums["lit"] > 0 if self.normalize else torch.ones_like(sums["lit"], dtype=torch.bool)
        known = lit.view(-1, *[1] * (value.ndim - 1))
        if self.over == "activation" and "inside" in sums and sums["inside"].numel():
            known = known & sums["inside"]
        return torch.where(known, value, torch.nan)


def back_mapping(
    transformations: TransformationSet | None,
    normalize: bool,
    mask: bool | int,
    normalized_by: str | None,
    input_size: tuple[int, int] | None,
) -> BackMapping:
    """How maps are mapped back.

    Raises:
        ValueError: If an argument is out of its range, or the transformations have no inverses.
    """
    if normalized_by not in (None, "samples"):
        raise ValueError(f'Expected argument `normalized_by` to be None or "samples", but got {normalized_by!r}.')
    if not isinstance(mask, int) or mask < 0:
        raise ValueError(f"Expected argument `mask` to be a bool or an int of at least 0, but got {mask!r}.")
    if transformations is not None:
        check_inverses(transformations)
    return BackMapping(transformations, normalize, int(mask), input_size)


class VarianceSameEquivariance(SameEquivariance):
    r"""Variance-based same-equivariance: do feature maps move as the input does? (paper, section 2.6).

    Blocks are of feature maps, ``(samples, transformations, channels, height, width)``. Each column is mapped back by
    the inverse of its transformation, at the map's own resolution, and the transformation variance of the result is
    taken:

    .. math::
        \mathbf{ST}'[i, j] = t_j^{-1}(A(t_j(x_i))), \qquad
        SE = \frac{1}{n} \sum_{i=1}^{n} \mathrm{Var}(\mathbf{ST}'[i, :])

    It lies in ``[0, inf)``, for unit vectors and ``over="channel"`` in ``[0, m / (m - 1)]``. Lower is more
    same-equivariant; 0 is same-equivariant. Even the identity network is above 0 where the inverse interpolates or
    pixels leave the frame: ``result.floor`` tells how much, and ``mask`` leaves those pixels out.

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

    any_channel_axis = True
    has_response_intervals = True

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
        if over not in ("activation", "channel"):
            raise ValueError(f'Expected argument `over` to be "activation" or "channel", but got {over!r}.')
        mapping = back_mapping(transformations, normalize, mask, normalized_by, input_size)
        # Of whole feature maps, the changes under each transformation are all that the variance needs.
        whole_maps = over == "channel" and normalized_by is None
        inner: Accumulator = Changes() if whole_maps else Deviations()
        super().__init__(MappedBack((inner,), mapping), mapping, over, normalized_by, **kwargs)
        self.whole_maps = whole_maps

    def of_maps(self, sums: Sums) -> Tensor:
        """The variance of maps that are mapped back."""
        if self.whole_maps:
            return sums["changes"].sum(0) / (sums.n_samples * sums.n_transformations)
        aggregate = None if self.over == "activation" else "sum"
        value = aggregate_maps(transformation_variance(sums), aggregate)
        if self.normalized_by is not None:
            value = quotient(value, aggregate_maps(sample_variance(sums), aggregate))
        return value

    def response_of(self, sums: Sums) -> Tensor | None:
        """The part of each transformation in the value, ``(m,)``: its mean is that of the channels.

        None for ``over="activation"`` or ``normalized_by="samples"``.
        """
        if not self.whole_maps or not sums.n_samples:
            return None
        return torch.where(sums["lit"] > 0, sums["changes"], torch.nan).nanmean(1) / sums.n_samples


class DistanceSameEquivariance(SameEquivariance):
    r"""Distance-based same-equivariance: do feature maps move as the input does? (paper, section 2.6, eq. 8).

    Blocks are of feature maps, ``(samples, transformations, channels, height, width)``. Each column is mapped back by
    the inverse of its transformation, at the map's own resolution, and the transformation distance of the result is
    taken:

    .. math::
        \mathbf{ST}'[i, j] = t_j^{-1}(A(t_j(x_i))), \qquad
        SE = \frac{1}{n} \sum_{i=1}^{n} \mathrm{AverageDistance}(\mathbf{ST}'[i, :])

    It lies in ``[0, inf)``, for unit vectors and the euclidean distance in ``[0, 2]``. Lower is more same-equivariant;
    0 is same-equivariant. Even the identity network is above 0 where the inverse interpolates or pixels leave the
    frame: ``result.floor`` tells how much, and ``mask`` leaves those pixels out.

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
        samples: how many samples a group holds, or each transformation keeps, for ``normalized_by``; see
            :class:`SampleDistance`.
        formulation: ``"direct"`` is the paper's first formulation, the mean of ‖A(t(x)) − t(A(x))‖ over samples and
            transformations, of which one must be the identity. By default ``"pairs"``, eq. 8, which also sees how
            different transformations differ from each other.

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

    any_channel_axis = True

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
        mapping = back_mapping(transformations, normalize, mask, normalized_by, input_size)
        chosen = distance if distance is not None else "abs" if over == "activation" else "euclidean"
        pairs = pair_distances(chosen, over, samples)
        needs: Accumulator
        if formulation == "direct":
            needs = DirectDistances(mapping, chosen, over)
        else:
            needs = MappedBack(pairs.needs(rows=True, columns=normalized_by is not None), mapping)
        super().__init__(needs, mapping, over, normalized_by, **kwargs)
        self.pairs, self.distance, self.samples, self.formulation = pairs, chosen, samples, formulation

    @property
    def relative_bias(self) -> float:  # type: ignore[override]
        """That of the sample distance which it is divided by."""
        return 1.0 if self.normalized_by is not None else 0.0

    def of_maps(self, sums: Sums) -> Tensor:
        """The distance of maps that are mapped back."""
        if self.formulation == "direct":
            return sums["row_distances"] / (sums.n_samples * sums.n_transformations)
        value = self.pairs.within_rows(sums)
        if self.normalized_by is not None:
            value = quotient(value, self.pairs.within_columns(sums))
        return value
