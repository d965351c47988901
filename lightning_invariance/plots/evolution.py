"""Layers × evaluations: how invariance changes while a network trains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_invariance.plots.common import add_colourbar, colours, new_figure, scale_of, shorten, within
from lightning_invariance.result import InvarianceResult

MOST_TICKS = 20


def evolution(history: Sequence[InvarianceResult], measure: str | None = None) -> Figure:
    """When does which layer become invariant? A row for each layer, a column for each evaluation so far.

    A cell is the mean over the finite values of a layer. Layers without a finite value are grey.

    Args:
        history: evaluations of one network, such as ``InvarianceMonitor.history``.
        measure: its name; by default the first.
    """
    if not history:
        raise ValueError("Expected argument `history` to hold at least one result, but it is empty.")
    measure = measure or history[0].measures[0]
    layers = list(dict.fromkeys(layer for result in history for layer in result[measure]))
    means = [result.per_layer(measure) for result in history]
    values = np.array([[per_layer.get(layer, np.nan) for per_layer in means] for layer in layers])
    scale = scale_of(measure, values.ravel().tolist())
    figure = new_figure(width=7.5, height=min(24, max(3.5, 1.5 + 0.25 * len(layers))))
    axes = figure.add_subplot()
    axes.imshow(within(scale, values), aspect="auto", norm=scale, cmap=colours(), interpolation="nearest")
    axes.set_yticks(range(len(layers)), [shorten(layer) for layer in layers])
    every = -(-len(history) // MOST_TICKS)
    axes.set_xticks(range(0, len(history), every), [_label(result, i) for i, result in enumerate(history)][::every])
    axes.set_xlabel("epoch")
    axes.set_title(f"{measure}: mean of each layer")
    add_colourbar(figure, scale, colours(), measure)
    return figure


def _label(result: InvarianceResult, position: int) -> str:
    if result.epoch is None:
        return str(position)
    return "init" if result.epoch == -1 else str(result.epoch)
