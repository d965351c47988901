"""Feature maps that are mapped back by the inverse of their transformation, and what is summed of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from lightning_invariance.accumulators.base import Accumulator, Context, Rows, States, add_to
from lightning_invariance.accumulators.distances import Distance, distance_between, unit_maps, zero_maps
from lightning_invariance.transforms import TransformationSet

#: A pixel is seen where at least this part of it comes from inside the frame.
SEEN = 1 - 1e-4


@dataclass(frozen=True)
class BackMapping:
    """How feature maps are mapped back.

    Attributes:
        transformations: the columns, with inverses; None where an evaluation gives its own.
        normalize: divide each feature map by its euclidean norm.
        mask: leave out pixels that some transformation moves out of the frame; a number larger than 1 also those fewer
            than so many pixels away.
        input_size: height and width of the network's input, where the maps are of another size.
        axes: number of axes of the input, which are those of feature maps.
    """

    transformations: TransformationSet | None
    normalize: bool
    mask: int
    input_size: tuple[int, int] | None
    axes: int = 3

    def prepared(self, context: Context) -> BackMapping:
        """With the transformations and the input size of an evaluation, where none were given."""
        check_inverses(context.transformations)
        known = replace(self, transformations=self.transformations or context.transformations)
        if len(context.input_shape) < 2:
            return known
        height, width = context.input_shape[-2:]
        return replace(known, axes=len(context.input_shape), input_size=self.input_size or (height, width))

    def checked(self, rows: Rows) -> TransformationSet:
        """The transformations of these rows.

        Raises:
            ValueError: If there are none, or the rows are not of feature maps.
        """
        if self.transformations is None:
            raise ValueError("Expected argument `transformations` where the measure is updated by hand, but got None.")
        if rows.values.ndim < 5:
            raise ValueError(
                "Expected argument `st_block` of shape (samples, transformations, channels, height, width),"
                f" but got {tuple(rows.values.shape)}."
            )
        return self.transformations

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Only feature maps, with as many axes as the input, can be transformed as the input is."""
        return len(activation_shape) == self.axes


@dataclass(frozen=True)
class MappedBack(Accumulator):
    """The sums of other accumulators over :math:`ST'[i, j] = t_j^{-1}(A(t_j(x_i)))` (paper, section 2.6).

    To their states come ``lit`` ``(channels,)``, how many feature maps were not zero throughout, and ``inside``
    ``(height, width)``, the pixels within the mask, which is empty without one.

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
        """Those of the inner ones."""
        return tuple(state for accumulator in self.inner for state in accumulator.cpu_states)

    @property
    def least_run(self) -> int:
        """That of the inner ones."""
        return max(accumulator.least_run for accumulator in self.inner)

    def empty(self) -> States:
        """The states before the first row."""
        empty = {"lit": torch.zeros(0, dtype=torch.long), "inside": torch.zeros(0, 0, dtype=torch.bool)}
        for accumulator in self.inner:
            empty.update(accumulator.empty())
        return empty

    def add(self, states: States, rows: Rows) -> None:
        """Add the rows that were mapped back to the inner accumulators."""
        states["inside"], back = self._mapped(states, rows)
        add_to(states, lit=back.lit)
        for accumulator in self.inner:
            accumulator.add(states, back.rows)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        states = {"lit": a["lit"] + b["lit"], "inside": a["inside"]}
        for accumulator in self.inner:
            states.update(accumulator.merge(a, b))
        return states

    def prepared(self, context: Context) -> Accumulator:
        """With the transformations and the input size of an evaluation, where none were given."""
        inner = tuple(accumulator.prepared(context) for accumulator in self.inner)
        return replace(self, inner=inner, mapping=self.mapping.prepared(context))

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Only feature maps."""
        return self.mapping.applies_to(activation_shape)

    @property
    def has_shares(self) -> bool:
        """Whether the inner ones tell them."""
        return all(accumulator.has_shares for accumulator in self.inner)

    def shares(self, rows: Rows, totals: States) -> States:
        """The shares in the sums of the inner accumulators, of maps whose channels come first."""
        mapped = self._mapped(totals, rows)[1].rows
        found: States = {}
        for accumulator in self.inner:
            found.update(accumulator.shares(mapped, totals))
        return found

    def dead(self, states: States) -> Tensor:
        """Which channels were zero throughout."""
        return states["lit"] == 0

    def _mapped(self, states: States, rows: Rows) -> tuple[Tensor, _Mapped]:
        """The mask, and ST' with the number of maps that are not zero; once for all that map back in the same way."""
        transformations, mapping = self.mapping.checked(rows), self.mapping

        def mapped() -> tuple[Tensor, _Mapped]:
            maps, inside = rows.channels_first, states["inside"]
            back = transformations.inverse(maps, mapping.input_size)
            if mapping.mask:
                if not inside.numel():
                    inside = seen(maps, transformations, mapping.mask, mapping.input_size) > 0
                back = back * inside
            back, zero = unit_maps(back) if mapping.normalize else (back, zero_maps(back))
            return inside, _Mapped(rows.of(back), (~zero).sum((0, 1)))

        return rows.once(mapping, mapped)


@dataclass
class _Mapped:
    """Rows of ST', and how many feature maps of each channel are not zero."""

    rows: Rows
    lit: Tensor


@dataclass(frozen=True)
class DirectDistances(Accumulator):
    """The paper's first formulation: ‖A(t(x)) − t(A(x))‖, summed over samples and transformations.

    ``row_distances`` ``(activations,)`` or ``(channels,)``, and ``lit`` as of :class:`MappedBack`. Each column has a
    mask of its own, so that no pixel is left out of all of them.

    Attributes:
        mapping: how maps are transformed; one transformation must be the identity.
        distance: see :func:`~lightning_invariance.accumulators.distances.distance_between`.
        over: ``"activation"``, or ``"channel"`` where a feature map is one vector.
    """

    mapping: BackMapping
    distance: Distance
    over: str

    channels_first = True
    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"row_distances": torch.zeros(0, dtype=torch.float64), "lit": torch.zeros(0, dtype=torch.long)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the distances of rows."""
        maps = rows.channels_first
        found = direct_distances(maps, self.mapping.checked(rows), self.mapping, self.distance, self.over)
        add_to(states, row_distances=found.double().sum((0, 1)).flatten(), lit=(~zero_maps(maps)).sum((0, 1)))

    def shares(self, rows: Rows, totals: States) -> States:
        """The distances of each sample, summed over transformations."""
        mapping = self.mapping
        found = direct_distances(rows.channels_first, mapping.checked(rows), mapping, self.distance, self.over)
        return {"row_distances": found.double().sum(1).flatten(1)}

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {name: a[name] + b[name] for name in ("row_distances", "lit")}

    def prepared(self, context: Context) -> Accumulator:
        """With the transformations and the input size of an evaluation, where none were given."""
        return replace(self, mapping=self.mapping.prepared(context))

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Only feature maps."""
        return self.mapping.applies_to(activation_shape)

    def dead(self, states: States) -> Tensor:
        """Which channels were zero throughout."""
        return states["lit"] == 0


def check_inverses(transformations: TransformationSet) -> None:
    """Raise for transformations without inverses."""
    if not transformations.invertible:
        raise ValueError(
            "Expected argument `transformations` to have inverses for a measure of same-equivariance,"
            f" but {transformations!r} has none."
        )


def direct_distances(
    maps: Tensor, transformations: TransformationSet, mapping: BackMapping, distance: Distance, over: str
) -> Tensor:
    """The distance of A(t(x)) and t(A(x)) for every sample and transformation, (samples, transformations, ...).

    NaN where it is infinite. The mean over the transformations is that over those under which a pixel is seen: where it
    is not, the distance is 0, and it is as much larger where it is.

    Raises:
        ValueError: If no transformation of the set is the identity.
    """
    same = transformations.identity
    if same is None:
        same = _identity_among(transformations, maps, mapping.input_size)
    expected, found = transformations.of_maps(maps[:, same], mapping.input_size), maps
    weight: Tensor | float = 1.0
    if mapping.mask:
        ones = torch.ones(1, 1, *maps.shape[-2:], dtype=torch.float64, device=maps.device)
        inside = 1 - _widened(transformations.of_maps(ones, mapping.input_size)[0] < SEEN, mapping.mask)
        expected, found = expected * inside, found * inside
        if over == "activation":
            weight = (len(inside) / inside.sum(0)).flatten(1)
    if mapping.normalize or distance == "cosine":
        dtype = torch.float64 if distance == "cosine" else maps.dtype
        expected, found = unit_maps(expected.to(dtype))[0], unit_maps(found.to(dtype))[0]
    apart = distance_between(found.flatten(3), expected.flatten(3), distance, over)
    return apart.masked_fill(apart.isinf(), torch.nan) * weight


def _identity_among(transformations: TransformationSet, maps: Tensor, input_size: tuple[int, int] | None) -> int:
    """Which transformation leaves a random feature map as it is, in a set that knows of none."""
    probe = torch.rand(1, *maps.shape[2:], generator=torch.Generator().manual_seed(0)).to(maps.device)
    moved = transformations.of_maps(probe, input_size)[0]
    same = [j for j, image in enumerate(moved) if torch.equal(image, probe[0])]
    if not same:
        raise ValueError(f'Expected the identity among the transformations for "direct", but got {transformations!r}.')
    return same[0]


def seen(maps: Tensor, transformations: TransformationSet, mask: int, input_size: tuple[int, int] | None) -> Tensor:
    """Which pixels of a feature map no transformation of the set moves out of the frame: 1 or 0, (height, width).

    Args:
        maps: any tensor ``(..., height, width)``; its last two axes and type count.
        transformations: the set, with inverses.
        mask: a number larger than 1 also leaves out pixels fewer than so many pixels away.
        input_size: of the network's input, where the maps are of another size.
    """
    ones = torch.ones(1, 1, *maps.shape[-2:], dtype=torch.float64, device=maps.device)
    least = transformations.inverse(transformations.of_maps(ones, input_size), input_size).amin(1)
    return (1 - _widened(least < SEEN, mask))[0, 0].to(maps.dtype)


def _widened(outside: Tensor, mask: int) -> Tensor:
    """1 where pixels are outside the frame, or fewer than ``mask`` pixels away: (..., channels, height, width)."""
    reached = outside.to(torch.float64)
    return max_pool2d(reached, 2 * mask - 1, 1, mask - 1) if mask > 1 else reached
