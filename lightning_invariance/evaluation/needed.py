"""Which accumulators the measures need, and for which layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torchmetrics import Metric

from lightning_invariance.accumulators.base import Accumulator, Context
from lightning_invariance.accumulators.grouped_pairs import GroupedPairs
from lightning_invariance.measures.base import names_accumulators

#: The layer of a network that returns its input, for :attr:`InvarianceResult.floor`.
INPUT = ""

Needs: TypeAlias = dict[str, tuple[Accumulator, ...]]


class Needed:
    """What the measures of an evaluation need.

    Args:
        measures: name → metric.
        context: what is known before the first row.

    Attributes:
        first: measure → accumulators of the first pass; of a :class:`Measure` only. So is ``again``, of a second one.
        again: see first.

    Raises:
        ValueError: If a measure cannot work with the transformations.
    """

    def __init__(self, measures: Mapping[str, Metric], context: Context) -> None:
        self._measures = measures
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
