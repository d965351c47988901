"""Compute the values of every measure from the sums of every layer, and make a result of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_invariance.accumulators.layer_state import LayerState
from lightning_invariance.accumulators.rows import States
from lightning_invariance.engine.registry import INPUT, Registry
from lightning_invariance.engine.sample_influences import Influence
from lightning_invariance.measures import Measure
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.messages import number_of, some
from lightning_invariance.results.intervals import MIN_DEGREES_OF_FREEDOM, degrees_of_freedom, t_quantiles
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.transforms import TransformationSet


@dataclass
class LayerRecord:
    """Values and intervals of one layer.

    Attributes:
        values: measure → value in float64. So are the others, where a measure has them.
        details: what else the measure finds, by name.
        refused: why the layer is left out.
        responses: what each transformation does to the layer.
        response_bounds: lower and upper bounds of the response.
        standard_errors: of each value; NaN where the value is not finite.
        freedom: degrees of freedom of the standard errors.
        influences: of each sample, or group, on the mean of the layer; NaN for samples that did not reach it.
        sparse: share of the units whose values few samples decide, or none.
        dead: which activations never changed; None where no accumulator tells.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    responses: dict[str, list[float]] = field(default_factory=dict)
    response_bounds: dict[str, list[list[float]]] = field(default_factory=dict)
    standard_errors: dict[str, Tensor] = field(default_factory=dict)
    freedom: dict[str, Tensor] = field(default_factory=dict)
    influences: dict[str, Tensor] = field(default_factory=dict)
    sparse: dict[str, float] = field(default_factory=dict)
    dead: Tensor | None = None


def collect(registry: Registry) -> InvarianceResult:
    """Compute every measure of every layer, and free the sums of each layer as soon as it is done."""
    channel_axis = {name: layer.channel_axis for name, layer in registry.layers.items() if name != INPUT}
    reached = {name: layer.n_samples for name, layer in registry.layers.items() if name != INPUT}
    samples = SampleKeys(registry)
    records = {name: _record_of(registry, name, registry.layers.pop(name), samples) for name in [*registry.layers]}
    floor = records.pop(INPUT, LayerRecord()).values
    for key in registry.measures:
        if refused := [f"{name} ({r.refused[key]})" for name, r in records.items() if key in r.refused]:
            rank_zero_warn(f"{key} leaves out {number_of(len(refused), 'layer')}: {some(refused)}.", UserWarning)
    values = {
        key: {n: record.values[key] for n, record in records.items() if key in record.values}
        for key in registry.measures
    }
    for key, measure in registry.measures.items():
        if names_accumulators(measure):  # which may look at all layers together
            values[key] = dict(measure.of_network(values[key]))
    return make_result(
        registry.measures,
        registry.transformations,
        values,
        dead={name: record.dead for name, record in records.items() if record.dead is not None},
        n_samples=registry.n_samples,
        n_skipped=registry.n_skipped,
        input_layer=registry.input_layer if registry.input_layer in records else "",
        floor=floor,
        details=_by_measure(records, "details"),
        response=_by_measure(records, "responses"),
        response_bounds=_by_measure(records, "response_bounds"),
        standard_errors=_by_measure(records, "standard_errors"),
        freedom=_by_measure(records, "freedom"),
        influences=_by_measure(records, "influences"),
        sample_keys=samples.of_measures,
        sparse=_by_measure(records, "sparse"),
        confidence=registry.confidence,
        skipped={key: [n for n in records if key not in records[n].values] for key in registry.measures},
        left_out=registry.left_out,
        channel_axis=channel_axis,
        reached={name: n for name, n in reached.items() if 0 < n < registry.n_samples},
    )


def _by_measure(records: Mapping[str, LayerRecord], attribute: str) -> dict[str, dict[str, Any]]:
    """Measure → layer → what the records hold under an attribute."""
    found: dict[str, dict[str, Any]] = {}
    for layer, record in records.items():
        for measure, value in getattr(record, attribute).items():
            found.setdefault(measure, {})[layer] = value
    return found


def _record_of(registry: Registry, name: str, layer: LayerState, samples: SampleKeys) -> LayerRecord:
    """Compute every measure of a layer."""
    record = LayerRecord(dead=layer.dead(), refused=registry.refused(layer.shape, layer.channel_axis))
    for key, measure in registry.applicable(name, layer.shape, layer.channel_axis).items():
        if not names_accumulators(measure):
            record.values[key] = _value_of_metric(registry.metrics[name][key], layer.shape)
            continue
        sums = layer.sums((*measure.needs, *measure.needs_again))
        if sums.n_samples >= measure.least_samples:
            sums = measure.completed(sums)
        by_activation, value = measure.is_by_activation(sums), measure.evaluated(sums, measure.of_layer).detach()
        value = layer.in_shape(value.to("cpu", torch.float64), by_activation)
        record.values[key] = value
        if sums.n_samples and (details := measure.details(sums)):
            found = {each: value.detach().cpu() for each, value in details.items()}
            if "by_class" in found:
                found["by_class"] = layer.in_shape(found["by_class"].double(), by_activation)
            record.details[key] = found
        if (response := measure.response_of(sums)) is not None:
            record.responses[key] = response.tolist()
        if sums.n_samples and (error := measure.standard_error(sums)) is not None:
            error = error.reshape(measure.value_shape(sums)).to("cpu", torch.float64)
            record.standard_errors[key] = layer.in_shape(error, by_activation)
        if (influence := registry.influences.get(name, {}).get(key)) is not None:
            shape = measure.value_shape(sums)
            squares, fourths = (influence.states[s].cpu().reshape(shape) for s in ("squares", "fourths"))
            moments = layer.in_shape(squares, by_activation), layer.in_shape(fourths, by_activation)
            _add_intervals(record, key, influence.states, moments, registry.confidence)
            record.influences[key] = samples.in_order(key, influence)
    registry.metrics.pop(name, None)
    registry.influences.pop(name, None)
    return record


def _value_of_metric(metric: Metric, shape: tuple[int, ...]) -> Tensor:
    """The value of a metric that is no measure, in the shape of the activation if it has as many values."""
    # torchmetrics keeps a computed value, and turns one of shape (1,) into a scalar.
    value = torch.as_tensor(metric.compute()).detach().to("cpu", torch.float64)
    return value.reshape(shape) if value.numel() == torch.Size(shape).numel() else value


def _add_intervals(
    record: LayerRecord, key: str, states: States, moments: tuple[Tensor, Tensor], confidence: float | None
) -> None:
    """Add the standard errors and bounds that follow from the influences of samples on a measure.

    Args:
        record: of the layer.
        key: of the measure.
        states: of its influences.
        moments: Σ ψ² and Σ ψ⁴ in the shape of the value.
        confidence: of the intervals.
    """
    value, n, (squares, fourths) = record.values[key], len(states["numbers"]), moments
    error = torch.where(value.isfinite(), (squares.double() / (n * (n - 1))).sqrt(), torch.nan)
    freedom = degrees_of_freedom(n, squares, fourths).float()
    never = (squares == 0) & (value != 0)  # such as 1 for units that never fired
    few = ((freedom < MIN_DEGREES_OF_FREEDOM) | never)[value.isfinite()]
    record.standard_errors[key] = error
    record.freedom[key] = freedom
    record.sparse[key] = float(few.double().mean()) if few.numel() else 0.0
    squares, fourths = (states[f"response_{state}"].cpu().double() for state in ("squares", "fourths"))
    if key in record.responses and len(squares) and confidence is not None:
        quantiles = t_quantiles(confidence, degrees_of_freedom(n, squares, fourths))
        half = quantiles * (squares / (n * (n - 1))).sqrt()
        middle = torch.tensor(record.responses[key], dtype=torch.float64)
        record.response_bounds[key] = [(middle - half).tolist(), (middle + half).tolist()]


class SampleKeys:
    """The samples, or groups of samples, of an evaluation in the order of their numbers.

    Args:
        registry: of the walk.

    Attributes:
        of_measures: measure → a number of 64 bits for each sample, or group of samples, by what they hold.
    """

    def __init__(self, registry: Registry) -> None:
        self.of_measures: dict[str, Tensor] = {}
        self._numbers = torch.tensor(sorted(registry.sample_keys), dtype=torch.long)
        self._keys = torch.tensor([registry.sample_keys[i] for i in self._numbers.tolist()], dtype=torch.long)

    def in_order(self, measure: str, influence: Influence) -> Tensor:
        """The influences on the mean of a layer, one for each sample or group; NaN for those that did not reach it."""
        numbers, keys = self._numbers, self._keys
        if influence.group_of is not None:
            numbers, group = torch.unique(influence.group_of(numbers), return_inverse=True)
            keys = torch.zeros_like(numbers).index_add_(0, group, keys)
        own, found = (influence.states[state].cpu() for state in ("numbers", "on_mean"))
        on_mean = torch.full((len(numbers),), torch.nan, dtype=torch.float64)
        # The mean is 0 but for the rounding of the sums, and for the bias of a quotient.
        on_mean[torch.searchsorted(numbers, own)] = found - found.mean()
        self.of_measures[measure] = keys
        return on_mean


def make_result(
    measures: Mapping[str, Metric],
    transformations: TransformationSet,
    values: Mapping[str, Mapping[str, Tensor]],
    **found: Any,
) -> InvarianceResult:
    """Make a result, with the properties of measures and transformations.

    Args:
        measures: name → metric.
        transformations: the columns.
        values: measure → layer → value.
        found: other arguments of :class:`InvarianceResult`.
    """
    return InvarianceResult(
        values,
        transformations=transformations.labels,
        identity="" if transformations.identity is None else transformations.labels[transformations.identity],
        parameters=transformations.parameters,
        higher_is_better={name: measure.higher_is_better for name, measure in measures.items()},
        ratios={name: isinstance(measure, Measure) and measure.is_ratio for name, measure in measures.items()},
        biases={name: measure.relative_bias for name, measure in measures.items() if isinstance(measure, Measure)},
        units={name: measure.unit if isinstance(measure, Measure) else "" for name, measure in measures.items()},
        **found,
    )
