"""What the measures need of each layer: its accumulators, and influences of samples."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import TypeAlias

import torch
from torchmetrics import Metric

from lightning_invariance.accumulators.base import Accumulator, Context, States, started
from lightning_invariance.accumulators.grouped_pairs import GroupedPairs
from lightning_invariance.accumulators.still import Still
from lightning_invariance.engine.influence import Influence
from lightning_invariance.engine.influence_on_mean import InfluenceOnMean
from lightning_invariance.engine.layer_state import Layer, Tally, distinct
from lightning_invariance.measures import Measure, Sums
from lightning_invariance.measures.base import names_accumulators

#: The layer of a network that returns its input, for :attr:`InvarianceResult.floor`.
INPUT = ""

Needs: TypeAlias = dict[str, tuple[Accumulator, ...]]


class Needed:
    """What the measures of an evaluation need.

    Args:
        measures: name → metric.
        context: what is known before the first row.
        confidence: of intervals; None for none.

    Attributes:
        first: measure → accumulators of the first pass; of a :class:`Measure` only. So is ``again``, of a second one.
        again: see first.

    Raises:
        ValueError: If a measure cannot work with the transformations.
    """

    def __init__(self, measures: Mapping[str, Metric], context: Context, confidence: float | None = None) -> None:
        self._measures = measures
        self._m, self._confidence = len(context.transformations), confidence
        own = {name: measure for name, measure in measures.items() if names_accumulators(measure)}
        self.first: Needs = {name: tuple(a.prepared(context) for a in each.needs) for name, each in own.items()}
        self.again: Needs = {name: tuple(a.prepared(context) for a in each.needs_again) for name, each in own.items()}

    def applies(self, measure: str, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a measure is defined for a layer with activations of this shape."""
        if not names_accumulators(metric := self._measures[measure]):
            return name != INPUT
        fits = all(accumulator.applies_to(shape) for accumulator in self.first[measure])
        return fits and (name != INPUT or metric.has_floor)

    def accumulators_of(self, name: str, shape: tuple[int, ...]) -> Needs:
        """By measure: the accumulators of the first pass for a layer with activations of this shape."""
        return {measure: needs for measure, needs in self.first.items() if self.applies(measure, name, shape)}

    @property
    def with_intervals(self) -> list[str]:
        """The measures for which influences can be found."""
        return [
            key
            for key, accumulators in self.first.items()
            if getattr(self._measures[key], "has_intervals", False)
            and all(a.has_shares or isinstance(a, GroupedPairs) for a in accumulators)
        ]

    def new_layer(
        self,
        name: str,
        shape: tuple[int, ...],
        channel_axis: int,
        device: torch.device,
        order: tuple[int, ...] = (),
    ) -> Layer:
        """A layer before the first row; see :class:`Layer` for the arguments."""
        layer = Layer(shape, channel_axis, order)
        applicable = [measure for measure in self._measures if self.applies(measure, name, shape)]
        accumulators = distinct([a for measure in applicable for a in self.first.get(measure, ())])
        if name != INPUT and accumulators and all(type(a).dead is Accumulator.dead for a in accumulators):
            accumulators.append(Still())
        accumulators.sort(key=lambda accumulator: not accumulator.takes_half)  # before values are widened
        layer.first = [Tally(accumulator, started(accumulator, device)) for accumulator in accumulators]
        for measure in applicable:
            if measure not in self.first:
                metric = deepcopy(self._measures[measure])
                metric.reset()
                layer.metrics[measure] = metric.to(device)
        for key in self.with_intervals if self._confidence is not None and name != INPUT else ():
            own = self._measures[key]
            if key in applicable and isinstance(own, Measure) and own.is_mean_over_samples:
                sums = partial(self.sums, layer, key, second_pass=False)
                layer.influences[key] = InfluenceOnMean(own, self.first[key], sums)
        return layer

    def sums(self, layer: Layer, measure: str, second_pass: bool = True) -> Sums:
        """The states that a measure needs of a layer, with or without those of a second pass."""
        states: States = {}
        n_samples = 0
        for accumulator in (*self.first[measure], *(self.again[measure] if second_pass else ())):
            tally = layer.tally_of(accumulator)
            if tally is not None:  # a second pass is not always needed
                states.update({state: tally.states[state] for state in accumulator.empty()})
                n_samples = tally.n_samples
        return Sums(states, n_samples, self._m, layer.ordered_shape, layer.ordered_channel_axis)

    def begin_second_pass(self, name: str, layer: Layer, n_samples: int, device: torch.device) -> None:
        """Prepare what a layer needs of a second pass, given the sums of the first one.

        Args:
            name: of the layer.
            layer: with the sums of all processes.
            n_samples: number of rows, of which some may not have reached the layer.
            device: where the sums will be.
        """
        for key, accumulators in self.again.items():
            measure = self._measures[key]
            if not accumulators or not self.applies(key, name, layer.shape) or not names_accumulators(measure):
                continue
            sums = self.sums(layer, key, second_pass=False)
            if sums.n_samples and measure.needs_second_pass(sums):
                layer.begin_second_pass(accumulators, measure.second_pass(sums), device)
        if self._confidence is not None and name != INPUT:
            layer.influences = self._new_influences(name, layer, n_samples)

    def _new_influences(self, name: str, layer: Layer, n_samples: int) -> dict[str, Influence | InfluenceOnMean]:
        """By measure: the influences that the first pass over a layer has found, or that a second one can find."""
        found: dict[str, Influence | InfluenceOnMean] = {}
        for key in self.with_intervals:
            measure = self._measures[key]
            if not names_accumulators(measure) or not self.applies(key, name, layer.shape):
                continue
            sums = self.sums(layer, key)
            if "groups" in sums and sums.n_samples < n_samples:  # not all of a group reach the layer
                continue
            if sums.n_samples >= max(2, measure.least_samples) and self._m >= measure.least_transformations:
                of_mean = layer.influences.get(key)
                if isinstance(of_mean, InfluenceOnMean) and of_mean.finish(sums):
                    found[key] = of_mean
                else:
                    found[key] = Influence(measure, self.first[key], sums)
        return found
