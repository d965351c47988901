"""Sums over A(t(x)) and t(A(x)): the maps of a transformed input, and the transformed maps of the input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator, add_to
from lightning_invariance.accumulators.distances import Distance, distance_between, unit_maps, zero_maps
from lightning_invariance.accumulators.mapped_back import BackMapping, constant_channels, identity_of, ones_like_map
from lightning_invariance.accumulators.rows import N_SAMPLES, Context, Rows, States
from lightning_invariance.transforms import TransformationSet


@dataclass(frozen=True)
class DirectPairs(Accumulator):
    """Base of the accumulators of A(t(x)) and t(A(x)).

    Attributes:
        mapping: how maps are transformed; one transformation must be the identity.
    """

    mapping: BackMapping

    channels_first = True
    any_channel_axis = True

    def prepared(self, context: Context) -> Accumulator:
        """Prepare the mapping."""
        return replace(self, mapping=self.mapping.prepared(context))

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Whether activations are feature maps."""
        return self.mapping.applies_to(activation_shape)

    def why_not(self, activation_shape: tuple[int, ...], channel_axis: int) -> str:
        """Why feature maps cannot be mapped."""
        return self.mapping.why_not(activation_shape, channel_axis)

    def pairs(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """A(t(x)) and t(A(x)), and which pixels of each column are inside the mask, ``(m, 1, *positions)``, or None.

        Raises:
            ValueError: If no transformation is the identity.
        """
        transformations, maps, mapping = self.mapping.checked(rows), rows.channels_first, self.mapping

        def made() -> tuple[Tensor, Tensor, Tensor | None]:
            identity = transformations.identity
            if identity is None:
                identity = _identity_among(transformations, maps, mapping.input_size)
            expected = transformations.of_maps(maps[:, identity], mapping.input_size)
            expected = rows.turned(expected, transformations, inverse=False)
            if not mapping.mask:
                return maps, expected, None
            inside = mapping.inside(transformations.of_maps(ones_like_map(maps, maps.device), mapping.input_size)[0])
            return maps * inside, expected * inside, inside

        return rows.once((DirectPairs, self.mapping), made)


@dataclass(frozen=True)
class DirectDistances(DirectPairs):
    """The paper's first formulation: ‖A(t(x)) − t(A(x))‖, summed over samples and transformations.

    ``row_distances`` ``(activations,)`` or ``(channels,)``, and ``lit`` as in :class:`MappedBack`. Each transformation
    has its own mask; a pixel that it leaves out has distance 0, and its distances under the other transformations get a
    larger weight, so that its mean is over the transformations under which it is visible. Infinite distances are NaN.

    Attributes:
        mapping: see :class:`DirectPairs`.
        distance: see :func:`~lightning_invariance.accumulators.distances.distance_between`.
        over: ``"activation"``, or ``"channel"`` to compare feature maps as vectors.
    """

    distance: Distance = "euclidean"
    over: str = "channel"

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"row_distances": torch.zeros(0, dtype=torch.float64), "lit": torch.zeros(0, dtype=torch.long)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the distances of rows."""
        lit = (~zero_maps(rows.channels_first)).sum((0, 1))
        add_to(states, row_distances=self._distances(rows).sum((0, 1)).flatten(), lit=lit)

    def shares(self, rows: Rows, totals: States) -> States:
        """The distances of each sample, summed over transformations."""
        return {"row_distances": self._distances(rows).sum(1).flatten(1)}

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {name: a[name] + b[name] for name in ("row_distances", "lit")}

    def dead(self, states: States) -> Tensor:
        """Which channels were zero everywhere."""
        return states["lit"] == 0

    def _distances(self, rows: Rows) -> Tensor:
        """The weighted distances ``(samples, transformations, ...)`` in float64."""
        found, expected, inside = self.pairs(rows)
        weight: Tensor | float = 1.0
        if inside is not None and self.over == "activation":
            weight = (len(inside) / inside.sum(0)).flatten(1)
        if self.mapping.normalize or self.distance == "cosine":
            dtype = torch.float64 if self.distance == "cosine" else found.dtype
            expected, found = unit_maps(expected.to(dtype))[0], unit_maps(found.to(dtype))[0]
        distances = distance_between(found.flatten(3), expected.flatten(3), self.distance, self.over)
        return (distances.masked_fill(distances.isinf(), torch.nan) * weight).double()


#: As many samples as deviations of a constant from its mean, which are rounding, are summed over at most.
MANY = 10**6

#: The moments of t(A(x)) and A(t(x)) about their means.
COMOMENTS = ("expected_squares", "found_squares", "pair_products")


@dataclass(frozen=True)
class Correlations(DirectPairs):
    r"""Moments of A(t(x)) and t(A(x)) for each transformation and channel, over samples and the pixels of the mask.

    - ``pixels`` ``(m,)`` in float64: the number of pixels of a map inside the mask of each transformation.
    - ``expected_mean``, ``found_mean`` ``(m, channels)``: of t(A(x)) and A(t(x)).
    - ``expected_squares``, ``found_squares``, ``pair_products`` ``(m, channels)``: sums of squares and products of the
      deviations from these means.
    """

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        means = dict.fromkeys(("expected_mean", "found_mean", *COMOMENTS), torch.zeros(0, 0, dtype=torch.float64))
        return {"pixels": torch.zeros(0, dtype=torch.float64), **means}

    def add(self, states: States, rows: Rows) -> None:
        """Add the moments of rows."""
        found, expected, inside = self.pairs(rows)
        n, m, positions = len(found), found.shape[1], found[0, 0, 0].numel()
        pixels = found.new_full((m,), positions, dtype=torch.float64) if inside is None else inside.flatten(1).sum(1)
        sums = [each.flatten(3).sum((0, 3), dtype=torch.float64) for each in (expected, found)]
        means = [each / (n * pixels[:, None]) for each in sums]
        own = {"expected_mean": means[0], "found_mean": means[1], "pixels": pixels}
        own |= {name: each.sum(0) for name, each in self._products(rows, means).items()}
        before = {**states, N_SAMPLES: torch.tensor(rows.before)}
        states.update(self.merge(before, {**own, N_SAMPLES: torch.tensor(n)}) if rows.before else own)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both (Chan, Golub and LeVeque 1983)."""
        share = int(b[N_SAMPLES]) / int(a[N_SAMPLES] + b[N_SAMPLES])
        expected, found = (b[name] - a[name] for name in ("expected_mean", "found_mean"))
        weight = float(a[N_SAMPLES]) * share * a["pixels"][:, None]
        apart = zip(COMOMENTS, (expected.square(), found.square(), expected * found), strict=True)
        return {
            "pixels": a["pixels"],
            "expected_mean": a["expected_mean"] + share * expected,
            "found_mean": a["found_mean"] + share * found,
            **{name: a[name] + b[name] + weight * between for name, between in apart},
        }

    def shares(self, rows: Rows, totals: States) -> States:
        """The products of the deviations of each sample, ``(samples, m, channels)``."""
        return self._products(rows, [totals["expected_mean"], totals["found_mean"]])

    def _products(self, rows: Rows, means: list[Tensor]) -> States:
        """Squares and products of the deviations from means ``(m, channels)``, summed over positions."""
        found, expected, inside = self.pairs(rows)
        parts = []
        for each, mean in zip((expected, found), means, strict=True):
            deviations = each.flatten(3) - mean[..., None]
            parts.append(deviations if inside is None else deviations * inside.flatten(2))
        products = parts[0].square(), parts[1].square(), parts[0] * parts[1]
        return {name: each.sum(3) for name, each in zip(COMOMENTS, products, strict=True)}

    def dead(self, states: States) -> Tensor:
        """Which channels had one value wherever they were looked at."""
        return constant_channels(states["found_mean"], states["found_squares"], MANY * states["pixels"][:, None])


def _identity_among(transformations: TransformationSet, maps: Tensor, input_size: tuple[int, ...] | None) -> int:
    """Find the transformation that leaves a random feature map unchanged, in a set without a declared identity."""
    probe = torch.rand(1, *maps.shape[2:], generator=torch.Generator().manual_seed(0)).to(maps.device)
    moved = transformations.of_maps(probe, input_size)[0]
    unchanged = [j for j, image in enumerate(moved) if torch.equal(image, probe[0])]
    return unchanged[0] if unchanged else identity_of(transformations)
