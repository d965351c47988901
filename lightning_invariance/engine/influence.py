r"""How much each sample moves the value of each unit and of each layer: the infinitesimal jackknife.

A value :math:`\theta = f(S)` is made of sums :math:`S = \sum_i s_i` over n samples. If sample i weighs a little more,
the value changes by its influence :math:`\psi_i = n \frac{\partial f}{\partial S} (s_i - S / n)`, and its standard
error over samples is :math:`\sqrt{\sum_i \psi_i^2 / (n (n - 1))}`. Autograd gives the derivative, a second pass the
shares :math:`s_i`. Where a measure looks at samples in groups, whole groups take the place of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_invariance.accumulators import (
    Accumulator,
    Deviations,
    DirectDistances,
    GroupedPairs,
    MappedBack,
    Rows,
    States,
    means_of,
)
from lightning_invariance.accumulators.backends import c_kernels, devices
from lightning_invariance.accumulators.base import started
from lightning_invariance.accumulators.grouped_pairs import ADDED, PAIRS, WAITING, Part
from lightning_invariance.engine.response_influence import ResponseInfluence, has_intervals
from lightning_invariance.measures import Measure
from lightning_invariance.measures.sums import Sums
from lightning_invariance.messages import is_of_package

#: The range of mean squares that float32 holds with their digits, and of weights.
SMALLEST, LARGEST = 1e-24, 1e30

#: Float32 means are too coarse where the variance of a column is below this part of the square of a mean.
FAR = 1e-6


class Influence:
    """Collects the influences of the samples on one measure of one layer, in a second pass.

    Args:
        measure: what is measured.
        accumulators: those that it needs.
        sums: what they came to in the first pass.

    Attributes:
        states: ``numbers`` ``(clusters,)``: which sample, or group of samples; ``on_mean`` ``(clusters,)``: its
            influence on the mean over the units with a finite value; ``squares`` and ``fourths`` ``(units,)``: Σ ψ² and
            Σ ψ⁴ of each unit, 0 where its value is not finite; ``response_squares`` and ``response_fourths`` ``(m,)``:
            those of the response, empty where it has no intervals.
        pairs: what forms the groups; None where samples are apart.
        waits: that rows of the second pass are still added.
    """

    waits = True

    def __init__(self, measure: Measure, accumulators: Sequence[Accumulator], sums: Sums) -> None:
        value = measure.value(sums).flatten().double()
        if not is_of_package(measure):
            check_units_apart(measure, accumulators, sums)
        self._measure, self._sums = measure, sums
        self._others = [a for a in accumulators if not isinstance(a, GroupedPairs)]
        self.pairs = next((a for a in accumulators if isinstance(a, GroupedPairs)), None)
        self._mapped = is_mapped(accumulators)
        self._finite = value.isfinite()
        self._all_finite, self._units = bool(self._finite.all()), max(1, int(self._finite.sum()))
        self._weights: States = {}
        self._prepared: tuple[Tensor, ...] | None = None  # for C or Triton; empty where they cannot
        self._of_changes: c_kernels.ChangesOfSamples | None = None  # what they take for the response
        self._response = ResponseInfluence(measure, sums) if has_intervals(measure, sums) else None
        self._group: States = {}  # the shares of the group that is not complete
        self._states_of_pairs: States = {} if self.pairs is None else started(self.pairs, value.device)
        self.states: States = {
            "numbers": torch.zeros(0, dtype=torch.long),
            "on_mean": value.new_zeros(0),
            "squares": torch.zeros_like(value),
            "fourths": torch.zeros_like(value),
            "response_squares": value.new_zeros(0 if self._response is None else sums.n_transformations),
            "response_fourths": value.new_zeros(0 if self._response is None else sums.n_transformations),
        }

    def add(self, rows: Rows) -> None:
        """Add rows of the second pass."""
        if rows.indices is None:
            raise ValueError("Expected argument `indices` for influences, which belong to samples.")
        if self.pairs is None and self._add_by_kernel(rows):
            return
        rows.widen()
        if self.pairs is None:
            n, shares = self._sums.n_samples, self._shares(rows)
            if self._response is not None:
                self._add_response(self._response.of(shares))
            self._add(rows.indices, shares, n, 1 / n)
            return
        row = 0
        for part in self.pairs.parts(rows.indices, {}):
            some = rows.some(torch.arange(row, row + part.rows), rows.before + row)
            row += part.rows
            for name, share in self._shares(some).items():
                total = share.sum(0, keepdim=True)
                self._group[name] = self._group[name] + total if name in self._group else total
            self.pairs.add_(self._states_of_pairs, some)
            if not int(self._states_of_pairs["groups"][WAITING]):
                self._add_group(part)

    def _add_by_kernel(self, rows: Rows) -> bool:
        """Add rows in C or Triton where these can: of variances of single activations, in what float32 holds."""
        kernel = c_kernels if rows.values.is_cpu else devices
        if self._prepared is None:
            self._prepared = self._for_kernel() if kernel.takes(rows.values) else ()
        if not self._prepared or not kernel.takes(rows.values):
            return False
        sums = (self.states["squares"], self.states["fourths"])
        means, weights, counts = self._prepared
        found = kernel.add_influences(rows.values, means, weights, counts, *sums, self._of_changes)
        if found is None:
            return False
        if self._response is not None:
            self._add_response(self._response.of_found(found))
        self._note(rows.indices, found.on_sum)  # type: ignore[arg-type]
        return True

    def _for_kernel(self) -> tuple[Tensor, ...]:
        """The means, weights and counts that C and Triton take; nothing where they cannot."""
        sums, (deviations, *others) = self._sums, self._others
        if others or not isinstance(deviations, Deviations) or not deviations.squared:
            return ()
        rows, columns = sums["row_spread"], sums["column_spread"][0]
        if len(rows) != len(self.states["squares"]) or rows.dtype != torch.float64:
            return ()
        means, values = means_of(sums.states), sums.n_samples * sums.n_transformations
        both = torch.stack([rows, columns]) / values
        held = (both == 0) | ((both > SMALLEST) & (both < LARGEST))
        far = (columns > 0) & (columns < FAR * values * means.abs().amax(0).square())
        if bool(((~held.all(0) | far) & self._finite).any()):
            return ()
        found = derivatives(self._measure, sums, ["row_spread", "column_spread"])
        zeros, n = torch.zeros_like(rows), sums.n_samples
        of_rows, of_columns = found.get("row_spread", zeros), found.get("column_spread", zeros[None])[0]
        weights = torch.stack([n * of_rows, n * of_columns, of_rows * rows + of_columns * columns])
        if bool((weights.abs() > LARGEST).any()):
            return ()
        if self._response is not None and (of_changes := self._response.for_kernel(deviations)) is None:
            return ()
        self._of_changes = None if self._response is None else of_changes
        return means.float(), weights.float(), -self._finite.int()

    def _note(self, numbers: Tensor, on_sum: Tensor) -> None:
        """Keep the influences of clusters on the mean, given those on the sum over units."""
        self.states["numbers"] = torch.cat([self.states["numbers"], numbers.cpu()])
        self.states["on_mean"] = torch.cat([self.states["on_mean"], on_sum.double() / self._units])

    def _add_group(self, part: Part) -> None:
        """Add a group that is complete."""
        groups = self._sums["groups"].tolist()
        distances, pairs = (self._states_of_pairs[name] for name in ("column_distances", "groups"))
        shares = {**self._group, "column_distances": distances[None]}
        of_pairs = int(pairs[PAIRS]) / groups[PAIRS]
        self._group = {}
        self._states_of_pairs["column_distances"], pairs[PAIRS] = torch.zeros_like(distances), 0
        self._add(torch.tensor([part.group]), shares, groups[ADDED], part.size / self._sums.n_samples, of_pairs)

    def _shares(self, rows: Rows) -> States:
        found: States = {}
        for accumulator in self._others:
            found.update(accumulator.shares(rows, self._sums.states))
        return found

    def _add(self, numbers: Tensor, shares: States, n: int, part: float, part_of_pairs: float = 0.0) -> None:
        """Add the influences of clusters.

        Args:
            numbers: ``(clusters,)``.
            shares: ``(clusters, *state shape)`` by name.
            n: how many clusters there are in all.
            part: of the samples that a cluster holds.
            part_of_pairs: of the pairs.
        """
        if not self._weights:
            self._weights = derivatives(self._measure, self._sums, list(shares))
        influence = torch.zeros(1, dtype=self.states["squares"].dtype, device=self.states["squares"].device)
        for name, weight in self._weights.items():
            expected = part_of_pairs if name == "column_distances" else part
            moved = (shares[name] - expected * self._sums[name]).mul_(weight)
            influence = influence + of_units(moved, self._sums, len(self.states["squares"]), self._mapped)
        influence = n * influence
        if not self._all_finite:
            influence = torch.where(self._finite, influence, 0.0)
        squares = influence.square()
        self.states["squares"] += squares.sum(0)
        self.states["fourths"] += squares.square_().sum(0)
        self._note(numbers, influence.sum(1))

    def _add_response(self, influence: Tensor) -> None:
        """Add the influences of samples on the response, ``(samples, m)``."""
        squares = influence.square()
        self.states["response_squares"] += squares.sum(0)
        self.states["response_fourths"] += squares.square().sum(0)

    @staticmethod
    def merged(a: States, b: States) -> States:
        """The states of two processes."""
        added = {name: a[name] + b[name] for name in a if name not in ("numbers", "on_mean")}
        return {**{name: torch.cat([a[name], b[name]]) for name in ("numbers", "on_mean")}, **added}


def derivatives(measure: Measure, sums: Sums, names: Sequence[str]) -> States:
    """How the value of a unit changes with each of its sums; 0 for what is constant, such as 1 for a dead unit.

    Raises:
        ValueError: If units share a sum: the derivative of one could not be told from that of another.
    """
    is_one = math.prod(measure.value_shape(sums)) == 1
    apart = math.prod(sums.activation_shape), sums.n_channels
    for name in names:
        if not sums[name].ndim or not (is_one or sums[name].shape[-1] in apart):
            raise ValueError(
                f"Expected state {name!r} of {type(measure).__name__} to have the activations or channels as its last"
                f" axis, since accumulators tell the shares of samples in it, but its shape is"
                f" {tuple(sums[name].shape)}: leave it out of `shares` if it is the same for all samples."
            )
    leaves = {name: sums[name].detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        value = measure.value(replace(sums, states={**sums.states, **leaves}))
        if not value.requires_grad:  # a layer in which the value is not defined, for example
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad(value.nansum(), list(leaves.values()), allow_unused=True)
    return {name: w.nan_to_num(0, 0, 0) for name, w in zip(names, found, strict=True) if w is not None}


def of_units(influence: Tensor, sums: Sums, units: int, mapped: bool) -> Tensor:
    """Influences by unit, ``(clusters, units)``: those of a feature map together, if it has one value.

    Args:
        influence: by state, ``(clusters, activations)``, or ``(clusters, parts, activations)`` where parts add up.
        sums: of the layer.
        units: how many values the measure has.
        mapped: whether the sums of the layer have the channels first; see :func:`is_mapped`.
    """
    influence = influence.flatten(1, -2).sum(1) if influence.ndim > 2 else influence
    of_states = sums.channels_first() if mapped else sums
    maps = of_states.activation_shape
    if units == 1:
        return influence.sum(1, keepdim=True)
    if influence.shape[1] != units:
        return influence.view(-1, *maps).movedim(1 + of_states.channel_axis, 1).flatten(2).sum(2)
    if of_states.channel_axis != sums.channel_axis and math.prod(maps) == units:
        return influence.view(-1, *maps).movedim(1, 1 + sums.channel_axis).flatten(1)
    return influence


def check_units_apart(measure: Measure, accumulators: Sequence[Accumulator], sums: Sums) -> None:
    """Raise where a unit's value depends on the sums of another, whose influences would be taken for those of its own.

    Asked of measures of users, of one unit: that every measure of the package keeps them apart is tested.
    """
    states = {name: sums[name].detach().clone() for accumulator in accumulators for name in accumulator.empty()}
    activations = math.prod(sums.activation_shape)
    leaves = [s.requires_grad_() for s in states.values() if s.is_floating_point() and s.shape[-1:] == (activations,)]
    with torch.enable_grad():
        value = measure.value(replace(sums, states={**sums.states, **states})).flatten()
        units = value.isfinite().nonzero().flatten().tolist()
        if len(value) < 2 or not units or not leaves or not value.requires_grad:
            return
        found = torch.autograd.grad(value[units[0]], leaves, allow_unused=True)
    for share in found:
        if share is None:
            continue
        of_each = of_units(share.nan_to_num(0, 0, 0).abs()[None], sums, len(value), is_mapped(accumulators))[0]
        if int((of_each != 0).sum()) > 1:
            raise ValueError(
                f"Expected measure {type(measure).__name__}, which has `has_intervals = True`, to compute the value of"
                " each unit from the sums of this unit alone, but the first one also depends on those of others. Their"
                " standard errors would be wrong: write `has_intervals = False`."
            )


def is_mapped(accumulators: Sequence[Accumulator]) -> bool:
    """Whether sums are of maps that were mapped back, which have the channels first."""
    return any(isinstance(a, MappedBack | DirectDistances) for a in accumulators)
