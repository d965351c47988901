"""Layers × evaluations: how invariance changes while a network trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_invariance.plots.bars import ROOM, add_colourbar
from lightning_invariance.plots.cells import show_cells
from lightning_invariance.plots.common import (
    ABOVE,
    NUMBERS,
    align_above,
    axes_below,
    colours,
    first_measure,
    is_ratio,
    marks_of,
    new_figure,
    scale_of,
    within,
    write_title,
)
from lightning_invariance.plots.labels import LayerLabels
from lightning_invariance.plots.text import inches_of
from lightning_invariance.results.compare import compare
from lightning_invariance.results.result import InvarianceResult

MOST_TICKS = 20

#: The width of the figure, the room below the rows, and the gap above them, in inches.
WIDTH, BELOW, APART = 7.5, 0.5, 0.13

#: The largest height of all rows together, in inches.
HIGHEST = 11.0


def evolution(
    history: Sequence[InvarianceResult],
    measure: str | None = None,
    *,
    score: str | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """When does which layer become invariant? A row for each layer, a column for each evaluation so far.

    A cell is the mean over the finite values of a layer; layers without a finite value are grey. Above it, where the
    results know of one, runs a metric of their moment, such as the accuracy. With ``confidence`` a dot
    marks the cells that differ from the first evaluation by more than chance.

    Args:
        history: evaluations of one network, such as ``InvarianceMonitor.history``.
        measure: its name; by default the first.
        score: the metric that is drawn above: the mean of one in ``outputs`` over the transformations, or one of the
            trainer's; by default the first in ``outputs``, or else one with "acc" in its name, or else with "loss".
        limits: the ends of the colour scale; see :func:`heatmap`.
    """
    if not history:
        raise ValueError("Expected argument `history` to hold at least one result, but it is empty.")
    measure = measure or first_measure(history)
    means = [result.per_layer(measure) for result in history]
    layers = [*dict.fromkeys(chain.from_iterable(means))]
    # Where an evaluation lacks a layer, None becomes NaN.
    values = np.array([[*map(per_layer.get, layers)] for per_layer in means], dtype=np.float64).T
    scale = scale_of(is_ratio(history, measure), values.ravel().tolist(), limits)
    score = score or _score(history)
    marked = _beyond_noise(history, measure, layers)
    height = min(HIGHEST, max(2.0, 0.25 * len(layers)))
    labels = LayerLabels(layers, height, marks_of(history, measure))
    title = f"{measure}: mean of each layer" + "\ndots: differs from the first evaluation" * bool(marked)
    left, top = max(labels.room, NUMBERS), 0.35 + 0.2 * bool(marked)
    width = WIDTH - left - ROOM
    figure = new_figure(WIDTH, BELOW + height + (APART + ABOVE if score else 0) + top, layout=None)
    above, axes = axes_below(figure, left, BELOW, width, height, APART if score else None)
    if marked:
        axes.plot([j for j, _ in marked], [i for _, i in marked], "o", color="white", mec="black", mew=0.5, ms=3)
    show_cells(axes, within(scale, values), scale, colours())
    labels.write(axes, "y")
    if len(labels.blocks) < len(layers):
        labels.draw_borders(axes, "y")
    epochs = [_label(result, i) for i, result in enumerate(history)]
    every = math.ceil(len(history) / min(MOST_TICKS, width / (inches_of(epochs) + 0.08)))
    axes.set_xticks(range(0, len(history), every), epochs[::every])
    axes.set_xlabel("epoch")
    if above is not None and score:
        align_above(above, axes, score)
        _draw_score(above, history, score)
    write_title(figure, title)
    add_colourbar([axes], scale, measure)
    return figure


def _beyond_noise(history: Sequence[InvarianceResult], measure: str, layers: Sequence[str]) -> list[tuple[int, int]]:
    """Which cells differ from the first evaluation by more than chance, as (evaluation, layer); see ``compare``."""
    first = history[0]
    if measure not in first.influences:
        return []
    rows = {layer: i for i, layer in enumerate(layers)}
    return [
        (j, rows[layer])
        for j, result in enumerate(history[1:], 1)
        if measure in result.influences
        for layer in _differing(first, result, measure)
    ]


#: Result → first result → measure → the layers that differ: compared once, however long the history.
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
    low, high = (
        np.array([getattr(one, end, None) for one in found], dtype=np.float64) for end in ("mean_low", "mean_high")
    )
    if np.isfinite(low).any():
        axes.fill_between(range(len(history)), low, high, color="#0072b2", alpha=0.25, linewidth=0)


def _score(history: Sequence[InvarianceResult]) -> str | None:
    """The metric that tells best how well the network does: of validation rather than training."""
    for result in history:
        if result.outputs:
            return next(iter(result.outputs))
    known = dict.fromkeys(name for result in history for name in result.scores)
    for word in ("acc", "loss"):
        fitting = [name for name in known if word in name.lower()]
        if fitting:
            return min(fitting, key=lambda name: "val" not in name.lower())
    return None


def _label(result: InvarianceResult, position: int) -> str:
    if result.epoch is None:
        return str(position)
    return "init" if result.epoch == -1 else str(result.epoch)
