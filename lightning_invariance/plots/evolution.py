"""Layers × evaluations: how invariance changes while a network trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_invariance.plots.common import (
    add_colourbar,
    colours,
    first_measure,
    is_ratio,
    layers_of,
    marks_of,
    new_figure,
    scale_of,
    within,
)
from lightning_invariance.plots.labels import draw_borders, label_layers, shorten
from lightning_invariance.result import InvarianceResult

MOST_TICKS = 20

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
    results know the trainer's metrics of their moment, runs the accuracy, or else the loss.

    Args:
        history: evaluations of one network, such as ``InvarianceMonitor.history``.
        measure: its name; by default the first.
        score: the metric that is drawn above; by default one with "acc" in its name, or else with "loss".
        limits: the ends of the colour scale; see :func:`heatmap`.
    """
    if not history:
        raise ValueError("Expected argument `history` to hold at least one result, but it is empty.")
    measure = measure or first_measure(history)
    layers = layers_of(history, measure)
    means = [result.per_layer(measure) for result in history]
    values = np.array([[per_layer.get(layer, np.nan) for per_layer in means] for layer in layers])
    scale = scale_of(is_ratio(history, measure), values.ravel().tolist(), limits)
    score = score or _score(history)
    height = min(HIGHEST, max(2.0, 0.25 * len(layers)))
    figure = new_figure(width=7.5, height=1.5 + height + (1.4 if score else 0))
    if score:
        above, axes = figure.subplots(2, 1, sharex=True, height_ratios=[1.2, height])
        above.plot(range(len(history)), [r.scores.get(score, math.nan) for r in history], "o-", color="#0072b2", ms=4)
        above.set_ylabel(shorten(score))
        above.grid(alpha=0.3)
    else:
        axes = figure.add_subplot()
    axes.imshow(within(scale, values), aspect="auto", norm=scale, cmap=colours(), interpolation="nearest")
    blocks = label_layers(axes, layers, height, along="y", marks=marks_of(history, measure))
    if len(blocks) < len(layers):
        draw_borders(axes, blocks, "y")
    every = -(-len(history) // MOST_TICKS)
    axes.set_xticks(range(0, len(history), every), [_label(result, i) for i, result in enumerate(history)][::every])
    axes.set_xlabel("epoch")
    figure.suptitle(f"{measure}: mean of each layer")
    add_colourbar(figure, axes, scale, measure)
    return figure


def _score(history: Sequence[InvarianceResult]) -> str | None:
    """The metric that tells best how well the network does: of validation rather than training."""
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
