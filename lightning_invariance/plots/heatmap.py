"""The paper's figure 8: layers × channels."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lightning_invariance.plots.common import (
    DEAD,
    INFINITE,
    add_colourbar,
    colours,
    new_figure,
    scale_of,
    shorten,
    special_patches,
    within,
)
from lightning_invariance.result import InvarianceResult


def heatmap(result: InvarianceResult, measure: str | None = None) -> Figure:
    """Which units are invariant? A column for each layer, a cell for each channel, in the order of the network.

    A cell is the mean over the spatial axes (paper, figure 8). Each column is as high as the figure, however many
    channels its layer has. Infinite values are green, dead units black, NaN grey; the legend counts them.

    Args:
        result: an evaluation.
        measure: its name; by default the first.
    """
    measure = measure or result.measures[0]
    layers = list(result[measure])
    columns = {layer: result.per_channel(measure, layer).numpy() for layer in layers}
    scale = scale_of(measure, [value for values in columns.values() for value in values.tolist()])
    figure = new_figure(width=min(24, max(6, 2.5 + 0.4 * len(layers))), height=5.5)
    axes = figure.add_subplot()
    counts = {"infinite": 0, "dead": 0, "nan": 0}
    for x, (layer, values) in enumerate(columns.items()):
        place = (x - 0.5, x + 0.5, 1, 0)
        shown = within(scale, values)[:, None]
        axes.imshow(shown, aspect="auto", extent=place, norm=scale, cmap=colours(), interpolation="nearest")
        dead = result.dead_channels(layer).numpy()
        masks = {"infinite": np.isinf(values), "dead": dead, "nan": np.isnan(values)}
        for name, mask in masks.items():
            counts[name] += int(mask.sum())
        for mask, colour in ((masks["infinite"], INFINITE), (dead, DEAD)):
            if mask.any():
                over = np.ma.masked_where(~mask, np.ones(len(values)))[:, None]
                axes.imshow(over, aspect="auto", extent=place, cmap=ListedColormap([colour]), interpolation="nearest")
    axes.set_xlim(-0.5, max(len(layers), 1) - 0.5)
    axes.set_ylim(1, 0)
    axes.set_xticks(range(len(layers)), [shorten(layer) for layer in layers], rotation=90)
    axes.set_yticks([])
    axes.set_ylabel("channels, first on top")
    axes.set_title(_title(result, measure))
    for x in range(1, len(layers)):
        axes.axvline(x - 0.5, color="white", linewidth=1)
    add_colourbar(figure, scale, colours(), measure)
    patches = special_patches(**counts)
    if patches:
        figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), frameon=False)
    return figure


def _title(result: InvarianceResult, measure: str) -> str:
    when = {None: "", -1: ", untrained"}.get(result.epoch, f", epoch {result.epoch}")
    return f"{measure}{when}"
