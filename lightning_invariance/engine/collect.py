"""From the sums of every layer to a result."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.distributed import groups_of
from lightning_invariance.engine.layer_state import Layer
from lightning_invariance.engine.needed import INPUT
from lightning_invariance.engine.registry import Registry
from lightning_invariance.measures import Measure
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.measures.sums import Sums, dead_of
from lightning_invariance.results.intervals import FEWEST_DEGREES, degrees_of_freedom
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.results.students_t import t_quantiles
from lightning_invariance.results.table import LayerStatistics
from lightning_invariance.transforms import TransformationSet

Values = dict[str, dict[str, Tensor]]


def collect(registry: Registry) -> InvarianceResult:
    """Compute every measure of every layer, and free the sums of each layer as soon as it is done."""
    values: Values = {name: {} for name in registry.measures}
    response: dict[str, dict[str, list[float]]] = {}
    errors: Values = {}
    found_influences = Influences(registry)
    dead: dict[str, Tensor] = {}
    skipped: dict[str, list[str]] = {name: [] for name in registry.measures}
    floor: dict[str, Tensor] = {}
    channel_axis = {name: layer.channel_axis for name, layer in registry.layers.items()}
    reached = {name: tally.n_samples for name, layer in registry.layers.items() for tally in layer.first}
    for name, layer in registry.layers.items():
        for key, metric in registry.measures.items():
            if not registry.needs.applies(key, name, layer.shape):
                skipped[key] += [name] if name != INPUT else []
                continue
            value = _value(registry, key, layer)
            if name == INPUT:
                floor[key] = value
                continue
            values[key][name] = value
            if names_accumulators(metric):
                sums = registry.needs.sums(layer, key)
                if (parts := metric.response_of(sums)) is not None:
                    response.setdefault(key, {})[name] = parts.tolist()
                if sums.n_samples and (error := metric.standard_error(sums)) is not None:
                    error = layer.in_shape(error.flatten()).reshape(value.shape)
                    errors.setdefault(key, {})[name] = error.to("cpu", torch.float64)
        if name != INPUT and (found := _dead(layer, len(registry.transformations))) is not None:
            dead[name] = found
        for key in layer.influences:
            found_influences.add(key, name, layer, values[key][name], response.get(key, {}).get(name))
        layer.first, layer.second, layer.metrics, layer.influences = [], [], {}, {}
    values = {key: _over_layers(registry, key, of_layers) for key, of_layers in values.items()}
    return make_result(
        registry.measures,
        registry.transformations,
        values,
        dead=dead,
        n_samples=registry.n_samples,
        floor=floor,
        response=response,
        response_bounds=found_influences.response_bounds,
        standard_errors={**errors, **found_influences.standard_errors},
        freedom=found_influences.freedom,
        influences=found_influences.on_means,
        sample_keys=found_influences.sample_keys,
        sparse=found_influences.sparse,
        confidence=registry.confidence,
        skipped=skipped,
        left_out=registry.left_out,
        channel_axis={name: axis for name, axis in channel_axis.items() if name != INPUT},
        reached={name: n for name, n in reached.items() if 0 < n < registry.n_samples},
    )


def _dead(layer: Layer, m: int) -> Tensor | None:
    """Which activations of a layer never changed; None where no accumulator tells."""
    for tally in layer.first:
        counted = Sums(tally.states, tally.n_samples, m, layer.ordered_shape, layer.ordered_channel_axis)
        if (found := dead_of([tally.accumulator], counted)) is not None:
            return layer.in_shape(found).cpu()
    return None


class Influences:
    """What the influences of samples come to, for a result.

    Args:
        registry: of the walk.

    Attributes:
        standard_errors: measure → layer → standard error of each unit; NaN where the value is not finite.
        freedom: measure → layer → degrees of freedom of it.
        on_means: measure → layer → influence of each sample, or group, on the mean; NaN where it did not reach it.
        sample_keys: measure → digest of each sample, or group of samples.
        sparse: measure → layer → share of the units that few samples decide, or none.
        response_bounds: measure → layer → lower and upper bounds of the response.
    """

    def __init__(self, registry: Registry) -> None:
        self.standard_errors: Values = {}
        self.freedom: Values = {}
        self.on_means: Values = {}
        self.sample_keys: dict[str, Tensor] = {}
        self.sparse: dict[str, dict[str, float]] = {}
        self.response_bounds: dict[str, dict[str, list[list[float]]]] = {}
        self._confidence = registry.confidence
        self._numbers = torch.tensor(sorted(registry.sample_keys), dtype=torch.long)
        self._keys = torch.tensor([registry.sample_keys[i] for i in self._numbers.tolist()], dtype=torch.long)

    def add(self, measure: str, name: str, layer: Layer, value: Tensor, response: list[float] | None) -> None:
        """Add those on a measure of a layer of this name, with this value and response."""
        influence = layer.influences[measure]
        own, found = (influence.states[state].cpu() for state in ("numbers", "on_mean"))
        squares, fourths = (layer.in_shape(influence.states[state].cpu()) for state in ("squares", "fourths"))
        n = len(own)
        numbers, keys = self._numbers, self._keys
        if (pairs := influence.pairs) is not None:
            of_samples, _ = groups_of(numbers, pairs.expected, pairs.run, pairs.samples)
            numbers, group = torch.unique(of_samples, return_inverse=True)
            keys = torch.zeros_like(numbers).index_add_(0, group, keys)
        on_mean = torch.full((len(numbers),), torch.nan, dtype=torch.float64)
        on_mean[torch.searchsorted(numbers, own)] = found - found.mean()  # which is 0 but for the rounding of the sums
        error = torch.where(value.flatten().isfinite(), (squares.double() / (n * (n - 1))).sqrt(), torch.nan)
        self.standard_errors.setdefault(measure, {})[name] = error.view(value.shape)
        freedom = degrees_of_freedom(n, squares, fourths).float().view(value.shape)
        never = (squares == 0).view(value.shape) & (value != 0)  # such as 1 for units that never fired
        few = ((freedom < FEWEST_DEGREES) | never)[value.isfinite()]
        self.sparse.setdefault(measure, {})[name] = float(few.double().mean()) if few.numel() else 0.0
        self.freedom.setdefault(measure, {})[name] = freedom
        self.on_means.setdefault(measure, {})[name] = on_mean
        self.sample_keys[measure] = keys
        squares, fourths = (influence.states[f"response_{state}"].cpu().double() for state in ("squares", "fourths"))
        if response is not None and len(squares) and self._confidence is not None:
            quantiles = t_quantiles(self._confidence, degrees_of_freedom(n, squares, fourths))
            half, middle = quantiles * (squares / (n * (n - 1))).sqrt(), torch.tensor(response, dtype=torch.float64)
            bounds = [(middle - half).tolist(), (middle + half).tolist()]
            self.response_bounds.setdefault(measure, {})[name] = bounds


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
        biases={name: measure.relative_bias for name, measure in measures.items() if isinstance(measure, Measure)},
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
            measured = [name for name, layer in layers.items() if registry.needs.applies(key, name, layer.shape)]
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
        value = metric.evaluated(registry.needs.sums(layer, measure), metric.of_layer)
        return layer.in_shape(value.detach().to("cpu", torch.float64))
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
