"""Same-equivariance measures (paper, section 2.6): invariance of feature maps after the inverse transformation."""

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
from lightning_invariance.messages import check_int
from lightning_invariance.transforms import TransformationSet


class SameEquivariance(Measure):
    """Base of the same-equivariance measures: sums over feature maps after the inverse transformation."""

    has_floor = True
    has_intervals = True

    def __init__(
        self, needs: Accumulator, mapping: BackMapping, over: str, normalized_by: str | None, **kwargs: Any
    ) -> None:
        if over not in ("activation", "channel"):
            raise ValueError(f'Expected argument `over` to be "activation" or "channel", but got {over!r}.')
        super().__init__([needs], **kwargs)
        self.transformations, self.normalize, self.mask = mapping.transformations, mapping.normalize, mapping.mask
        self.input_size, self.over, self.normalized_by = mapping.input_size, over, normalized_by
        self.is_ratio = normalized_by is not None
        self.least_samples = 2 if self.is_ratio else 1

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """``(channels,)``, or ``activation_shape`` for ``over="activation"``."""
        return sums.activation_shape if self.over == "activation" else (sums.n_channels,)

    @abstractmethod
    def of_maps(self, sums: Sums) -> Tensor:
        """The value, given sums over feature maps with channels first."""

    def value(self, sums: Sums) -> Tensor:
        """SE of every channel, or of every activation; NaN for maps that are always zero, and for masked pixels."""
        sums, channel_axis = sums.channels_first(), sums.channel_axis
        value = self.of_maps(sums).view(self.value_shape(sums))
        lit = sums["lit"] > 0 if self.normalize else torch.ones_like(sums["lit"], dtype=torch.bool)
        defined = lit.view(-1, *[1] * (value.ndim - 1))
        if self.over == "channel":
            return torch.where(defined, value, torch.nan)
        if "inside" in sums and sums["inside"].numel():
            defined = defined & sums["inside"].view(value.shape[1:])
        return torch.where(defined, value, torch.nan).movedim(0, channel_axis)


def back_mapping(
    transformations: TransformationSet | None,
    normalize: bool,
    mask: bool | int,
    normalized_by: str | None,
    input_size: tuple[int, ...] | None,
) -> BackMapping:
    """Check the arguments of the inverse mapping."""
    if normalized_by not in (None, "samples"):
        raise ValueError(f'Expected argument `normalized_by` to be None or "samples", but got {normalized_by!r}.')
    check_int("mask", mask, 0)
    if transformations is not None:
        check_inverses(transformations)
    return BackMapping(transformations, normalize, int(mask), input_size)


class VarianceSameEquivariance(SameEquivariance):
    r"""Variance-based same-equivariance: do feature maps change as the input does? (paper, section 2.6).

    Blocks are of feature maps, ``(samples, transformations, channels, height, width)``. Each column is transformed by
    the inverse of its transformation, at the resolution of the map; the value is the transformation variance of the
    result:

    .. math::
        \mathbf{ST}'[i, j] = t_j^{-1}(A(t_j(x_i))), \qquad
        SE = \frac{1}{n} \sum_{i=1}^{n} \mathrm{Var}(\mathbf{ST}'[i, :])

    It is in ``[0, inf)``, and in ``[0, m / (m - 1)]`` for unit vectors and ``over="channel"``. Lower is more
    same-equivariant; 0 is same-equivariant. Even the identity network is above 0 where the inverse interpolates or
    pixels leave the frame: ``result.floor`` is its value, and ``mask`` excludes these pixels.

    The value is ``(channels,)``, or has ``activation_shape`` for ``over="activation"``. It is NaN for feature maps that
    are zero in all rows (0/0), which count as dead, for masked pixels and, with a warning, for fewer than two
    transformations.

    Args:
        transformations: the columns, with inverses; :func:`~lightning_invariance.evaluate` provides its own.
        normalize: divide each feature map by its euclidean norm, as in the paper.
        over: ``"channel"``: a feature map is one vector; ``"activation"``: every pixel by itself.
        mask: exclude pixels that a transformation of the set moves out of the frame. A number larger than 1 also
            excludes pixels of the map closer than this many pixels to an excluded one, for layers with larger receptive
            fields.
        normalized_by: ``"samples"`` divides by the sample variance of ST'; 0/0 is 1, x/0 is inf.
        input_size: height and width of the network's input, where the maps have another size.

    Raises:
        ValueError: If an argument is out of its range, or the transformations have no inverses.

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
        input_size: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        mapping = back_mapping(transformations, normalize, mask, normalized_by, input_size)
        # The changes under each transformation are enough for the variance of whole feature maps, and need less memory.
        whole_maps = over == "channel" and normalized_by is None
        inner: Accumulator = Changes() if whole_maps else Deviations()
        super().__init__(MappedBack((inner,), mapping), mapping, over, normalized_by, **kwargs)
        self.whole_maps = whole_maps

    def of_maps(self, sums: Sums) -> Tensor:
        """The transformation variance of ST', possibly divided by its sample variance."""
        if self.whole_maps:
            return sums["map_spread"] / (sums.n_samples * (sums.n_transformations - 1))
        aggregate = None if self.over == "activation" else "sum"
        value = aggregate_maps(transformation_variance(sums), aggregate)
        if self.normalized_by is not None:
            value = quotient(value, aggregate_maps(sample_variance(sums), aggregate))
        return value

    def response_of(self, sums: Sums) -> Tensor | None:
        """How much each transformation changes the maps that were mapped back, ``(m,)``.

        Half the mean squared distance between a map and its value under the identity, averaged over channels: 0 where
        the map moves as the input does. For a set without a known identity, the contribution of each transformation,
        whose mean is the mean of the value over channels. None for ``over="activation"`` or
        ``normalized_by="samples"``.
        """
        if not self.whole_maps or not sums.n_samples:
            return None
        return torch.where(sums["lit"] > 0, sums["changes"], torch.nan).nanmean(1) / sums.n_samples


class DistanceSameEquivariance(SameEquivariance):
    r"""Distance-based same-equivariance: do feature maps change as the input does? (paper, section 2.6, eq. 8).

    As :class:`VarianceSameEquivariance`, with the transformation distance instead of the variance:

    .. math::
        \mathbf{ST}'[i, j] = t_j^{-1}(A(t_j(x_i))), \qquad
        SE = \frac{1}{n} \sum_{i=1}^{n} \mathrm{AverageDistance}(\mathbf{ST}'[i, :])

    It is in ``[0, inf)``, and in ``[0, 2]`` for unit vectors and the euclidean distance. Lower is more
    same-equivariant; 0 is same-equivariant. Shape, NaN and ``result.floor`` are as for the variance.

    Args: see :class:`VarianceSameEquivariance`, and

        distance: see :class:`TransformationDistance`; by default ``"euclidean"`` of feature maps, ``"abs"`` of pixels.
        samples: see :class:`SampleDistance`; of use with ``normalized_by="samples"``, the sample distance of ST'.
        formulation: ``"direct"``: the paper's first formulation, the mean of ‖A(t(x)) − t(A(x))‖ over samples and
            transformations, which must include the identity. ``"pairs"``: eq. 8, which also compares different
            transformations with each other.

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
        input_size: tuple[int, ...] | None = None,
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
        needs: Accumulator = MappedBack(pairs.needs(rows=True, columns=normalized_by is not None), mapping)
        if formulation == "direct":
            needs = DirectDistances(mapping, chosen, over)
        super().__init__(needs, mapping, over, normalized_by, **kwargs)
        self.pairs, self.distance, self.samples, self.formulation = pairs, chosen, samples, formulation
        self.relative_bias = 1.0 if self.is_ratio else 0.0  # of the sample distance in the denominator

    def of_maps(self, sums: Sums) -> Tensor:
        """The transformation distance of ST', possibly divided by its sample distance."""
        if self.formulation == "direct":
            return sums["row_distances"] / (sums.n_samples * sums.n_transformations)
        value = self.pairs.within_rows(sums)
        if self.normalized_by is not None:
            value = quotient(value, self.pairs.within_columns(sums))
        return value
