"""Heatmap of layers × channels, as in the paper's figure 8."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lightning_invariance.plots.common import (
    Scale,
    add_colourbar,
    axes_in,
    inches_of,
    is_ratio,
    marks_of,
    only_one,
    rows_of_layers,
    scale_of,
    show_cells,
    title_of,
    width_of,
)
from lightning_invariance.plots.labels import label_layers, wrap
from lightning_invariance.plots.style import DEAD, INFINITE, special_patches
from lightning_invariance.results.result import InvarianceResult

#: The largest number of rows of the image of all cells.
MOST_ROWS = 1000

#: The height of the figure, in inches.
HEIGHT = 5.5


def heatmap(
    result: InvarianceResult,
    measure: str | None = None,
    *,
    log: bool = True,
    limits: tuple[float, float] | None = None,
    sort: bool = False,
    classes: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Which units are invariant? A column for each layer, a cell for each channel, in the order of the network.

    A cell is the mean over the spatial axes (paper, figure 8), without NaN unless there is nothing else. Each column is
    as high as the figure, however many channels its layer has. Infinite values are green, dead units black, NaN grey;
    the legend counts them.

    Args:
        result: an evaluation.
        measure: its name; by default the first.
        log: whether the scale of the colours is logarithmic.
        limits: the ends of the scale; values beyond take the colour of the end. By default those of the values, for
            normalised measures symmetric about 1 (blue: more invariant than samples vary; red: less).
        sort: whether the channels of each layer are sorted by value instead of in their order.
        classes: whether cells are the classes of ``Stratified`` instead of channels: the mean of the layer for each.
        title: the name in the title; by default the measure's.
        ax: axes to draw into; by default a new figure is made.
        size: width and height of the new figure in inches.
    """
    measure = measure or only_one(result).measures[0]
    labels = rows_of_layers([result], measure)
    layers = list(labels)
    of_classes = {row.layer: np.array(row.by_class) for row in result.table(measure)}
    if classes and not any(map(len, of_classes.values())):
        raise ValueError("Expected a result with values by class: measure it with `Stratified(measure, num_classes)`.")
    columns = {layer: of_classes[layer] if classes else _of_channels(result, measure, layer) for layer in layers}
    dead = {
        layer: np.zeros(len(v), bool) if classes else result.dead_channels(layer).numpy()
        for layer, v in columns.items()
    }
    if sort:
        orders = {layer: np.lexsort((values, dead[layer])) for layer, values in columns.items()}
        columns = {layer: values[orders[layer]] for layer, values in columns.items()}
        dead = {layer: values[orders[layer]] for layer, values in dead.items()}
    values = np.concatenate([*columns.values(), np.zeros(0)])
    scale = scale_of(is_ratio([result], measure), values.tolist(), limits, log)
    never = np.concatenate([*dead.values(), np.zeros(0, dtype=bool)])
    patches = special_patches(int(np.isinf(values).sum()), int(never.sum()), int(np.isnan(values).sum()))
    figure, axes = axes_in(ax, width_of(len(layers)), HEIGHT, size)
    width, height = inches_of(axes)
    _draw_cells(axes, columns, dead, scale)
    found = label_layers(axes, "x", labels, width - 0.5, marks_of([result], measure))
    borders = [block.start - 0.5 for block in found[1:]]
    axes.vlines(borders, *axes.get_ylim(), "white", linewidth=min(1, 60 / max(len(layers), 1)))
    axes.set_yticks([])
    axes.set_ylabel(f"{'classes' if classes else 'channels'}, {'lowest value' if sort else 'first'} on top")
    when = {None: "", -1: ", untrained"}.get(result.epoch, f", epoch {result.epoch}")
    axes.set_title(wrap(title_of(result, title or measure) + when, width), fontsize="medium")
    add_colourbar(figure, [axes], scale, measure, height)
    if patches and ax is None:
        figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), frameon=False)
    return figure


def _of_channels(result: InvarianceResult, measure: str, layer: str) -> npt.NDArray[np.float64]:
    """The mean of each channel over its values that are not NaN."""
    values = result.per_channel(measure, layer)
    if bool(values.isnan().any()) and result[measure][layer].ndim > 1:
        axis = result.channel_axis.get(layer, 0)
        values = result[measure][layer].movedim(axis, 0).flatten(1).nanmean(1)
    return values.numpy()


def _draw_cells(axes: Axes, columns: Mapping[str, np.ndarray], dead: Mapping[str, np.ndarray], scale: Scale) -> None:
    """Draw the channels of all layers as one image, whose rows are many enough to divide each layer evenly."""
    height = min(MOST_ROWS, math.lcm(*map(len, columns.values()))) if columns else 1
    rows = {layer: np.arange(height) * len(values) // height for layer, values in columns.items()}
    shown = np.stack([columns[layer][at] for layer, at in rows.items()], 1)
    never = np.stack([dead[layer][at] for layer, at in rows.items()], 1)
    show_cells(axes, shown, scale)
    for mask, colour in ((np.isinf(shown), INFINITE), (never, DEAD)):
        if mask.any():
            over = np.ma.masked_where(~mask, np.ones(mask.shape))
            axes.imshow(over, cmap=ListedColormap([colour]), aspect="auto", interpolation="nearest")
