r"""Influence of each sample on the value of each unit and of each layer: the jackknife.

A value :math:`\theta = f(S)` is made of sums :math:`S = \sum_i s_i` over n samples. If sample i weighs a little more,
the value changes by its influence :math:`\psi_i = n \frac{\partial f}{\partial S} (s_i - S / n)`, and its standard
error over samples is :math:`\sqrt{\sum_i \psi_i^2 / (n (n - 1))}` (infinitesimal jackknife). Autograd gives the
derivative, a second pass the shares :math:`s_i`. Where a measure looks at samples in groups, whole groups take the
place of samples.

Where a value divides by C, the sum of the squared deviations :math:`c_i` from means, leaving sample i out takes
:math:`\frac{n}{n - 1} c_i` from C, and changes the value by :math:`\psi_i / (1 - h_i)` with the leverage
:math:`h_i = \frac{n}{n - 1} \frac{c_i}{C}` (jackknife), up to terms of order :math:`\psi_i / n`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_invariance.accumulators import Rows, States
from lightning_invariance.accumulators.base import started
from lightning_invariance.accumulators.influences import GroupShare, Influenced, InfluenceKernel
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.engine.response_influences import ResponseInfluence, has_intervals
from lightning_invariance.measures import Measure

#: The least part of a denominator that the value without a sample is divided by, so that rounding does not decide it.
LEAST_LEFT = 0.05


class Influence:
    """Collects the influences of the samples on one measure of one layer, in a second pass.

    Args:
        measure: what is measured.
        sums: the sums of its accumulators after the first pass.

    Attributes:
        states: ``numbers`` ``(clusters,)``: which sample, or group of samples; ``on_mean`` ``(clusters,)``: its
            influence on the mean over the units with a finite value; ``squares`` and ``fourths`` ``(units,)``: Σ ψ² and
            Σ ψ⁴ of each unit, 0 where its value is not finite; ``response_squares`` and ``response_fourths`` ``(m,)``:
            the same sums for the response, empty where it has no intervals.
    """

    def __init__(self, measure: Measure, sums: Sums) -> None:
        sums = measure.completed(sums)
        value = measure.value(sums).flatten().double()
        self._measure, self._sums = measure, sums
        self._single = [accumulator for accumulator in measure.needs if not accumulator.in_groups]
        self._grouped = next((accumulator for accumulator in measure.needs if accumulator.in_groups), None)
        self._channels_first = any(accumulator.channels_first for accumulator in measure.needs)
        self._finite = value.isfinite()
        self._all_finite, self._units = bool(self._finite.all()), max(1, int(self._finite.sum()))
        check_units_apart(measure, sums, self._channels_first)
        self._weights: States = {}
        self._response = ResponseInfluence(measure, sums) if has_intervals(measure, sums) else None
        self._kernel = self._new_kernel()
        self._group: States = {}  # shares of the group that is not complete
        self._group_states = {} if self._grouped is None else started(self._grouped, value.device)
        m = 0 if self._response is None else sums.n_transformations
        self.states: States = {
            "numbers": torch.zeros(0, dtype=torch.long),
            "on_mean": value.new_zeros(0),
            "squares": torch.zeros_like(value),
            "fourths": torch.zeros_like(value),
            "response_squares": value.new_zeros(m),
            "response_fourths": value.new_zeros(m),
        }

    def add(self, rows: Rows) -> None:
        """Add rows of the second pass."""
        if rows.indices is None:
            raise ValueError("Expected argument `indices` for influences, which belong to samples.")
        if self._kernel is not None and self._add_by_kernel(self._kernel, rows):
            return
        rows.widen()
        if self._grouped is None:
            n, shares = self._sums.n_samples, self._shares(rows)
            if self._response is not None:
                self._add_response(self._response.of(shares))
            self._add(rows.indices, shares, n, 1 / n)
            return
        row = 0
        for group in self._grouped.groups(rows):
            some = rows.some(torch.arange(row, row + group.rows), rows.before + row)
            row += group.rows
            for name, share in self._shares(some).items():
                total = share.sum(0, keepdim=True)
                self._group[name] = self._group[name] + total if name in self._group else total
            self._grouped.add(self._group_states, some)
            found = self._grouped.share_of_group(self._group_states, self._sums.states)
            if found is not None:
                shares, self._group = {**self._group, **found.shares}, {}
                part = group.size / self._sums.n_samples
                self._add(torch.tensor([group.number]), shares, found.groups, part, found)

    @property
    def group_of(self) -> Callable[[Tensor], Tensor] | None:
        """Gives the number of the group of each sample; None where samples count one by one."""
        return None if self._grouped is None else self._grouped.group_of

    def _new_kernel(self) -> InfluenceKernel | None:
        """The fast way of a measure that needs one accumulator."""
        if self._grouped is not None or len(self._single) != 1:
            return None
        factors = None if self._response is None else self._response.constant_factors()
        about = Influenced(
            self._sums.n_samples,
            self._sums.n_transformations,
            partial(derivatives, self._measure, self._sums),
            self._finite,
            factors,
            self._response is not None,
            self._measure.denominator is not None,
        )
        return self._single[0].influence_kernel(self._sums.states, about)

    def _add_by_kernel(self, kernel: InfluenceKernel, rows: Rows) -> bool:
        """Add rows in the fast way; whether it took them."""
        found = kernel.add(rows, self.states["squares"], self.states["fourths"])
        if found is None or rows.indices is None:
            return False
        if self._response is not None:
            self._add_response(self._response.of_found(found))
        self._note(rows.indices, found.on_sum)
        return True

    def _note(self, numbers: Tensor, on_sum: Tensor) -> None:
        """Keep the influences of clusters on the mean, given the influences on the sum over units."""
        self.states["numbers"] = torch.cat([self.states["numbers"], numbers.cpu()])
        self.states["on_mean"] = torch.cat([self.states["on_mean"], on_sum.double() / self._units])

    def _shares(self, rows: Rows) -> States:
        found: States = {}
        for accumulator in self._single:
            found.update(accumulator.shares(rows, self._sums.states))
        return found

    def _add(self, numbers: Tensor, shares: States, n: int, part: float, group: GroupShare | None = None) -> None:
        """Add the influences of clusters.

        Args:
            numbers: ``(clusters,)``.
            shares: ``(clusters, *state shape)`` by name.
            n: how many clusters there are in all.
            part: of the samples that a cluster holds.
            group: what is known of a group, which may be expected to add another part to its own sums.
        """
        if not self._weights:
            self._weights = derivatives(self._measure, self._sums, list(shares))
        influence = torch.zeros(1, dtype=self.states["squares"].dtype, device=self.states["squares"].device)
        for name, weight in self._weights.items():
            expected = group.expected if group is not None and name in group.shares else part
            moved = (shares[name] - expected * self._sums[name]).mul_(weight)
            influence = influence + of_units(moved, self._sums, len(self.states["squares"]), self._channels_first)
        influence = n * influence
        if (below := self._measure.denominator) is not None:
            units = influence.shape[1]
            parts = (each.flatten(1) for each in (shares[below], self._sums[below][None]))
            taken, whole = (of_units(part, self._sums, units, self._channels_first) for part in parts)
            influence = influence / (1 - n / (n - 1) * taken / whole).nan_to_num(1.0).clamp_min(LEAST_LEFT)
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


def has_influences(measure: Measure, sums: Sums, n_samples: int) -> bool:
    """Whether a layer has enough samples and transformations, and complete groups if the measure looks at groups."""
    in_groups = any(accumulator.in_groups for accumulator in measure.needs)
    enough = sums.n_samples >= max(2, measure.least_samples)
    complete = not in_groups or sums.n_samples == n_samples
    return complete and enough and sums.n_transformations >= measure.least_transformations


def derivatives(measure: Measure, sums: Sums, names: Sequence[str]) -> States:
    """How the value of a unit changes with each of its sums; 0 for what is constant, such as 1 for a dead unit.

    Raises:
        ValueError: If units share a sum: the derivative of one cannot be separated from the derivative of another.
    """
    is_one = math.prod(measure.value_shape(sums)) == 1
    sizes = math.prod(sums.activation_shape), sums.n_channels
    for name in names:
        if not sums[name].ndim or not (is_one or sums[name].shape[-1] in sizes):
            raise ValueError(
                f"Expected state {name!r} of {type(measure).__name__} to have the activations or channels as its last"
                f" axis, since accumulators tell the shares of samples in it, but its shape is"
                f" {tuple(sums[name].shape)}: leave it out of `shares` if all samples share it."
            )
    leaves = {name: sums[name].detach().clone().requires_grad_() for name in names}
    with torch.enable_grad():
        value = measure.value(replace(sums, states={**sums.states, **leaves}))
        if not value.requires_grad:  # a layer in which the value is not defined, for example
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad(value.nansum(), list(leaves.values()), allow_unused=True)
    return {name: w.nan_to_num(0, 0, 0) for name, w in zip(names, found, strict=True) if w is not None}


def of_units(influence: Tensor, sums: Sums, units: int, channels_first: bool) -> Tensor:
    """Influences by unit, ``(clusters, units)``: all of a feature map together, if it has one value.

    Args:
        influence: by state, ``(clusters, activations)``, or ``(clusters, parts, activations)`` where parts add up.
        sums: of the layer.
        units: how many values the measure has.
        channels_first: whether the sums of the layer have the channels first.
    """
    influence = influence.flatten(1, -2).sum(1) if influence.ndim > 2 else influence
    of_states = sums.channels_first() if channels_first else sums
    maps = of_states.activation_shape
    if units == 1:
        return influence.sum(1, keepdim=True)
    if influence.shape[1] != units:
        return influence.view(-1, *maps).movedim(1 + of_states.channel_axis, 1).flatten(2).sum(2)
    if of_states.channel_axis != sums.channel_axis and math.prod(maps) == units:
        return influence.view(-1, *maps).movedim(1, 1 + sums.channel_axis).flatten(1)
    return influence


def check_units_apart(measure: Measure, sums: Sums, channels_first: bool) -> None:
    """Raise where the value of a unit, of which one is looked at, depends on the sums of another unit.

    Influences on the other unit would count as influences on this one.
    """
    states = {name: state.detach().clone() for name, state in sums.states.items()}
    activations = math.prod(sums.activation_shape)
    leaves = [s.requires_grad_() for s in states.values() if s.is_floating_point() and s.shape[-1:] == (activations,)]
    with torch.enable_grad():
        value = measure.value(replace(sums, states=states)).flatten()
        units = value.isfinite().nonzero().flatten().tolist()
        if len(value) < 2 or not units or not leaves or not value.requires_grad:
            return
        found = torch.autograd.grad(value[units[0]], leaves, allow_unused=True)
    for share in found:
        if share is None:
            continue
        of_each = of_units(share.nan_to_num(0, 0, 0).abs()[None], sums, len(value), channels_first)[0]
        if int((of_each != 0).sum()) > 1:
            raise ValueError(
                f"Expected measure {type(measure).__name__}, which has `has_intervals = True`, to compute the value of"
                " each unit from the sums of this unit alone, but the first one also depends on sums of others. Its"
                " standard errors would be wrong: write `has_intervals = False`."
            )
