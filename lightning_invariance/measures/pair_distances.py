"""Transformation and sample distance from sums over pairs or, for squared distances, from variances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators import Accumulator, ColumnPairs, Deviations, RowDistances
from lightning_invariance.accumulators.distances import Distance, row_distances
from lightning_invariance.accumulators.grouped_pairs import GroupedPairs, mean_and_error
from lightning_invariance.accumulators.subsample import EMPTY
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.aggregation import aggregate_maps
from lightning_invariance.measures.variance import sample_variance, transformation_variance
from lightning_invariance.messages import check_int

OVER = ("activation", "channel", "layer")
DISTANCES = ("abs", "squared", "euclidean", "cosine")


@dataclass(frozen=True)
class PairDistances:
    """Transformation distance from all pairs in rows, sample distance from some pairs in columns."""

    distance: Distance
    over: str
    samples: int

    def needs(self, rows: bool, columns: bool) -> tuple[Accumulator, ...]:
        """The accumulators for transformation distances (rows) and sample distances (columns)."""
        of_rows: tuple[Accumulator, ...] = (RowDistances(self.distance, self.over),) if rows else ()
        of_columns = ColumnPairs(self.samples, distance=self.distance, over=self.over)
        return (*of_rows, of_columns) if columns else of_rows

    def within_rows(self, sums: Sums) -> Tensor:
        """TD (paper, eqs. 5 and 6); NaN where an activation was infinite, since inf − inf is NaN."""
        mean = sums["row_distances"] / (sums.n_samples * sums.n_transformations**2)
        return torch.where(mean.isinf(), torch.nan, mean)

    def within_columns(self, sums: Sums) -> Tensor:
        """SD (paper, eqs. 5 and 6): the mean over pairs in groups, or over pairs of kept samples, times (n − 1) / n."""
        n = sums.n_samples
        if "groups" in sums:
            mean = self._mean_in_groups(sums)[0]
            return torch.where(mean.isinf(), torch.nan, mean) * ((n - 1) / n)
        flawed = sums["flawed"].any() if self.over == "layer" else sums["flawed"]
        if self.over == "channel":
            flawed = aggregate_maps(sums.shaped(flawed), "max", sums.channel_axis)
        return torch.where(flawed.flatten(), torch.nan, self._mean_of_kept(sums).flatten()) * ((n - 1) / n)

    def error_within_columns(self, sums: Sums) -> Tensor | None:
        """The standard error of SD, for samples drawn at random; None without groups."""
        n = sums.n_samples
        return self._mean_in_groups(sums)[1] * ((n - 1) / n) if "groups" in sums else None

    def _mean_in_groups(self, sums: Sums) -> tuple[Tensor, Tensor]:
        """The mean distance of two samples in a group, and its standard error."""
        groups = GroupedPairs(self.distance, self.over, self.samples, self.samples, sums.n_samples)
        return mean_and_error({**sums.states, **groups.added(sums.states)})

    def _mean_of_kept(self, sums: Sums) -> Tensor:
        keys = sums["keys"]
        kept = sums["kept"].view(*sums["kept"].shape[:2], *(sums.activation_shape or (1,)))
        if self.over == "layer":
            kept = kept.flatten(2)[:, :, None]
        elif self.over == "channel" and sums.channel_axis:
            kept = kept.movedim(2 + sums.channel_axis, 2)
        full = keys != EMPTY
        counts = full.sum(1).tolist()
        if set(counts) == {kept.shape[1]}:
            return self._mean_of_pairs(kept)
        if len(set(counts)) == 1:
            some = kept[full.to(kept.device)]
            return self._mean_of_pairs(some.view(len(full), counts[0], *some.shape[1:]))
        # A layer that does not run for every sample can have columns with different numbers of kept samples.
        parts = [values[places.to(values.device)] for values, places in zip(kept, full, strict=True)]
        means = [self._mean_of_pairs(part[None]) for part in parts if len(part) > 1]
        return torch.stack(means).mean(0) if means else self._mean_of_pairs(kept[:1, :2] * torch.nan)

    def _mean_of_pairs(self, kept: Tensor) -> Tensor:
        """The mean distance of two different samples of ``(columns, samples, *activation_shape)``."""
        columns, samples = kept.shape[:2]
        return row_distances(kept, self.distance, self.over) / (samples * (samples - 1) * columns)


@dataclass(frozen=True)
class SquaredDistances:
    """Squared transformation and sample distance from the variances (paper, eq. 7): exact for all samples."""

    over: str

    def needs(self, rows: bool, columns: bool) -> tuple[Accumulator, ...]:
        """The accumulator of the variances."""
        return (Deviations(),)

    def within_rows(self, sums: Sums) -> Tensor:
        """TD."""
        m = sums.n_transformations
        return self._over(2 * (m - 1) / m * transformation_variance(sums), sums)

    def within_columns(self, sums: Sums) -> Tensor:
        """SD."""
        n = sums.n_samples
        return self._over(2 * (n - 1) / n * sample_variance(sums), sums)

    def error_within_columns(self, sums: Sums) -> Tensor | None:
        """None, since SD is exact."""
        return None

    def _over(self, values: Tensor, sums: Sums) -> Tensor:
        how = {"activation": None, "channel": "sum", "layer": "layer"}[self.over]
        return aggregate_maps(values, how, sums.channel_axis).flatten()


def pair_distances(distance: Distance, over: str, samples: int) -> PairDistances | SquaredDistances:
    """Check the arguments, and choose between pairs and variances."""
    if over not in OVER:
        raise ValueError(f"Expected argument `over` to be one of {OVER}, but got {over!r}.")
    if not callable(distance) and distance not in DISTANCES:
        raise ValueError(f"Expected argument `distance` to be one of {DISTANCES} or a function, but got {distance!r}.")
    if over == "activation" and distance in ("euclidean", "cosine"):
        raise ValueError(
            f'Expected argument `distance` to be "abs", "squared" or a function for `over="activation"`, whose values'
            f" are scalars, but got {distance!r}."
        )
    check_int("samples", samples, 2)
    return SquaredDistances(over) if distance == "squared" else PairDistances(distance, over, samples)
