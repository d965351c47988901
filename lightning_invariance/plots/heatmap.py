"""The paper's figure 8: layers × channels."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from lightning_invariance.plots.bars import ROOM, add_colourbar
from lightning_invariance.plots.cells import show_cells
from lightning_invariance.plots.common import (
    axes_at,
    colours,
    is_ratio,
    marks_of,
    new_figure,
    only_one,
    scale_of,
    width_of,
    within,
)
from lightning_invariance.plots.labels import LayerLabels
from lightning_invariance.plots.style import DEAD, INFINITE, special_patches
from lightning_invariance.plots.text import TITLE, fitting
from lightning_invariance.results.result import InvarianceResult

#: The height of the image of all cells.
PIXELS = 1000

#: The height of the figure, and what is beside the cells: the name of the channels, the title, the legend; in inches.
HEIGHT, LEFT, TOP, LEGEND = 5.5, 0.35, 0.35, 0.3

#: Layers between which a line can be seen.
MOST_APART = 60


def heatmap(
    result: InvarianceResult,
    measure: str | None = None,
    *,
    log: bool = True,
    limits: tuple[float, float] | None = None,
    sort: bool = False,
) -> Figure:
    """Which units are invariant? A column for each layer, a cell for each channel, in the order of the network.

    A cell is the mean over the spatial axes (paper, figure 8), without NaN unless there is nothing else. Each column is
    as high as the figure, however many channels its layer has. Infinite values are green, dead units black, NaN grey;
    the legend counts them.

    Args:
        result: an evaluation.
        measure: its name; by default the first.
        log: whether the colours are those of a logarithmic scale.
        limits: the ends of the scale; values beyond take the colour of the end. By default 0.01 to 10 for normalised
            measures, so that pictures compare, and for others the range of the values.
        sort: whether the channels of each layer are sorted by value instead of in their order.
    """
    measure = measure or only_one(result).measures[0]
    layers = list(result[measure])
    columns = {layer: _of_channels(result, measure, layer) for layer in layers}
    dead = {layer: result.dead_channels(layer).numpy() for layer in layers}
    if sort:
        orders = {layer: np.lexsort((values, dead[layer])) for layer, values in columns.items()}
        columns = {layer: values[orders[layer]] for layer, values in columns.items()}
        dead = {layer: values[orders[layer]] for layer, values in dead.items()}
    values = np.concatenate([*columns.values(), np.zeros(0)])
    scale = scale_of(is_ratio([result], measure), values.tolist(), limits, log)
    never = np.concatenate([*dead.values(), np.zeros(0, dtype=bool)])
    patches = special_patches(int(np.isinf(values).sum()), int(never.sum()), int(np.isnan(values).sum()))
    width = width_of(len(layers))
    across = width - LEFT - ROOM
    labels = LayerLabels(layers, across, marks_of([result], measure))
    bottom = labels.room + (LEGEND if patches else 0)
    height = HEIGHT - TOP - bottom
    figure = new_figure(width, HEIGHT, layout=None)
    axes = axes_at(figure, LEFT, bottom, across, height)
    _draw_cells(axes, columns, dead, scale)
    labels.write(axes, "x")
    labels.draw_borders(axes, "x", 1 if len(layers) <= MOST_APART else 0.5)
    axes.set_yticks([])
    what = "channels, lowest value on top" if sort else "channels, first on top"
    axes.set_ylabel(what, fontsize=fitting(what, height))
    title = _title(result, measure)
    axes.set_title(title, fontsize=fitting(title, across, TITLE))
    add_colourbar([axes], scale, measure)
    if patches:
        figure.legend(handles=patches, loc="lower right", ncols=len(patches), frameon=False, borderaxespad=0.2)
    return figure


def _of_channels(result: InvarianceResult, measure: str, layer: str) -> npt.NDArray[np.float64]:
    """The mean of each channel over its values that are not NaN, as that of the layer."""
    values = result.per_channel(measure, layer)
    if bool(values.isnan().any()) and result[measure][layer].ndim > 1:
        axis = result.channel_axis.get(layer, 0)
        values = result[measure][layer].movedim(axis, 0).flatten(1).nanmean(1)
    return values.numpy()


def _draw_cells(
    axes: Axes, columns: Mapping[str, np.ndarray], dead: Mapping[str, np.ndarray], scale: Normalize
) -> None:
    """Draw the channels of all layers as one image, in which a cell is as many pixels high as its layer needs."""
    height = min(PIXELS, math.lcm(*map(len, columns.values()))) if columns else 1
    pixels = {layer: (np.arange(height) + 0.5) * len(values) // height for layer, values in columns.items()}
    shown = np.stack([columns[layer][at.astype(int)] for layer, at in pixels.items()], 1)
    never = np.stack([dead[layer][at.astype(int)] for layer, at in pixels.items()], 1)
    place = (-0.5, len(columns) - 0.5, 1, 0)
    show_cells(axes, within(scale, shown), scale, colours(), place)
    for mask, colour in ((np.isinf(shown), INFINITE), (never, DEAD)):
        if mask.any():
            over = np.ma.masked_where(~mask, np.ones(mask.shape))
            show_cells(axes, over, Normalize(0, 1), ListedColormap([colour]), place)


def _title(result: InvarianceResult, measure: str) -> str:
    when = {None: "", -1: ", untrained"}.get(result.epoch, f", epoch {result.epoch}")
    return f"{measure}{when}"
