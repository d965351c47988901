"""The paper's figure 8: layers × channels."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from lightning_invariance.plots.common import (
    add_colourbar,
    colours,
    is_ratio,
    label_layers,
    new_figure,
    scale_of,
    width_of,
    within,
)
from lightning_invariance.result import InvarianceResult
from lightning_invariance.style import DEAD, INFINITE, special_patches


def heatmap(
    result: InvarianceResult,
    measure: str | None = None,
    *,
    log: bool = True,
    limits: tuple[float, float] | None = None,
    sort: bool = False,
) -> Figure:
    """Which units are invariant? A column for each layer, a cell for each channel, in the order of the network.

    A cell is the mean over the spatial axes (paper, figure 8). Each column is as high as the figure, however many
    channels its layer has. Infinite values are green, dead units black, NaN grey; the legend counts them.

    Args:
        result: an evaluation.
        measure: its name; by default the first.
        log: whether the colours are those of a logarithmic scale.
        limits: the ends of the scale; values beyond take the colour of the end. By default 0.01 to 10 for normalised
            measures, so that pictures compare, and for others the range of the values.
        sort: whether the channels of each layer are sorted by value instead of in their order.
    """
    measure = measure or result.measures[0]
    layers = list(result[measure])
    columns = {layer: result.per_channel(measure, layer).numpy() for layer in layers}
    dead = {layer: result.dead_channels(layer).numpy() for layer in layers}
    if sort:
        orders = {layer: np.lexsort((values, dead[layer])) for layer, values in columns.items()}
        columns = {layer: values[orders[layer]] for layer, values in columns.items()}
        dead = {layer: values[orders[layer]] for layer, values in dead.items()}
    scale = scale_of(
        is_ratio([result], measure), [value for values in columns.values() for value in values.tolist()], limits, log
    )
    figure = new_figure(width_of(len(layers)), 5.5)
    axes = figure.add_subplot()
    counts = np.zeros(3, dtype=int)
    for x, (layer, values) in enumerate(columns.items()):
        counts += _draw_column(axes, x, values, dead[layer], scale)
    axes.set_xlim(-0.5, max(len(layers), 1) - 0.5)
    axes.set_ylim(1, 0)
    label_layers(axes, layers)
    axes.set_yticks([])
    axes.set_ylabel("channels, lowest value on top" if sort else "channels, first on top")
    axes.set_title(_title(result, measure))
    if len(layers) <= 60:
        for x in range(1, len(layers)):
            axes.axvline(x - 0.5, color="white", linewidth=1)
    add_colourbar(figure, axes, scale, measure)
    patches = special_patches(*map(int, counts))
    if patches:
        figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), frameon=False)
    return figure


def _draw_column(axes: Axes, x: float, values: np.ndarray, dead: np.ndarray, scale: Normalize) -> tuple[int, int, int]:
    """Draw the channels of a layer, and count those that are infinite, dead and NaN."""
    place = (x - 0.5, x + 0.5, 1, 0)
    shown = within(scale, values)[:, None]
    axes.imshow(shown, aspect="auto", extent=place, norm=scale, cmap=colours(), interpolation="nearest")
    infinite = np.isinf(values)
    for mask, colour in ((infinite, INFINITE), (dead, DEAD)):
        if mask.any():
            over = np.ma.masked_where(~mask, np.ones(len(values)))[:, None]
            axes.imshow(over, aspect="auto", extent=place, cmap=ListedColormap([colour]), interpolation="nearest")
    return int(infinite.sum()), int(dead.sum()), int(np.isnan(values).sum())


def _title(result: InvarianceResult, measure: str) -> str:
    when = {None: "", -1: ", untrained"}.get(result.epoch, f", epoch {result.epoch}")
    return f"{measure}{when}"
