"""Heatmap of layers × evaluations: how invariance changes while a network trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_invariance.plots.common import (
    add_colourbar,
    first_measure,
    inches_of,
    is_ratio,
    marks_of,
    new_axes,
    rows_of_layers,
    scale_of,
    show_cells,
    title_of,
)
from lightning_invariance.plots.labels import label_layers, wrap
from lightning_invariance.results.compare import compare
from lightning_invariance.results.result import InvarianceResult

#: The largest number of labels of evaluations.
MOST_TICKS = 20

#: The width of the figure, the largest height of all rows, and the room above and below them, in inches.
WIDTH, HIGHEST, BESIDE = 7.5, 11.0, 1.0


def evolution(
    history: Sequence[InvarianceResult],
    measure: str | None = None,
    *,
    score: str | None = None,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """When does which layer become invariant? A row for each layer, a column for each evaluation so far.

    A cell is the mean over the finite values of a layer; layers without a finite value are grey. Above them stands a
    metric of the same evaluations, such as the accuracy, where the results have one. With ``confidence`` a dot marks
    the cells that differ from the first evaluation by more than chance.

    Args:
        history: evaluations of one network, such as ``InvarianceMonitor.history``.
        measure: its name; by default the first.
        score: the metric above: the mean of one in ``outputs`` over the transformations, or one of the trainer's; by
            default the first in ``outputs``, or else one with "acc" in its name, or else with "loss".
        limits: the ends of the colour scale; see :func:`heatmap`. By default those of the whole history.
        title: the name in the title; by default the measure's.
        size: width and height of the figure in inches.
    """
    if not history:
        raise ValueError("Expected argument `history` to hold at least one result, but it is empty.")
    measure = measure or first_measure(history)
    means = [result.per_layer(measure) for result in history]
    labels = rows_of_layers(history, measure)
    layers = list(labels)
    # Where an evaluation lacks a layer, None becomes NaN.
    values = np.array([[*map(per_layer.get, layers)] for per_layer in means], dtype=np.float64).T
    scale = scale_of(is_ratio(history, measure), values.ravel().tolist(), limits)
    score = score or _score(history)
    marked = _beyond_noise(history, measure, layers)
    height = min(HIGHEST, max(2.0, 0.25 * len(layers)))
    figure, above, axes = new_axes(WIDTH, height + BESIDE, score, size)
    width, height = inches_of(axes)
    show_cells(axes, values, scale)
    found = label_layers(axes, "y", labels, height, marks_of(history, measure))
    if len(found) < len(layers):
        axes.hlines([block.start - 0.5 for block in found[1:]], -0.5, len(history) - 0.5, "white", linewidth=0.5)
    if marked:
        axes.plot([j for j, _ in marked], [i for _, i in marked], "o", color="white", mec="black", mew=0.5, ms=3)
    epochs = [{None: str(i), -1: "init"}.get(result.epoch, str(result.epoch)) for i, result in enumerate(history)]
    every = math.ceil(len(history) / max(2, min(MOST_TICKS, round(3.5 * width))))
    axes.set_xticks(range(0, len(history), every), epochs[::every], rotation=90 if len(epochs[-1]) > 2 else 0)
    axes.set_xlabel("epoch")
    if above is not None and score:
        _draw_score(above, history, score)
    about = title_of(history[-1], title or measure) + "\ndots: differs from the first evaluation" * bool(marked)
    figure.suptitle(wrap(about, width), fontsize="medium")
    add_colourbar(figure, [axes], scale, measure, height)
    return figure


def _beyond_noise(history: Sequence[InvarianceResult], measure: str, layers: Sequence[str]) -> list[tuple[int, int]]:
    """Cells that differ from the first evaluation by more than chance, as (evaluation, layer); see ``compare``."""
    first = history[0]
    if measure not in first.influences:
        return []
    rows = {layer: i for i, layer in enumerate(layers)}
    return [
        (j, rows[layer])
        for j, result in enumerate(history[1:], 1)
        if measure in result.influences
        for layer in _differing(first, result, measure)
        if layer in rows
    ]


#: Result → first result → measure → the layers that differ. Comparing 60 layers takes 25 ms, and a picture is drawn at
#: every evaluation, so that without this a history of 40 would cost a second each time.
_Known: TypeAlias = WeakKeyDictionary[InvarianceResult, dict[str, list[str]]]
_DIFFERING: WeakKeyDictionary[InvarianceResult, _Known] = WeakKeyDictionary()


def _differing(first: InvarianceResult, result: InvarianceResult, measure: str) -> list[str]:
    known = _DIFFERING.setdefault(result, WeakKeyDictionary()).setdefault(first, {})
    if measure not in known:
        known[measure] = compare(first, result, measure, confidence=result.confidence or 0.95).differing
    return known[measure]


def _draw_score(axes: Axes, history: Sequence[InvarianceResult], score: str) -> None:
    """Draw a metric of each evaluation, with a band where it has intervals."""
    found = [result.outputs.get(score) for result in history]
    values = [r.scores.get(score, math.nan) if one is None else one.mean for r, one in zip(history, found, strict=True)]
    axes.plot(range(len(history)), values, "o-", color="#0072b2", ms=4)
    ends = [[getattr(one, end, None) for one in found] for end in ("mean_low", "mean_high")]
    low, high = np.array(ends, dtype=np.float64)
    if np.isfinite(low).any():
        axes.fill_between(range(len(history)), low, high, color="#0072b2", alpha=0.25, linewidth=0)


def _score(history: Sequence[InvarianceResult]) -> str | None:
    """The metric to draw by default: of outputs, else accuracy, else loss; of validation rather than training."""
    for result in history:
        if result.outputs:
            return next(iter(result.outputs))
    known = dict.fromkeys(name for result in history for name in result.scores)
    fitting = [name for name in known if "acc" in name.lower() or "loss" in name.lower()]
    return min(fitting, key=lambda name: ("acc" not in name.lower(), "val" not in name.lower()), default=None)
