"""Same-equivariance measures (paper, section 2.6), online: invariance of feature maps that are mapped back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.functional.distance import Distance
from lightning_invariance.functional.equivariance import direct_distances, mapped_back, seen
from lightning_invariance.functional.variance import normalize as quotient
from lightning_invariance.measures.base import Measure, States
from lightning_invariance.measures.distance import DistanceMeasure
from lightning_invariance.measures.variance import VarianceMeasure
from lightning_invariance.transforms import TransformationSet


class SameEquivarianceMeasure(Measure):
    """What both measures share: the columns of a block are mapped back before anything is summed.

    To the states of the measure of invariance comes ``lit`` (channels,): how many feature maps were not zero.
    """

    has_floor = True

    #: Whether each column has a mask of its own, so that no pixel is left out of all.
    _direct = False

    lit: Tensor

    def _configure(
        self,
        transformations: TransformationSet | None,
        normalize: bool,
        mask: bool | int,
        normalized_by: str | None,
        input_size: tuple[int, int] | None,
    ) -> None:
        if normalized_by not in (None, "samples"):
            raise ValueError(f'Expected argument `normalized_by` to be None or "samples", but got {normalized_by!r}.')
        if not isinstance(mask, int) or mask < 0:
            raise ValueError(f"Expected argument `mask` to be a bool or an int of at least 0, but got {mask!r}.")
        self.transformations, self.input_size = transformations, input_size
        self.normalize, self.mask, self.normalized_by = normalize, mask, normalized_by
        self._input_axes: int | None = None
        self._inside: Tensor | None = None  # the mask of the maps of this layer
        if transformations is not None:
            self._check_inverses(transformations)
        self._add_states(lit=torch.zeros(0, dtype=torch.long))

    def prepare(self, transformations: TransformationSet, input_shape: Sequence[int]) -> None:
        """Take the transformations and the input size of a walk, where none were given."""
        self._check_inverses(transformations)
        if self.transformations is None:
            self.transformations = transformations
        if len(input_shape) >= 2:
            self._input_axes = len(input_shape)
            if self.input_size is None:
                self.input_size = (input_shape[-2], input_shape[-1])

    def applies_to(self, activation_shape: Sequence[int]) -> bool:
        """Only feature maps, with as many axes as the input, can be transformed as the input is."""
        axes = 3 if self._input_axes is None else self._input_axes
        return len(activation_shape) == axes

    def update(
        self, st_block: Tensor, indices: Tensor | None = None, shared: dict[Hashable, Any] | None = None
    ) -> None:
        """Add complete rows of the ST matrix.

        Args:
            st_block: floating-point tensor ``(samples, transformations, channels, height, width)``.
            indices: ``(samples,)``: whole numbers that name the samples; used with ``normalized_by="samples"``.
            shared: one dict for all measures that are updated with this block, and for no other block: those that map
                back in the same way then do it once.

        Raises:
            ValueError: If the block does not hold feature maps, or does not fit to those before.
            TypeError: If the block is not of a real floating-point type.
        """
        if self.transformations is None:
            raise ValueError("Expected argument `transformations` where the measure is updated by hand, but got None.")
        if isinstance(st_block, Tensor) and (st_block.ndim < 5 or not st_block.is_floating_point()):
            if st_block.is_floating_point():
                raise ValueError(
                    "Expected argument `st_block` of shape (samples, transformations, channels, height, width),"
                    f" but got {tuple(st_block.shape)}."
                )
            raise TypeError(
                f"Expected argument `st_block` to be a real floating-point tensor, but got {st_block.dtype}."
            )
        if len(st_block) == 0:
            return
        with torch.no_grad():
            x = st_block.detach()
            x = x if x.dtype == torch.float64 else x.float()
            shared = {} if shared is None else shared
            how = (self._direct and self.update_rule, id(self.transformations), *self._how)
            if how not in shared:
                shared[how] = self._mapped(x, self.transformations)
            back, lit = shared[how]
        self._update(back, **({} if indices is None else {"indices": indices}))
        self.lit = self.lit + lit if self.lit.numel() else lit

    def _mapped(self, x: Tensor, transformations: TransformationSet) -> tuple[Tensor, Tensor]:
        """ST', and how many feature maps of each channel are not zero."""
        mask: bool | Tensor = False
        if self.mask:
            if self._inside is None or self._inside.shape != x.shape[-2:] or self._inside.dtype != x.dtype:
                self._inside = seen(x, transformations, self.mask, self.input_size)
            mask = self._inside.to(x.device)
        back = mapped_back(x, transformations, self.normalize, mask, self.input_size)
        return back, (back != 0).flatten(3).any(3).sum((0, 1))

    @property
    def _how(self) -> tuple[Hashable, ...]:
        return self.normalize, self.mask, self.input_size

    def dead(self) -> Tensor | None:
        """Activations of feature maps that were zero throughout: bool of ``activation_shape``."""
        shape = self.activation_shape.tolist()
        return (self.lit == 0).view(-1, *[1] * (len(shape) - 1)).expand(shape)

    def _finished(self, value: Tensor, over: str) -> Tensor:
        """NaN where a feature map was zero throughout (0/0 as a unit vector), or a pixel lies outside the mask."""
        lit = (self.lit > 0) if self.normalize else torch.ones_like(self.lit, dtype=torch.bool)
        if over == "channel":
            return torch.where(lit, value, torch.nan)
        inside = torch.ones_like(value, dtype=torch.bool)
        if self.mask and self.transformations is not None and not self._direct:
            inside = inside & (seen(value, self.transformations, self.mask, self.input_size) > 0)
        return torch.where(lit.view(-1, *[1] * (value.ndim - 1)) & inside, value, torch.nan)

    def _merge_lit(self, a: States, b: States) -> States:
        return {"lit": a["lit"] + b["lit"]}

    def _check_inverses(self, transformations: TransformationSet) -> None:
        if not transformations.invertible:
            raise ValueError(
                f"Expected argument `transformations` to have inverses for {type(self).__name__},"
                f" but {transformations!r} has none."
            )


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
        super().__init__(squared=True, aggregate=None, **kwargs)
        if over not in ("activation", "channel"):
            raise ValueError(f'Expected argument `over` to be "activation" or "channel", but got {over!r}.')
        self.over = over
        self._configure(transformations, normalize, mask, normalized_by, input_size)

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """Shared by measures that map back in the same way."""
        about = (id(self.transformations), *self._how)
        return frozenset([(VarianceSameEquivariance, *about)])

    def compute(self) -> Tensor:
        """The value of every channel, or of every activation."""
        by_samples = self.normalized_by is not None
        if not self._enough(samples=2 if by_samples else 1):
            nan = self._undefined()
            return nan if self.over == "activation" else nan.flatten(1).sum(1)
        value = self._over(self._transformation_variance())
        if by_samples:
            value = quotient(value, self._over(self._sample_variance()))
        return self._finished(value, self.over)

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
        return direct_distances(x, transformations, *how), (x != 0).flatten(3).any(3).sum((0, 1))

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
