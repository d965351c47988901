"""What is wrong with an argument, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_invariance.measures import NormalizedVariance
from lightning_invariance.messages import given
from lightning_invariance.transforms import TransformationSet


def named_measures(measures: Sequence[Metric] | Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Name → measure, checked; by default the normalised variance."""
    return named_metrics([NormalizedVariance()] if measures is None else measures, "measures")


def named_metrics(
    measures: Metric | Sequence[Metric] | Mapping[str, Metric] | None, argument: str = "outputs"
) -> dict[str, Metric]:
    """Name → metric, checked."""
    if measures is None:
        return {}
    if isinstance(measures, Metric | type):
        measures = [measures]
    if isinstance(measures, MetricCollection):
        measures = dict(measures.items())
    if not isinstance(measures, Sequence | Mapping):
        raise TypeError(
            f"Expected argument `{argument}` to be a metric, or a list or dict of metrics, but got {given(measures)}."
        )
    pairs = list(measures.items()) if isinstance(measures, Mapping) else [(type(m).__name__, m) for m in measures]
    named: dict[str, Metric] = {}
    for name, measure in pairs:
        if not isinstance(measure, Metric):
            hint = f": call it, as in `{measure.__name__}()`" if isinstance(measure, type) else ""
            raise TypeError(
                f"Expected argument `{argument}` to hold torchmetrics.Metric objects, but got {given(measure)}{hint}."
            )
        if name in named:
            raise ValueError(
                f"Expected argument `{argument}` to hold measures of different names, but got two of {name!r}; give"
                f' them names with a dict: {{"{name}": ..., "other": ...}}.'
            )
        named[name] = measure
    if not named:
        raise ValueError(f"Expected argument `{argument}` to hold at least one measure, but got none.")
    return named


def check_model(model: Any) -> None:
    """Raise for what is no module with values."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected argument `model` to be a torch.nn.Module, but got {type(model).__name__}: call"
            " `evaluate(model, data, transformations)`, in this order."
        )
    if any(tensor.is_meta for tensors in (model.parameters(), model.buffers()) for tensor in tensors):
        raise ValueError(
            "Expected argument `model` to hold values, but some of its parameters are on the meta device: load them, or"
            " materialise it with `model.to_empty(device=...)`."
        )


def check_transformations(transformations: TransformationSet) -> None:
    """Raise for what is no set of at least two transformations."""
    if not isinstance(transformations, TransformationSet):
        hint = (
            f"call it, as in `{transformations.__name__}(16)`"
            if callable(transformations) and hasattr(transformations, "__name__")
            else "write `rotations(16)`, or make one of functions with `TransformationSet.from_callables`"
        )
        raise TypeError(
            f"Expected argument `transformations` to be a TransformationSet, but got {given(transformations)}: {hint}."
        )
    if len(transformations) < 2:
        raise ValueError(
            f"Expected argument `transformations` to hold at least two transformations, but got {transformations!r}."
        )


def check_number(n_samples: int) -> None:
    """Raise for a number of samples of which nothing varies."""
    if n_samples < 2:
        raise ValueError(f"Expected at least two samples, but got {n_samples}: a variance needs two.")
