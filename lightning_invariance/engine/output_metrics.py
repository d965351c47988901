"""Metrics of the predictions of a network, such as an accuracy, under each transformation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_invariance.accumulators.mapped_back import MIN_VISIBLE
from lightning_invariance.data.batches import LABEL_KEYS, describe, target_of
from lightning_invariance.data.loader import STBlock
from lightning_invariance.distributed import gather_objects
from lightning_invariance.messages import level_of_user, some
from lightning_invariance.model.outputs import all_tensors_of
from lightning_invariance.model.probe import FAILURES
from lightning_invariance.results.intervals import interval_of
from lightning_invariance.results.result import OutputValues
from lightning_invariance.transforms import TransformationSet

#: Relative tolerance within which a metric must equal the mean of its values for single samples; it is in float32.
TOLERANCE = 1e-5

#: Where the prediction stands in an output that holds several tensors; by default it is the first.
LOGITS = "[logits]"


class OutputMetrics:
    """Metrics of the output of a network and the targets, a clone for each transformation.

    Args:
        metrics: name → metric, which is updated as ``metric(predictions, targets)``.
        transformations: of the inputs.
        device: where they are updated.
        confidence: of the intervals of metrics that are means over samples; None for no intervals.
        moves: whether predictions move as the inputs do, and are mapped back.

    Raises:
        ValueError: If predictions move, and the transformations have no inverses.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        transformations: TransformationSet,
        device: torch.device,
        confidence: float | None = None,
        moves: bool = False,
    ) -> None:
        if moves and not transformations.invertible:
            raise ValueError(
                f"Expected `transformations` with inverses for `outputs_move`, but {transformations!r} has none."
            )
        self._moved = transformations if moves else None
        self._clones: dict[str, list[Metric]] = {}
        self._by_sample: dict[str, _BySample] = {}
        self._confidence = confidence
        self._labels, m = transformations.labels, len(transformations)
        self._may_move = transformations.invertible and not moves
        self._unseen: set[int] = set()  # columns of which no pixel stays in the frame
        for name, metric in metrics.items():
            metric = deepcopy(metric)
            metric.reset()
            self._clones[name] = [deepcopy(metric).to(device) for _ in range(m)]
            if confidence is not None:
                self._by_sample[name] = _BySample(deepcopy(metric).to(device), m)

    def add(self, block: STBlock, output: Any) -> None:
        """Update with the output of the network for a block, columns of each row one after the other.

        Raises:
            ValueError: If the batch has no targets, or the output no tensor with a prediction for each input.
        """
        if not self._clones:
            return
        rows, columns = block.inputs.shape[:2]
        targets = target_of(block.batch, rows)
        if targets is None:
            raise ValueError(
                "Expected data with targets for the metrics in argument `outputs`, as pairs (x, y) or dicts with y"
                f" under one of {LABEL_KEYS}, where y is a tensor with an entry for each sample, but a batch is"
                f" {describe(block.batch)}."
            )
        if self._may_move:
            self._may_move = False
            _warn_of_maps(targets, block.inputs)
        predictions = prediction_of(output, rows * columns)
        predictions = predictions.detach().reshape(rows, columns, *predictions.shape[1:])
        if self._moved is not None:
            if not predictions.is_floating_point():
                raise ValueError(
                    f"Expected floating-point predictions for `outputs_move`, but got {predictions.dtype}: let"
                    " `forward` return logits or probabilities, since classes cannot be interpolated."
                )
            moved = self._moved.select(range(len(self._labels))[block.columns])
            predictions = moved.inverse(predictions, tuple(block.inputs.shape[2:]))
            visible = visible_in(moved, predictions, tuple(block.inputs.shape[2:]))
            self._unseen |= {block.columns.start + j for j, seen in enumerate(visible) if not seen.any()}
        targets = targets.to(predictions.device).contiguous()  # some metrics view their arguments
        for name, clones in self._clones.items():
            pairs = [(prediction.contiguous(), targets) for prediction in predictions.unbind(1)]
            if self._moved is not None:
                pairs = [only_visible(*pair, seen, clones[0]) for pair, seen in zip(pairs, visible, strict=True)]
            for metric, pair in zip(clones[block.columns], pairs, strict=True):
                _update(name, metric, *pair)
            if name in self._by_sample:
                self._by_sample[name].add(pairs)

    def values(self) -> dict[str, OutputValues]:
        """Name → the value under each transformation; of all processes, by the metrics' own synchronisation.

        Raises:
            ValueError: If a metric has more than one value.
        """
        found: dict[str, OutputValues] = {}
        if self._unseen:
            labels = some(self._labels[j] for j in sorted(self._unseen))
            rank_zero_warn(f"Metrics of outputs are NaN for {labels}: no pixel stays in the frame.", UserWarning)
        for name, clones in self._clones.items():
            with warnings.catch_warnings():  # of metrics that were not updated: in processes without samples
                warnings.simplefilter("ignore", UserWarning)
                values = [metric.compute() for metric in clones]
            if any(not isinstance(value, Tensor) or value.numel() != 1 for value in values):
                raise ValueError(
                    f"Expected metrics in argument `outputs` to have one value, but {name} has {values[0]!r}: average"
                    " over classes."
                )
            numbers = [math.nan if j in self._unseen else float(value) for j, value in enumerate(values)]
            found[name] = OutputValues(numbers, self._labels, clones[0].higher_is_better)
            if name in self._by_sample and self._confidence is not None:
                of_samples = torch.cat(gather_objects(self._by_sample[name].values()))
                bounds = clones[0].plot_lower_bound, clones[0].plot_upper_bound
                found[name] = _with_intervals(found[name], of_samples, self._confidence, bounds)
        return found


class _BySample:
    """Values of a metric for single samples.

    Args:
        metric: on its device.
        m: number of transformations.
    """

    def __init__(self, metric: Metric, m: int) -> None:
        self._metric, self._m = metric, m
        self._values: list[float] = []
        self._is_mean = True

    def add(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add the predictions ``(rows, ...)`` and targets of each column; a row longer than a batch comes in parts."""
        with warnings.catch_warnings():  # such as of classes that a single sample does not have
            warnings.simplefilter("ignore")
            by_sample = [
                [self._value(predictions[row, None], targets[row, None]) for predictions, targets in pairs]
                for row in range(len(pairs[0][0]))
            ]
            together = [self._value(*pair) for pair in pairs]
        self._values += [value for of_row in by_sample for value in of_row]
        # Of all samples it may be their mean by chance: averaged over classes which have as many samples each.
        self._is_mean &= is_mean(torch.tensor(by_sample, dtype=torch.float64), together)

    def _value(self, prediction: Tensor, target: Tensor) -> float:
        """NaN where the metric has no single value for one sample."""
        try:
            self._metric.reset()
            value = self._metric(prediction, target)  # of this call, which no process is asked for
            return float(value) if isinstance(value, Tensor) and value.numel() == 1 else math.nan
        except (ValueError, RuntimeError, IndexError):
            return math.nan

    def values(self) -> Tensor:
        """``(samples, transformations)``; NaN if the metric was not the mean of its values for single samples."""
        found = torch.tensor(self._values, dtype=torch.float64).view(-1, self._m)
        return found if self._is_mean else torch.full_like(found, math.nan)


def _update(name: str, metric: Metric, predictions: Tensor, targets: Tensor) -> None:
    """Update a metric, and name it in its errors."""
    try:
        metric.update(predictions, targets)
    except FAILURES as error:
        if type(error) not in FAILURES:
            raise
        raise type(error)(
            f"{error}\nMetric {name!r} in argument `outputs` got predictions of shape {tuple(predictions.shape)} and"
            f" targets of shape {tuple(targets.shape)}. Predictions are what `forward` returns (its logits, or the"
            " first tensor with one for each input), targets the second entry of a batch: let `forward` return others,"
            " or a dataset give pairs (x, y)."
        ) from error


def visible_in(transformations: TransformationSet, maps: Tensor, input_size: tuple[int, ...]) -> Tensor:
    """Which positions of maps ``(rows, m, ..., *positions)`` stay in the frame: bool ``(m, *positions)``."""
    axes = max(transformations.map_axes, len(input_size) - 1)
    ones = torch.ones(1, *maps.shape[2:], dtype=torch.float64, device=maps.device)
    seen = transformations.inverse(transformations.of_maps(ones, input_size), input_size)[0] >= MIN_VISIBLE
    return seen.flatten(1, -axes - 1).all(1) if seen.ndim > axes + 1 else seen


def only_visible(predictions: Tensor, targets: Tensor, visible: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Leave out pixels that left the frame, given which stay, ``(*positions)``.

    Targets are the metric's ``ignore_index`` there; for metrics without one, the last axis counts the other pixels.
    """
    if bool(visible.all()) or not bool(visible.any()) or targets.shape[-visible.ndim :] != visible.shape:
        return predictions, targets
    if (index := getattr(metric, "ignore_index", None)) is not None:
        return predictions, torch.where(visible, targets, index)
    kept = visible.flatten()
    return predictions.flatten(-visible.ndim)[..., kept], targets.flatten(-visible.ndim)[..., kept]


def is_mean(of_samples: Tensor, values: Sequence[float]) -> bool:
    """Whether each value is the mean of the values for single samples, ``(samples, transformations)``."""
    differences = (of_samples.mean(0) - torch.tensor(values, dtype=torch.float64)).abs()
    return bool((differences <= TOLERANCE * of_samples.abs().max()).all())  # false for NaN


def _warn_of_maps(targets: Tensor, inputs: Tensor) -> None:
    """Warn where targets have a value for each pixel of the images ``(rows, columns, channels, height, width)``."""
    if inputs.ndim == 5 and targets.ndim > 2 and targets.shape[-2:] == inputs.shape[-2:]:
        warnings.warn(
            f"Targets of shape {tuple(targets.shape)} look like maps of the images, but do not move with these: where"
            " transformations move pixels, metrics in argument `outputs` compare predictions with targets that stand"
            " elsewhere. Write `outputs_move=True`, which maps predictions back.",
            UserWarning,
            stacklevel=level_of_user(),
        )


def _with_intervals(
    found: OutputValues, of_samples: Tensor, confidence: float, bounds: tuple[float | None, float | None]
) -> OutputValues:
    """Add intervals, if every value is the mean of the values for single samples ``(samples, transformations)``.

    Intervals end at the bounds of the metric, which torchmetrics gives for its plots.
    """
    if not len(of_samples) or not is_mean(of_samples, found.values):
        return found
    columns = [*of_samples.unbind(1), of_samples.mean(1)]
    intervals = [interval_of(float(each.mean()), each - each.mean(), confidence) for each in columns]
    ends = torch.tensor([[each.low, each.high] for each in intervals], dtype=torch.float64)
    ends[[each.standard_error == 0 for each in intervals]] = math.nan
    low, high = (ends if bounds == (None, None) else ends.clamp(*bounds)).mT.tolist()
    return replace(found, low=low[:-1], high=high[:-1], mean_low=low[-1], mean_high=high[-1])


def prediction_of(output: Any, n: int) -> Tensor:
    """The tensor in an output that holds a prediction for each of n inputs: its logits, or else the first that fits.

    Raises:
        ValueError: If there is none.
    """
    tensors = {place: tensor for place, tensor in all_tensors_of(output) if tensor.ndim and len(tensor) == n}
    if not tensors:
        shapes = [tuple(tensor.shape) for _, tensor in all_tensors_of(output)]
        raise ValueError(
            f"Expected the model to return a prediction for each of {n} inputs for the metrics in argument `outputs`,"
            f" but its output has tensors of shapes {shapes}: let `forward` return the predictions."
        )
    return tensors.get(LOGITS, next(iter(tensors.values())))
