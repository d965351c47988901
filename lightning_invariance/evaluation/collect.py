"""From the sums of every layer to a result."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.evaluation.registry import INPUT, Registry
from lightning_invariance.evaluation.tallies import Layer
from lightning_invariance.measures import Measure
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.measures.sums import Sums, dead_of
from lightning_invariance.result import InvarianceResult
from lightning_invariance.table import LayerStatistics
from lightning_invariance.transforms import TransformationSet

Values = dict[str, dict[str, Tensor]]


def collect(registry: Registry) -> InvarianceResult:
    """Compute every measure of every layer, and free the sums of each layer as soon as it is done."""
    values: Values = {name: {} for name in registry.measures}
    response: dict[str, dict[str, list[float]]] = {}
    errors: Values = {}
    dead: dict[str, Tensor] = {}
    skipped: dict[str, list[str]] = {name: [] for name in registry.measures}
    floor: dict[str, Tensor] = {}
    channel_axis = {name: layer.channel_axis for name, layer in registry.layers.items()}
    reached = {name: tally.n_samples for name, layer in registry.layers.items() for tally in layer.first}
    for name, layer in registry.layers.items():
        for key, metric in registry.measures.items():
            if not registry.applies(key, name, layer.shape):
                skipped[key] += [name] if name != INPUT else []
                continue
            value = _value(registry, key, layer)
            if name == INPUT:
                floor[key] = value
                continue
            values[key][name] = value
            if names_accumulators(metric):
                sums = registry.sums(layer, key)
                if (parts := metric.response_of(sums)) is not None:
                    response.setdefault(key, {})[name] = parts.tolist()
                if sums.n_samples and (error := metric.standard_error(sums)) is not None:
                    errors.setdefault(key, {})[name] = error.reshape(value.shape).to("cpu", torch.float64)
        for tally in layer.first if name != INPUT else ():
            counted = Sums(
                tally.states, tally.n_samples, len(registry.transformations), layer.shape, layer.channel_axis
            )
            if name not in dead and (found := dead_of([tally.accumulator], counted)) is not None:
                dead[name] = found.cpu()
        layer.first, layer.second, layer.metrics = [], [], {}
    values = {key: _over_layers(registry, key, of_layers) for key, of_layers in values.items()}
    return make_result(
        registry.measures,
        registry.transformations,
        values,
        dead=dead,
        n_samples=registry.n_samples,
        floor=floor,
        response=response,
        standard_errors=errors,
        skipped=skipped,
        left_out=registry.left_out,
        channel_axis={name: axis for name, axis in channel_axis.items() if name != INPUT},
        reached={name: n for name, n in reached.items() if 0 < n < registry.n_samples},
    )


def make_result(
    measures: Mapping[str, Metric],
    transformations: TransformationSet,
    values: Values,
    **found: Any,
) -> InvarianceResult:
    """A result with what measures and transformations say of themselves.

    Args:
        measures: name → metric.
        transformations: the columns.
        values: measure → layer → value.
        found: other arguments of :class:`InvarianceResult`.
    """
    return InvarianceResult(
        values,
        transformations=transformations.labels,
        parameters=transformations.parameters,
        higher_is_better={name: measure.higher_is_better for name, measure in measures.items()},
        ratios={name: isinstance(measure, Measure) and measure.is_ratio for name, measure in measures.items()},
        units={name: measure.unit if isinstance(measure, Measure) else "" for name, measure in measures.items()},
        **found,
    )


class Convergence:
    """The means of the layers after some of the samples, for measures of this package that need one pass.

    Args:
        measures: name → metric.
    """

    def __init__(self, measures: Mapping[str, Metric]) -> None:
        self._measures = [name for name, m in measures.items() if not (names_accumulators(m) and m.needs_again)]
        self._means: dict[int, dict[str, dict[str, float]]] = {}

    def note(self, registry: Registry) -> None:
        """Compute what there is so far; the sums stay as they are."""
        layers = {name: layer for name, layer in registry.layers.items() if name != INPUT}
        self._means[registry.n_samples] = {}
        for key in self._measures:
            measured = [name for name, layer in layers.items() if registry.applies(key, name, layer.shape)]
            values = _over_layers(registry, key, {name: _value(registry, key, layers[name]) for name in measured})
            self._means[registry.n_samples][key] = {
                name: LayerStatistics.of(name, value, None).mean for name, value in values.items()
            }

    def of(self, result: InvarianceResult) -> dict[str, dict[str, dict[int, float]]]:
        """Measure → layer → number of samples → mean of the layer, the whole result the last."""
        means = {**self._means, result.n_samples: {key: result.per_layer(key) for key in self._measures}}
        # Layers that every milestone has seen: some are reached, or left out, only later.
        known = {
            key: [name for name in result[key] if all(name in of[key] for of in means.values())]
            for key in self._measures
        }
        return {key: {name: {n: means[n][key][name] for n in means} for name in names} for key, names in known.items()}


def _value(registry: Registry, measure: str, layer: Layer) -> Tensor:
    """What a measure is of a layer, given the sums so far: float64, on the CPU."""
    metric = registry.measures[measure]
    if names_accumulators(metric):
        value = metric.evaluated(registry.sums(layer, measure), metric.of_layer)
        return value.detach().to("cpu", torch.float64)
    # torchmetrics keeps a computed value, and turns one of shape (1,) into a scalar.
    own = deepcopy(layer.metrics[measure])
    value = torch.as_tensor(own.compute()).detach().to("cpu", torch.float64)
    if value.numel() == torch.Size(layer.shape).numel():
        return value.reshape(layer.shape)
    return value


def _over_layers(registry: Registry, measure: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of all layers, where a measure looks at them together."""
    metric = registry.measures[measure]
    return dict(metric.of_network(values)) if names_accumulators(metric) else values
