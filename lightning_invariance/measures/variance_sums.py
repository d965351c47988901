"""The sums behind all measures of variance: squared deviations within the rows and columns of the ST matrix."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_invariance.functional.variance import aggregate_maps
from lightning_invariance.measures import kernels
from lightning_invariance.measures.base import Measure, States
from lightning_invariance.measures.spread import Sums, add_rows, channel_changes
from lightning_invariance.transforms import TransformationSet

#: How the values of a feature map can be made one.
AGGREGATES = (None, "mean", "max", "sum")

#: The rule of updates that add nothing but squared deviations.
SQUARES_ALONE: frozenset[Hashable] = frozenset([("squared deviations", True)])


class VarianceMeasure(Measure):
    r"""Shared update of the variance measures: squared deviations within the rows and columns of the ST matrix.

    For k activations and m transformations the states are (m + 3) k numbers:

    - ``row_spread`` (k,): the sum over rows of their squared deviations from the row mean,
    - ``column_spread`` (1, k): the sum over columns of their squared deviations from the column mean,
    - ``centres`` (k,) and ``offsets`` (k / width, m, width): the column means; see ``Sums``. On the CPU they are
      float32 if the activations are, except in small layers and in those with columns much further apart than their
      values.

    Where ``squared`` is false, ``row_spread`` is the sum of the rows' standard deviations, and ``column_spread`` (m, k)
    is kept for each column.
    """

    row_spread: Tensor
    column_spread: Tensor
    centres: Tensor
    offsets: Tensor
    changes: Tensor

    #: Whether the measure can tell what each transformation does.
    _responds: ClassVar[bool] = True

    def __init__(
        self, squared: bool = True, aggregate: str | None = None, response: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(squared, bool):
            raise ValueError(f"Expected argument `squared` to be a bool, but got {squared!r}.")
        if aggregate not in AGGREGATES:
            raise ValueError(f"Expected argument `aggregate` to be one of {AGGREGATES}, but got {aggregate!r}.")
        if not isinstance(response, bool) or (response and not (squared and self._responds)):
            raise ValueError(
                "Expected argument `response` to be a bool, true only for TransformationVariance and NormalizedVariance"
                f" with `squared=True`, but got {response!r}."
            )
        self.squared, self.aggregate, self._with_response = squared, aggregate, response
        self._identity: int | None = None
        self._adder: kernels.Adder | None = None
        vector, matrix, parts = (torch.zeros(*[0] * axes, dtype=torch.float64) for axes in (1, 2, 3))
        self._add_states(row_spread=vector, column_spread=matrix, centres=vector, offsets=parts)
        if response:
            self._add_states(changes=matrix)

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """The family shares its states; those of standard deviations are others."""
        shared: list[Hashable] = [("squared deviations", self.squared)]
        return frozenset([*shared, "response"] if self._with_response else shared)

    def prepare(
        self, transformations: TransformationSet, input_shape: Sequence[int], n_samples: int | None = None
    ) -> None:
        """Learn which transformation changes nothing."""
        self._identity = transformations.identity

    def dead(self) -> Tensor | None:
        """Which activations never changed, over all samples and transformations: bool of ``activation_shape``."""
        return self._shaped((self.row_spread == 0) & (self.column_spread == 0).all(0))

    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        sums = self._sums() if self.centres.numel() else Sums.before(x, self.squared)
        self._set_sums(add_rows(x, sums, int(self.n_samples), self.in_place))
        if self._with_response:
            changes = channel_changes(x, math.prod(self.activation_shape.tolist()[:1]), self._identity)
            self.changes = self.changes + changes if self.changes.numel() else changes

    def add(self, st_block: Tensor, **of_rows: Any) -> None:
        """Add rows as ``update`` does; with no more ado where they are like those before."""
        adder = self._adder
        if adder is None or not adder.fits(st_block, self.n_samples, self.offsets):
            super().add(st_block, **of_rows)
            fast = self.update_rule == SQUARES_ALONE and kernels.adds(st_block, *self._sums())
            self._adder = kernels.Adder(st_block, self.n_samples, *self._sums()) if fast else None
            return
        if adder(st_block):
            self._set_sums(self._sums().widened())
        self._update_count += 1

    def _sums(self) -> Sums:
        return Sums(self.row_spread, self.column_spread, self.centres, self.offsets)

    def _set_sums(self, sums: Sums) -> None:
        self.row_spread, self.column_spread, self.centres, self.offsets = sums

    def _merge(self, a: States, b: States) -> States:
        mine, other = (Sums(*(states[name] for name in Sums._fields)) for states in (a, b))
        joined = mine.merged(a["n_samples"], other, b["n_samples"]) if mine.centres.numel() else mine
        response = {"changes": a["changes"] + b["changes"]} if self._with_response else {}
        return {**joined._asdict(), **response}

    def _transformation_variance(self) -> Tensor:
        m = self.n_transformations
        mean = self.row_spread / self.n_samples
        return self._shaped(mean / (m - 1) if self.squared else mean)

    def _sample_variance(self) -> Tensor:
        variance = self.column_spread.clamp_min(0) / (self.n_samples - 1)
        if self.squared:
            return self._shaped(variance[0] / self.n_transformations)
        return self._shaped(variance.sqrt().mean(0))

    def _changes(self) -> Tensor | None:
        """Half the mean squared change from the identity, or the mean squared deviation: (m, channels)."""
        if not self._with_response or not self.changes.numel():
            return None
        size, m = math.prod(self.activation_shape.tolist()[1:]), self.n_transformations
        spread: Tensor = self.changes / (self.n_samples * size)
        return spread / 2 if self._identity is not None else spread * m / (m - 1)

    def _aggregated(self, values: Tensor) -> Tensor:
        return aggregate_maps(values, self.aggregate)

    def _undefined(self) -> Tensor:
        return torch.full(self.activation_shape.tolist(), torch.nan, dtype=torch.float64, device=self.device)
