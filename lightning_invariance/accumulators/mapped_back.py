"""Sums over feature maps that the inverses of the transformations map back to the original frame."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, max_pool2d, max_pool3d

from lightning_invariance.accumulators.base import Accumulator, add_to
from lightning_invariance.accumulators.distances import unit_maps, zero_maps
from lightning_invariance.accumulators.rows import Context, Rows, States
from lightning_invariance.transforms import TransformationSet

#: A pixel counts as visible if at least this fraction of its value comes from inside the frame.
MIN_VISIBLE = 1 - 1e-4


@dataclass(frozen=True)
class BackMapping:
    """How feature maps are mapped back.

    Attributes:
        transformations: the columns, with inverses; None to use the transformations of the evaluation.
        normalize: whether each feature map is divided by its euclidean norm.
        mask: 0 for no mask; 1 to leave out pixels that some transformation moves out of the frame; a larger number also
            leaves out pixels less than that many pixels away from them.
        input_size: shape of the network's input, or its last axes, for maps of another size.
        flat: whether maps become ``(channels, positions inside the mask)``, and activations without positions,
            ``(channels,)``, are measured as they are.
        input_shape: shape of the network's input, which decides what counts as a feature map; empty if unknown.
    """

    transformations: TransformationSet | None
    normalize: bool
    mask: int
    input_size: tuple[int, ...] | None
    flat: bool = False
    input_shape: tuple[int, ...] = ()

    def prepared(self, context: Context) -> BackMapping:
        """Fill in the transformations and the input size of an evaluation, if none were given."""
        check_inverses(context.transformations)
        known = replace(self, transformations=self.transformations or context.transformations)
        if not context.input_shape:
            return known
        return replace(known, input_shape=context.input_shape, input_size=self.input_size or context.input_shape)

    def checked(self, rows: Rows) -> TransformationSet:
        """Return the transformations.

        Raises:
            ValueError: If there are none, or the rows are not feature maps.
        """
        if self.transformations is None:
            raise ValueError("Expected argument `transformations` where the measure is updated by hand, but got None.")
        axes = self.transformations.map_axes
        if rows.values.ndim < 3 + axes and not (self.flat and rows.values.ndim == 3):
            positions = ", height, width" if axes == 2 else ", positions" * axes
            raise ValueError(
                f"Expected argument `st_block` of shape (samples, transformations, channels{positions}),"
                f" but got {tuple(rows.values.shape)}."
            )
        return self.transformations

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Whether activations are feature maps: they have as many axes as the input."""
        if self.flat and len(activation_shape) == 1:
            return True
        if self.transformations is None or not self.input_shape:
            return len(activation_shape) == 3
        return self.transformations.fits(activation_shape, self.input_shape)

    def why_not(self, activation_shape: tuple[int, ...], channel_axis: int) -> str:
        """Why feature maps cannot be mapped back."""
        positions = tuple(size for axis, size in enumerate(activation_shape) if axis != channel_axis)
        if self.transformations is None or not positions or not self.input_shape:
            return ""
        return self.transformations.why_not(positions, self.input_shape)

    def inside(self, visible: Tensor) -> Tensor:
        """The mask, 1 or 0, given the visible fraction of each pixel ``(columns, 1, *positions)``."""
        outside = (visible < MIN_VISIBLE).double()
        pool = (max_pool1d, max_pool2d, max_pool3d)[outside.ndim - 3]
        return 1 - (pool(outside, 2 * self.mask - 1, 1, self.mask - 1) if self.mask > 1 else outside)


@dataclass(frozen=True)
class MappedBack(Accumulator):
    """The sums of other accumulators over :math:`ST'[i, j] = t_j^{-1}(A(t_j(x_i)))` (paper, section 2.6).

    Additional states are ``lit`` ``(channels,)``, the number of feature maps that were not zero everywhere (empty for
    ``mapping.flat``), and ``inside`` ``(positions,)``, the pixels within the mask; it is empty without a mask.

    Attributes:
        inner: the other accumulators, whose states have different names.
        mapping: how maps are mapped back.
    """

    inner: tuple[Accumulator, ...]
    mapping: BackMapping

    channels_first = True
    any_channel_axis = True

    @property
    def cpu_states(self) -> tuple[str, ...]:  # type: ignore[override]
        """The CPU states of the inner accumulators and, where it selects positions, the mask."""
        inner = tuple(state for accumulator in self.inner for state in accumulator.cpu_states)
        return (*inner, "inside") if self.mapping.flat else inner

    @property
    def least_run(self) -> int:
        """The longest run that an inner accumulator needs."""
        return max(accumulator.least_run for accumulator in self.inner)

    def empty(self) -> States:
        """The states before the first row."""
        empty = {"lit": torch.zeros(0, dtype=torch.long), "inside": torch.zeros(0, dtype=torch.bool)}
        for accumulator in self.inner:
            empty.update(accumulator.empty())
        return empty

    def add(self, states: States, rows: Rows) -> None:
        """Add the rows of ST' to the inner accumulators."""
        states["inside"], mapped, lit = self._mapped(states, rows)
        add_to(states, lit=lit)
        for accumulator in self.inner:
            accumulator.add(states, mapped)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        states = {"lit": a["lit"] + b["lit"], "inside": a["inside"]}
        for accumulator in self.inner:
            states.update(accumulator.merge(a, b))
        return states

    def prepared(self, context: Context) -> Accumulator:
        """Prepare the inner accumulators and the mapping."""
        mapping = self.mapping.prepared(context)
        context = replace(context, transformations=mapping.transformations or context.transformations)
        return replace(self, inner=tuple(each.prepared(context) for each in self.inner), mapping=mapping)

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Whether activations are feature maps."""
        return self.mapping.applies_to(activation_shape)

    def why_not(self, activation_shape: tuple[int, ...], channel_axis: int) -> str:
        """Why feature maps cannot be mapped back."""
        return self.mapping.why_not(activation_shape, channel_axis)

    @property
    def has_shares(self) -> bool:
        """Whether all inner accumulators have them."""
        return all(accumulator.has_shares for accumulator in self.inner)

    def shares(self, rows: Rows, totals: States) -> States:
        """The contributions to the sums of the inner accumulators, with channels first."""
        _, mapped, _ = self._mapped(totals, rows)
        found: States = {}
        for accumulator in self.inner:
            found.update(accumulator.shares(mapped, totals))
        return found

    def dead(self, states: States) -> Tensor | None:
        """Which channels were zero everywhere or, for ``mapping.flat``, what the inner accumulator tells."""
        return self.inner[0].dead(states) if self.mapping.flat else states["lit"] == 0

    def _mapped(self, states: States, rows: Rows) -> tuple[Tensor, Rows, Tensor]:
        """The mask, the rows of ST', and the number of nonzero maps; computed once for all equal mappings."""
        transformations, mapping = self.mapping.checked(rows), self.mapping

        def mapped() -> tuple[Tensor, Rows, Tensor]:
            maps, inside = rows.channels_first, states["inside"]
            maps = rows.turned(maps, transformations, inverse=True)
            lit = torch.zeros(0, dtype=torch.long, device=maps.device)
            if maps.ndim == 3:  # no positions to map back
                return inside, replace(rows, values=maps, memo={}, channel_axis=0), lit
            back = transformations.inverse(maps, mapping.input_size)
            if mapping.mask:
                if not inside.numel():
                    ones = ones_like_map(maps, torch.device("cpu") if mapping.flat else maps.device)
                    moved = transformations.of_maps(ones, mapping.input_size)
                    least = transformations.inverse(moved, mapping.input_size)[0].amin(0, keepdim=True)
                    inside = (mapping.inside(least) > 0).flatten()
                if mapping.flat:
                    back = back.flatten(3)
                    back = back if inside.all() else back[..., inside.nonzero().flatten().to(back.device)]
                    return inside, replace(rows, values=back, memo={}, channel_axis=0), lit
                back = back * inside.view(maps.shape[3:])
            back, zero = unit_maps(back) if mapping.normalize else (back, zero_maps(back))
            return inside, replace(rows, values=back, memo={}, channel_axis=0), (~zero).sum((0, 1))

        return rows.once(mapping, mapped)


def check_inverses(transformations: TransformationSet) -> None:
    """Raise for transformations without inverses."""
    if not transformations.invertible:
        raise ValueError(
            "Expected argument `transformations` to have inverses for a measure of same-equivariance,"
            f" but {transformations!r} has none."
        )


def identity_of(transformations: TransformationSet) -> int:
    """The column of the identity.

    Raises:
        ValueError: If the set knows of none.
    """
    if transformations.identity is None:
        raise ValueError(
            "Expected argument `transformations` to include the identity, whose maps the others are compared with, but"
            f" {transformations!r} knows of none: write `rotations(angles=[0, ...])`, or name it in"
            " `TransformationSet.from_callables(..., identity=)`."
        )
    return transformations.identity


def rounding_of(means: Tensor, number: Tensor | int) -> Tensor:
    """The largest sum of squared deviations of so many equal values from their mean, which is rounded."""
    return (64 * torch.finfo(means.dtype).eps * means).square() * number


def constant_channels(means: Tensor, squares: Tensor, number: Tensor) -> Tensor:
    """Which channels had one value under all transformations, given means and squared deviations ``(m, channels)``."""
    apart = (means - means[:1]).abs() <= 64 * torch.finfo(means.dtype).eps * means.abs()
    return (squares <= rounding_of(means, number)).all(0) & apart.all(0)


def ones_like_map(maps: Tensor, device: torch.device) -> Tensor:
    """A feature map of ones, ``(1, 1, *positions)`` in float64."""
    return torch.ones(1, 1, *maps.shape[3:], dtype=torch.float64, device=device)
