"""Values of measures by layer: their statistics, and the confidence intervals of their means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.aggregation import aggregate_maps
from lightning_invariance.messages import instead_of
from lightning_invariance.results.intervals import (
    Intervals,
    check_confidence,
    interval_of,
    network_influences,
    samples_for,
    t_quantiles,
)
from lightning_invariance.results.record import Record
from lightning_invariance.results.table import LayerStatistics, Table


class _ByLayer(dict[str, Tensor]):
    """Layer → values; a missing layer is a KeyError that names similar ones."""

    def __missing__(self, layer: str) -> Tensor:
        raise KeyError(f"No layer {layer!r} in this result. {instead_of(str(layer), self)}")


class LayerValues(Mapping[str, Mapping[str, Tensor]], Record):
    """Values of measures for every layer, with all computations on them; see :class:`InvarianceResult`."""

    def __init__(
        self, values: Mapping[str, Mapping[str, Tensor]], *, dead: Mapping[str, Tensor] | None = None, **about: Any
    ) -> None:
        if "ratios" not in about:  # made by hand
            about["ratios"] = {measure: measure.startswith("Normalized") for measure in values}
        Record.__init__(self, **about)
        self._values = {measure: _ByLayer(layers) for measure, layers in values.items()}
        self.dead = dict(dead or {})
        self._tables = {
            measure: Table(
                LayerStatistics.of(layer, v, self._dead_of(layer, v), self.reached.get(layer, self.n_samples))
                for layer, v in layers.items()
            )
            for measure, layers in self._values.items()
        }
        for measure, classes in self.detail("by_class").items():
            rows = self._tables[measure]
            self._tables[measure] = Table(replace(row, by_class=_means_of(classes[row.layer])) for row in rows)
        self.set_layer_types(self.layer_types)
        for measure in self.influences if self.confidence is not None else ():
            self._tables[measure] = self._tables[measure].with_intervals(self.interval(measure))

    def __getitem__(self, measure: str) -> Mapping[str, Tensor]:
        if measure not in self._values:
            first = next(iter(self._values), "")
            hint = f" Write `result[{first!r}][{measure!r}]`." if measure in self._values.get(first, {}) else ""
            raise KeyError(f"No measure {measure!r} in this result; it has {', '.join(self._values)}.{hint}")
        return self._values[measure]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    # A mapping of tensors cannot be compared by value: `tensor == tensor` is a tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def set_layer_types(self, types: Mapping[str, str]) -> None:
        """Set :attr:`layer_types`, and the column ``type`` of the tables."""
        self.layer_types = dict(types)
        for measure, table in self._tables.items():
            self._tables[measure] = Table(replace(row, type=self.layer_types.get(row.layer, "")) for row in table)

    def set_live_means(self, measure: str, means: Mapping[str, float]) -> None:
        """Set :meth:`live_mean` where the values of single activations are not known."""
        self._tables[measure] = Table(replace(row, live_mean=means[row.layer]) for row in self._tables[measure])

    @property
    def measures(self) -> list[str]:
        """Names of the measures."""
        return list(self._values)

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order in which they ran; :attr:`skipped` says which a measure leaves out."""
        return max((list(layers) for layers in self._values.values()), key=len, default=[])

    def table(self, measure: str | None = None) -> Table:
        """Return a row of statistics for each layer: a list of :class:`LayerStatistics` that prints as a table.

        Args:
            measure: its name; by default the first.
        """
        return self._tables[self._known(measure)]

    def per_layer(self, measure: str | None = None) -> dict[str, float]:
        """Return the mean over the finite values of each layer; NaN where there are none.

        Args:
            measure: its name; by default the first.
        """
        return {row.layer: row.mean for row in self.table(measure)}

    def last(self, measure: str | None = None) -> float:
        """Return the mean over the finite values of the last layer that ran; NaN where there is no layer.

        Args:
            measure: its name; by default the first.
        """
        means = [row.mean for row in self.table(measure) if row.layer != self.input_layer]
        return means[-1] if means else math.nan

    def quality(self, measure: str) -> str:
        """Return what a measure measures: ``"equivariant"`` for measures with a :attr:`floor`, else ``"invariant"``."""
        return "equivariant" if measure in self.floor else "invariant"

    def live_mean(self, measure: str | None = None) -> dict[str, float]:
        """Return the mean over the finite values of each layer without dead units; NaN where there are none.

        Dead units never change. In the paper's mean, :meth:`per_layer`, they count as 1 (0/0) for normalised measures
        and as 0 for the others.

        Args:
            measure: its name; by default the first.
        """
        return {row.layer: row.live_mean for row in self.table(measure)}

    def without_bias(self, measure: str | None = None) -> dict[str, float]:
        """Return :meth:`per_layer`, without the bias of measures whose definition depends on the number of samples.

        Args:
            measure: its name; by default the first.
        """
        measure = self._known(measure)
        return {row.layer: _unbiased(self, measure, row) for row in self._tables[measure]}

    def per_channel(self, measure: str, layer: str, aggregate: str = "mean") -> Tensor:
        """Return one value for each channel, by default the mean over the spatial axes (paper, figure 8).

        The shape is ``(channels,)``; ``channel_axis`` says which axis holds the channels, and an activation without
        axes is one channel. A channel with an infinite or NaN value is infinite or NaN itself.

        Args:
            measure: its name.
            layer: its name.
            aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the spatial axes.
        """
        if layer not in self[measure]:
            hint = instead_of(layer, self[measure], "It has")
            raise KeyError(f"No layer {layer!r} of {measure} in this result. {hint}")
        if aggregate not in ("mean", "max", "sum"):
            raise ValueError(f'Expected argument `aggregate` to be "mean", "max" or "sum", but got {aggregate!r}.')
        return aggregate_maps(self[measure][layer], aggregate, self.channel_axis.get(layer, 0))

    def dead_channels(self, layer: str) -> Tensor:
        """Return which channels hold nothing but dead activations: bool ``(channels,)``."""
        dead = self.dead.get(layer)
        if dead is None:
            measure = next(measure for measure, layers in self._values.items() if layer in layers)
            return torch.zeros_like(self.per_channel(measure, layer), dtype=torch.bool)
        return dead.movedim(self.channel_axis.get(layer, 0), 0).flatten(1).all(1) if dead.ndim > 1 else dead.reshape(-1)

    def mean(self, measure: str | None = None, weighted: bool = False) -> float:
        """Return one number for the network: the mean over layers of the finite values of :meth:`per_layer`.

        Args:
            measure: its name; by default the first.
            weighted: weight each layer by its number of finite values; by default all layers weigh equally.
        """
        rows = [row for row in self.table(measure) if math.isfinite(row.mean) and row.layer != self.input_layer]
        sizes = [math.prod(row.shape) - row.infinite - row.nan if weighted else 1 for row in rows]
        total = sum(sizes)
        return sum(row.mean * size for row, size in zip(rows, sizes, strict=True)) / total if total else math.nan

    def interval(self, measure: str | None = None, confidence: float | None = None) -> Intervals:
        """Return the confidence intervals over samples of the mean of each layer, and of :meth:`mean`.

        ``result.interval()["conv1"]`` has ``low``, ``high``, ``standard_error``, and ``doubt`` where the interval may
        be too narrow; ``result.interval().network`` is the interval of :meth:`mean`.

        Args:
            measure: its name; by default the first.
            confidence: in (0, 1); by default the one of the evaluation.

        Raises:
            ValueError: If the result has no influences of samples on the measure, or ``confidence`` is not in (0, 1).
        """
        measure, level = self._known(measure), self._level(confidence)
        influences = _influences_of(self, measure)
        keys = self.sample_keys.get(measure)
        repeated = 1 - len(torch.unique(keys)) / max(1, len(keys)) if keys is not None else 0.0
        unit = "samples" if keys is None or len(keys) == self.n_samples else "groups of samples"
        found, rows = Intervals(), self._tables[measure]
        finite = [row for row in rows if math.isfinite(row.mean) and row.layer != self.input_layer]
        for row in rows:
            if row.layer in influences:
                reasons = _reasons_for_doubt(self, measure, row)
                centre = _unbiased(self, measure, row)
                found[row.layer] = interval_of(row.mean, influences[row.layer], level, *reasons, centre, unit, repeated)
        # All layers weigh equally in the mean over layers, and in what makes its interval doubtful.
        of_layers = torch.tensor([_reasons_for_doubt(self, measure, row) for row in finite], dtype=torch.float64)
        left_out, sparse = (of_layers.view(-1, 2).sum(0) / max(1, len(finite))).tolist()
        centre = sum(_unbiased(self, measure, row) for row in finite) / max(1, len(finite))
        of_network = network_influences(influences.get(row.layer) for row in finite)
        found.network = interval_of(self.mean(measure), of_network, level, left_out, sparse, centre, unit, repeated)
        return found

    def unit_interval(
        self, layer: str, measure: str | None = None, confidence: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the lower and upper bounds of the interval of every unit of a layer, in the shape of its values.

        Args:
            layer: its name.
            measure: its name; by default the first.
            confidence: in (0, 1); by default the one of the evaluation.

        Raises:
            ValueError: If the result has no influences of samples on the measure, was reduced to channels, or
                ``confidence`` is not in (0, 1).
            KeyError: If there is no such layer.
        """
        measure = self._known(measure)
        _influences_of(self, measure)
        if not (errors := self.standard_errors.get(measure, {})):
            raise ValueError(
                f"Expected a result with a standard error of {measure} for each unit, but this one was reduced to"
                " channels, as older results of a history are: it has intervals of layers only."
            )
        if layer not in errors:
            raise KeyError(f"No intervals of layer {layer!r}. {instead_of(layer, errors, 'It has')}")
        freedom = self.freedom[measure][layer]
        half = t_quantiles(self._level(confidence), freedom.flatten()).view(freedom.shape) * errors[layer]
        values = self[measure][layer]
        bias = _bias_of(self, measure, layer)
        if (dead := self._dead_of(layer, values)) is not None:
            bias = torch.where(dead.view(values.shape), 0.0, bias)  # type: ignore[assignment]
        return values / (1 + bias) - half, values / (1 + bias) + half

    def samples_for(self, half_width: float, measure: str | None = None, layer: str | None = None) -> int:
        """Estimate how many samples an interval of ``± half_width`` needs, from the variation of these samples.

        Args:
            half_width: half of the wanted width, in units of the measure.
            measure: its name; by default the first.
            layer: its name; by default the layer that needs most samples.

        Raises:
            ValueError: If ``half_width`` is not above 0, the result has no influences on the measure, or there is no
                interval to start from.
            KeyError: If there is no such layer.
        """
        if not half_width > 0:
            raise ValueError(f"Expected argument `half_width` to be above 0, but got {half_width}.")
        intervals = self.interval(measure)
        if layer is not None and layer not in intervals:
            raise KeyError(f"No interval of layer {layer!r}. {instead_of(layer, intervals, 'It has')}")
        names = [name for name in intervals if name != self.input_layer] if layer is None else [layer]
        wanted = [intervals[name] for name in names]
        known = [interval for interval in wanted if math.isfinite(interval.high)]
        if not known:
            raise ValueError("Expected an interval of a layer with a finite value and two samples, but there is none.")
        return max(samples_for(interval, self.n_samples, half_width, self._level(None)) for interval in known)

    def _level(self, confidence: float | None) -> float:
        return check_confidence((self.confidence or 0.95) if confidence is None else confidence)

    def _dead_of(self, layer: str, values: Tensor) -> Tensor | None:
        """Return which values belong to dead units, also where there is one value for a channel or the whole layer."""
        dead = self.dead.get(layer)
        if dead is None or dead.numel() == values.numel():
            return dead
        channels = self.dead_channels(layer)
        return channels if channels.numel() == values.numel() else dead.all().expand(values.shape)

    def _known(self, measure: str | None) -> str:
        if measure is None:
            return next(iter(self._values))
        self[measure]  # raises a KeyError that lists the measures
        return measure


def _means_of(classes: Tensor) -> tuple[float, ...]:
    """Return the mean of the finite values of each class; NaN where there are none."""
    finite = torch.where(classes.isfinite(), classes, torch.nan)
    return tuple(finite.flatten(1).nanmean(1).tolist() if classes.ndim > 1 else finite.tolist())


def _reasons_for_doubt(record: Record, measure: str, row: LayerStatistics) -> tuple[float, float]:
    """Return the arguments ``left_out`` and ``sparse`` of :func:`interval_of` for a layer."""
    return row.share_left_out, record.sparse.get(measure, {}).get(row.layer, 0.0)


def _unbiased(record: Record, measure: str, row: LayerStatistics) -> float:
    """Return the mean of a layer without the bias of its live units; the value of dead ones, such as 1, has none."""
    bias = _bias_of(record, measure, row.layer)
    live = 1 - row.dead / max(1, math.prod(row.shape) - row.infinite - row.nan)
    biased = row.mean if not row.dead else live * row.live_mean if live > 0 else 0.0
    return row.mean - biased * bias / (1 + bias)


def _bias_of(record: Record, measure: str, layer: str) -> float:
    """Return the relative bias of the values of a layer, as far as it is known."""
    return record.biases.get(measure, 0.0) / max(2, record.reached.get(layer, record.n_samples))


def _influences_of(record: Record, measure: str) -> dict[str, Tensor]:
    if measure not in record.influences:
        raise ValueError(
            f"Expected a result with influences of samples on {measure}: measure with"
            " `evaluate(..., confidence=0.95)`. Anova, Goodfellow, Stratified, IntraclassCorrelation,"
            " MainEffect and ChannelEquivariance(channels='linear') have none."
        )
    return record.influences[measure]
