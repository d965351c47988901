"""The variances of sets so large that the means of their columns do not fit into memory: a walk in each direction."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.accumulators import Deviations, LongRows
from lightning_invariance.data.loader import STLoader
from lightning_invariance.engine.collect import collect, make_result
from lightning_invariance.engine.walk import Session
from lightning_invariance.measures import Measure, SampleVariance, Sums
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.measures.variance import MeasureOfVariances
from lightning_invariance.messages import level_of_user
from lightning_invariance.results.result import InvarianceResult

#: Bytes of each activation beside the means of columns, for variances and for standard deviations.
VECTORS = 64

#: Bytes of each activation and column: a mean in float64 and the new one that takes its place; the squared deviations.
MEAN, SPREAD = 16, 8


class VarianceOfLongRows(Measure):
    """The transformation variance of rows that come in parts.

    Args:
        squared: whether variances or standard deviations are averaged.
        kwargs: additional arguments of ``torchmetrics.Metric``.
    """

    def __init__(self, squared: bool, **kwargs: Any) -> None:
        super().__init__([LongRows(squared)], **kwargs)

    def value(self, sums: Sums) -> Tensor:
        """TV of every activation."""
        return sums["row_variances"] / sums.n_samples


def in_two_walks(
    session: Session, measures: Mapping[str, Metric], loader: STLoader, activations: int, budget: int
) -> InvarianceResult:
    """The variance measures, samples first and then some transformations at a time, within a budget of memory.

    Args:
        session: the model and its data.
        measures: name → TransformationVariance, SampleVariance or NormalizedVariance.
        loader: the blocks of all transformations.
        activations: number of activations of all layers together.
        budget: bytes of state.

    Raises:
        ValueError: If there is another measure, or the budget is too small for one transformation at a time.
    """
    of_variances: dict[str, MeasureOfVariances] = {}
    for name, measure in measures.items():
        if not names_accumulators(measure) or not isinstance(measure, MeasureOfVariances):
            raise ValueError(
                f"Expected argument `state_budget` to be larger, but got {budget} bytes: the states of {name} for"
                f" {len(loader.transformations)} transformations do not fit, and only TransformationVariance,"
                " SampleVariance and NormalizedVariance can do with less."
            )
        of_variances[name] = measure
    needs = [accumulator for measure in of_variances.values() for accumulator in measure.needs]
    if any(isinstance(accumulator, Deviations) and accumulator.response for accumulator in needs):
        warnings.warn("Responses are left out within `state_budget`.", UserWarning, stacklevel=level_of_user())
    kinds = {_key(measure): measure.squared for measure in of_variances.values()}
    least = sum(VECTORS + MEAN + (0 if squared else SPREAD) for squared in kinds.values())
    columns = 1 + (budget // max(1, activations) - least) // (least - VECTORS * len(kinds))
    if columns < 1:
        raise ValueError(
            f"Expected argument `state_budget` to be larger, but got {budget} bytes: {activations} activations take at"
            f" least {activations * least}."
        )
    by_rows = {kind: VarianceOfLongRows(squared) for kind, squared in kinds.items()}
    tv = collect(session.walk(by_rows, loader, about="Measuring invariance: samples"))
    sv = _sample_variances(session, kinds, loader, columns)
    some = next(iter(kinds))
    layers = [*tv[some]]
    return make_result(
        measures,
        loader.transformations,
        {
            name: {
                layer: measure.aggregated(tv[_key(measure)][layer], sv[_key(measure)][layer], tv.channel_axis[layer])
                for layer in layers
            }
            for name, measure in of_variances.items()
        },
        dead={layer: (tv[some][layer] == 0) & (sv[some][layer] == 0) for layer in layers},
        n_samples=tv.n_samples,
        left_out=tv.left_out,
        reached=tv.reached,
        channel_axis=tv.channel_axis,
    )


def _key(measure: MeasureOfVariances) -> str:
    """Measures of one key need the same variances."""
    return "variances" if measure.squared else "standard deviations"


def _sample_variances(
    session: Session, kinds: Mapping[str, bool], loader: STLoader, columns: int
) -> dict[str, dict[str, Tensor]]:
    """Kind → layer → sample variance, from walks over ``columns`` transformations at a time."""
    transformations = loader.transformations
    totals: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for start in range(0, len(transformations), columns):
        some = transformations[start : start + columns]
        by_columns = {kind: SampleVariance(squared) for kind, squared in kinds.items()}
        about = f"Measuring invariance: transformations {start + 1}–{start + len(some)}"
        found = collect(session.walk(by_columns, session.loader(some), about=about))
        for kind in kinds:
            for layer, values in found[kind].items():
                before = totals[kind].get(layer, torch.zeros_like(values))
                totals[kind][layer] = before + values * (len(some) / len(transformations))
    return totals
