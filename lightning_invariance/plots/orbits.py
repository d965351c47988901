"""Orbits of channels, and the permutations that they come from."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lightning_invariance.plots.common import new_figure, only_one
from lightning_invariance.plots.feature_maps import MOST_COLUMNS, show_picture
from lightning_invariance.plots.labels import shorten
from lightning_invariance.results.result import InvarianceResult

#: The largest numbers of transformations, and of channels of an orbit, in a figure.
MOST_PERMUTATIONS, MOST_ROWS = 8, 8


def orbits(
    result: InvarianceResult, layer: str, maps: Tensor | None = None, orbit: int = 0, least: float = 0.5
) -> Figure:
    """Which channels do the transformations permute among each other?

    One panel for each transformation: column c, row c' is filled where channel c of f(x) goes to channel c' of f(t x),
    the darker the better it explains it (R² from 0 to 1). Channels are sorted by orbit, and orbits are framed: an orbit
    that the transformations permute is a block on the diagonal; channels of no orbit stand at the end.

    Args:
        result: an evaluation with ``ChannelEquivariance(channels="permutation")``.
        layer: one of ``result.channel_maps``.
        maps: the layer's maps of one sample, ``(m, channels, height, width)``, as
            :class:`~lightning_invariance.measures.STTensor` collects them: adds the maps of one orbit under each
            transformation, which are copies of each other, turned.
        orbit: which orbit, a position in ``result.orbits(layer)``.
        least: see :meth:`InvarianceResult.orbits`.

    Raises:
        ValueError: If ``maps`` has another shape, or the layer no such orbit.
        KeyError: If the layer has no channel maps.
    """
    result = only_one(result)
    found = result.orbits(layer, least)
    goes = result.channel_maps[layer].numpy()
    m, channels = goes.shape
    scores = next(
        layers[layer]["scores"] for layers in result.details.values() if "channel_map" in layers.get(layer, {})
    )
    if maps is not None and (maps.ndim != 4 or maps.shape[:2] != (m, channels)):
        raise ValueError(
            f"Expected argument `maps` of shape ({m}, {channels}, height, width), but got {tuple(maps.shape)}."
        )
    if maps is not None and not 0 <= orbit < len(found):
        raise ValueError(f"Expected argument `orbit` to be one of {len(found)} orbits of {layer!r}, but got {orbit}.")
    order = [channel for each in found for channel in each.channels]
    order += sorted({*range(channels)} - {*order})
    place = np.argsort(order)
    columns = np.unique(np.linspace(0, m - 1, min(m, MOST_PERMUTATIONS)).round().astype(int))
    shown = [] if maps is None else list(found[orbit].channels[:MOST_ROWS])
    of_maps = np.unique(np.linspace(0, m - 1, min(m, MOST_COLUMNS)).round().astype(int)) if shown else columns
    width, heights = 1.4 * len(columns) + 1.2, [2.0, 0.8 * len(shown)] if shown else [2.0]
    figure = new_figure(max(width, 0.8 * len(of_maps) + 1.4), sum(heights) + 0.5)
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    grid = parts[0].subplots(1, len(columns), squeeze=False)[0]
    for axes, j in zip(grid, columns, strict=True):
        picture = np.zeros((channels, channels))
        picture[place[goes[j]], place] = np.clip(np.nan_to_num(scores.numpy()[j][goes[j]]), 0.08, 1)
        axes.imshow(picture, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        first = 0
        for each in found:
            size = len(each.channels)
            corner = (first - 0.5, first - 0.5)
            axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor="tab:orange", linewidth=0.8))
            first += size
        axes.set_title(shorten(result.transformations[j], 10), fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    grid[0].set_ylabel("channel of f(t x)", fontsize=9)
    grid[0].set_xlabel("channel of f(x)", fontsize=9)
    if maps is not None:
        rows = parts[1].subplots(len(shown), len(of_maps), squeeze=False)
        numbers = maps.detach().cpu().double().numpy()[:, shown]
        for row, channel, of_channel in zip(rows, shown, numbers.swapaxes(0, 1), strict=True):
            for axes, j in zip(row, of_maps, strict=True):
                show_picture(axes, of_channel[j], (float(numbers.min()), float(numbers.max())))
            row[0].set_ylabel(f"map {channel}", rotation=0, ha="right", va="center", fontsize=9)
        for axes, j in zip(rows[0], of_maps, strict=True):
            axes.set_title(shorten(result.transformations[j], 10), fontsize=9)
    figure.suptitle(f"{shorten(layer)}: {str(found).splitlines()[-1]}", fontsize="medium")
    return figure
