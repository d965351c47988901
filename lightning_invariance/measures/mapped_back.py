"""What both measures of same-equivariance share: feature maps are mapped back before anything is added up."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.functional.equivariance import mapped_back, seen, unit_maps
from lightning_invariance.measures.base import Measure, States
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

    def prepare(
        self, transformations: TransformationSet, input_shape: Sequence[int], n_samples: int | None = None
    ) -> None:
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
        back = mapped_back(x, transformations, False, mask, self.input_size)
        unit, zero = unit_maps(back)
        return unit if self.normalize else back, zero.logical_not().sum((0, 1))

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
