"""The variances of sets so large that the means of their columns do not fit into memory: a walk in each direction."""

from __future__ import annotations

import gc
from collections.abc import Mapping

from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.functional.variance import aggregate_maps, normalize
from lightning_invariance.loader import STLoader
from lightning_invariance.measures import NormalizedVariance, SampleVariance, TransformationVariance
from lightning_invariance.measures.longrows import LongRows
from lightning_invariance.result import InvarianceResult
from lightning_invariance.run import Run

#: Bytes for each activation beside the means of columns.
VECTORS = 64


def state_bytes(activations: int, itemsize: int, transformations: int, batch_size: int, on_cpu: bool) -> int:
    """Bytes that one walk would hold: means of columns, and whole rows where they are longer than a batch."""
    means = 4 if itemsize <= 4 and on_cpu else 8
    rows = itemsize if transformations > batch_size else 0
    return activations * (transformations * (means + rows) + VECTORS)


def in_two_walks(
    run: Run, measures: Mapping[str, Metric], loader: STLoader, activations: int, budget: int
) -> InvarianceResult:
    """The variance measures, samples first and then some transformations at a time, within a budget of memory.

    Args:
        run: what stays the same.
        measures: name → TransformationVariance, SampleVariance or NormalizedVariance.
        loader: the blocks of all transformations.
        activations: number of activations of all layers together.
        budget: bytes of state.

    Raises:
        ValueError: If there is another measure.
    """
    for name, measure in measures.items():
        if not isinstance(measure, TransformationVariance | SampleVariance | NormalizedVariance):
            raise ValueError(
                f"Expected argument `state_budget` to be larger, but got {budget} bytes: the states of {name} for"
                f" {len(loader.transformations)} transformations do not fit, and only TransformationVariance,"
                " SampleVariance and NormalizedVariance can do with less."
            )
    kinds = {str(measure.squared): bool(measure.squared) for measure in measures.values()}
    of_rows = {kind: LongRows(squared) for kind, squared in kinds.items()}
    rows = run.walk(of_rows, loader, about="Measuring invariance: samples").result()
    totals: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    transformations = loader.transformations
    columns = max(1, (budget // max(1, activations) - VECTORS) // 16)  # means, and squares for standard deviations
    for start in range(0, len(transformations), columns):
        gc.collect()  # a metric refers to itself: the last walk would still be there
        some = transformations[start : start + columns]
        of_columns = {kind: SampleVariance(squared) for kind, squared in kinds.items()}
        about = f"Measuring invariance: transformations {start + 1}–{start + len(some)}"
        found = run.walk(of_columns, run.loader(some), about=about).result()
        for kind in kinds:
            for layer, values in found[kind].items():
                added = values * len(some)
                totals[kind][layer] = totals[kind][layer] + added if layer in totals[kind] else added

    def value(measure: Metric, layer: str) -> Tensor:
        kind = str(measure.squared)
        parts = rows[kind][layer], totals[kind][layer] / len(transformations)
        tv, sv = (aggregate_maps(part, measure.aggregate) for part in parts)  # type: ignore[arg-type]
        if isinstance(measure, NormalizedVariance):
            return normalize(tv, sv)
        return tv if isinstance(measure, TransformationVariance) else sv

    some_kind = next(iter(kinds))
    return InvarianceResult(
        {name: {layer: value(measure, layer) for layer in rows.layers} for name, measure in measures.items()},
        dead={layer: (rows[some_kind][layer] == 0) & (totals[some_kind][layer] == 0) for layer in rows.layers},
        n_samples=rows.n_samples,
        transformations=transformations.labels,
        parameters=transformations.parameters,
        higher_is_better={name: measure.higher_is_better for name, measure in measures.items()},
    )
