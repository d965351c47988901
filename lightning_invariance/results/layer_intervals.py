"""Values of measures by layer, with the confidence intervals of their means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.messages import instead_of
from lightning_invariance.results.intervals import (
    Intervals,
    check_confidence,
    interval_of,
    network_influences,
    samples_for,
)
from lightning_invariance.results.record import Record
from lightning_invariance.results.students_t import t_quantiles
from lightning_invariance.results.table import LayerStatistics
from lightning_invariance.results.values import LayerValues


class LayerIntervals(LayerValues, Record):
    """Values with the influences of samples on them; see :class:`~lightning_invariance.InvarianceResult`."""

    def __init__(
        self,
        values: Mapping[str, Mapping[str, Tensor]],
        dead: Mapping[str, Tensor] | None,
        about: Mapping[str, Any],
    ) -> None:
        Record.__init__(self, **about)
        layers = dict.fromkeys(layer for of_layers in values.values() for layer in of_layers)
        reached = {layer: self.reached.get(layer, self.n_samples) for layer in layers}
        LayerValues.__init__(self, values, dead, self.channel_axis, reached)
        for measure in self.influences if self.confidence is not None else ():
            self._tables[measure] = self._tables[measure].with_intervals(self.interval(measure))

    def interval(self, measure: str | None = None, confidence: float | None = None) -> Intervals:
        """The confidence interval over samples of the mean of each layer, and of :meth:`mean`: of the network.

        ``result.interval()["conv1"]`` has ``low``, ``high``, ``standard_error``, and ``doubt`` where the interval may
        be too narrow; ``result.interval().network`` is that of the network.

        Args:
            measure: its name; by default the first.
            confidence: by default that of the evaluation.

        Raises:
            ValueError: If the result has no influences of samples on the measure, or ``confidence`` is not in (0, 1).
        """
        measure = self._known(measure)
        level = check_confidence(self.confidence or 0.95) if confidence is None else check_confidence(confidence)
        known = self._influences_of(measure)
        keys = self.sample_keys.get(measure)
        repeated = 1 - len(torch.unique(keys)) / max(1, len(keys)) if keys is not None else 0.0
        unit = "samples" if keys is None or len(keys) == self.n_samples else "groups of samples"
        found, finite = Intervals(), [row for row in self._tables[measure] if math.isfinite(row.mean)]
        for row in self._tables[measure]:
            if row.layer in known:
                about = self._about(measure, row)
                found[row.layer] = interval_of(row.mean, known[row.layer], level, *about, unit, repeated)
        # Of the mean over layers, all of these count alike.
        abouts = torch.tensor([self._about(measure, row) for row in finite], dtype=torch.float64).view(-1, 3)
        left_out, sparse, bias = (abouts.sum(0) / max(1, len(finite))).tolist()
        of_network = network_influences(known.get(row.layer) for row in finite)
        found.network = interval_of(self.mean(measure), of_network, level, left_out, sparse, bias, unit, repeated)
        return found

    def _about(self, measure: str, row: LayerStatistics) -> tuple[float, float, float]:
        """What makes the interval of a layer doubtful: ``left_out``, ``sparse`` and ``bias`` of :func:`interval_of`."""
        reached = self.reached.get(row.layer, self.n_samples)
        sparse = self.sparse.get(measure, {}).get(row.layer, 0.0)
        return row.share_left_out, sparse, self.biases.get(measure, 0.0) / max(1, reached)

    def unit_interval(
        self, layer: str, measure: str | None = None, confidence: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The lower and upper bounds of the interval of every unit of a layer, in the shape of its values.

        Args:
            layer: its name.
            measure: its name; by default the first.
            confidence: by default that of the evaluation.

        Raises:
            ValueError: If the result has no influences of samples on the measure, was reduced to channels, or
                ``confidence`` is not in (0, 1).
            KeyError: If there is no such layer.
        """
        measure = self._known(measure)
        self._influences_of(measure)
        if not (known := self.standard_errors.get(measure, {})):
            raise ValueError(
                f"Expected a result with standard errors of units of {measure}, but this one was reduced to channels,"
                " as older results of a history are: it has intervals of layers only."
            )
        if layer not in known:
            raise KeyError(f"No intervals of layer {layer!r}. {instead_of(layer, known, 'It has')}")
        level = check_confidence(self.confidence or 0.95) if confidence is None else check_confidence(confidence)
        freedom = self.freedom[measure][layer]
        half = t_quantiles(level, freedom.flatten()).view(freedom.shape) * known[layer]
        return self[measure][layer] - half, self[measure][layer] + half

    def samples_for(self, half_width: float, measure: str | None = None, layer: str | None = None) -> int:
        """How many samples would give an interval of ``± half_width``, by what these samples vary.

        Args:
            half_width: half of the wanted width, in units of the measure.
            measure: its name; by default the first.
            layer: its name; by default the one that needs most, of those that have an interval.

        Raises:
            ValueError: If ``half_width`` is not above 0, the result has no influences on the measure, or no layer that
                is asked for has an interval.
        """
        if not half_width > 0:
            raise ValueError(f"Expected argument `half_width` to be above 0, but got {half_width}.")
        intervals = self.interval(measure)
        if layer is not None and layer not in intervals:
            raise KeyError(f"No interval of layer {layer!r}. {instead_of(layer, intervals, 'It has')}")
        some = intervals.values() if layer is None else [intervals[layer]]
        known = [interval for interval in some if math.isfinite(interval.high)]
        if not known:
            raise ValueError("Expected an interval of a layer with a finite value and two samples, but there is none.")
        level = check_confidence(self.confidence or 0.95)
        return max(samples_for(interval, self.n_samples, half_width, level) for interval in known)

    def _influences_of(self, measure: str) -> dict[str, Tensor]:
        if measure not in self.influences:
            raise ValueError(
                f"Expected a result with influences of samples on {measure}: measure with"
                " `evaluate(..., confidence=0.95)`. Variances, distances, same-equivariances and Consistency have them;"
                " other measures do not."
            )
        return self.influences[measure]
