"""Feature maps of one layer as images."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_invariance.messages import given
from lightning_invariance.plots.common import new_figure, only_one
from lightning_invariance.plots.labels import shorten
from lightning_invariance.results.result import InvarianceResult

#: The largest number of transformations in a figure.
MOST_COLUMNS = 16


def feature_maps(
    result: InvarianceResult,
    layer: str,
    inputs: Tensor,
    maps: Tensor,
    measure: str | None = None,
    k: int = 3,
) -> Figure:
    """What do the most and the least invariant maps of a layer see? Each of them under each transformation.

    The first row is the input. Each map has a grey scale of its own, the same in all columns, so that what changes
    from column to column is what the transformation changes. Dead, infinite and undefined maps are left out.

    Args:
        result: an evaluation of the network.
        layer: the name of a layer with feature maps.
        inputs: one sample under every transformation, ``(m, channels, height, width)``, such as ``rotations(8)(x)[0]``.
        maps: the layer's maps of it, ``(m, maps, height, width)``, as :class:`~lightning_invariance.measures.STTensor`
            collects them: ``evaluate(model, x, rotations(8), STTensor())["STTensor"][layer][0]``.
        measure: its name; by default the first.
        k: how many maps of each kind; fewer where the layer has few.

    Raises:
        ValueError: If a tensor has another shape, or no map has a finite value.
        TypeError: If ``result`` is no result, or ``layer`` no name.
    """
    result = only_one(result)
    if not isinstance(layer, str):
        raise TypeError(f"Expected argument `layer` to be the name of a layer, but got {given(layer)}.")
    measure = measure or result.measures[0]
    values = result.per_channel(measure, layer).numpy()
    m = len(result.transformations)
    for name, tensor, shape in (("inputs", inputs, (m, "channels")), ("maps", maps, (m, len(values)))):
        if tensor.ndim != 4 or len(tensor) != m or (name == "maps" and tensor.shape[1] != len(values)):
            raise ValueError(
                f"Expected argument `{name}` of shape ({shape[0]}, {shape[1]}, height, width), but got"
                f" {tuple(tensor.shape)}."
            )
    ranked = [i for i in np.argsort(values) if np.isfinite(values[i]) and not result.dead_channels(layer)[i]]
    if not ranked:
        raise ValueError(f"Expected layer {layer!r} to have maps with a finite {measure}, but it has none.")
    if result.higher_is_better.get(measure):
        ranked = ranked[::-1]
    k = min(k, max(1, len(ranked) // 2))
    rows = [(i, "most") for i in ranked[:k]] + [(i, "least") for i in ranked[max(k, len(ranked) - k) :]]
    columns = np.unique(np.linspace(0, m - 1, min(m, MOST_COLUMNS)).round().astype(int))
    figure = new_figure(1.9 + 0.85 * len(columns), 0.7 + 0.85 * (len(rows) + 1))
    grid = figure.subplots(len(rows) + 1, len(columns), squeeze=False)
    pictures = _as_pictures(inputs.detach().cpu().double().numpy())
    for axes, j in zip(grid[0], columns, strict=True):
        show_picture(axes, pictures[j], None)
        axes.set_title(shorten(result.transformations[j], 10), fontsize=9)
    grid[0, 0].set_ylabel("input", rotation=0, ha="right", va="center")
    numbers = maps.detach().cpu().double().numpy()
    for row, (channel, kind) in zip(grid[1:], rows, strict=True):
        shown = numbers[:, channel]
        for axes, j in zip(row, columns, strict=True):
            show_picture(axes, shown[j], (float(shown.min()), float(shown.max())))
        text = f"{kind}: map {channel}\n{values[channel]:.3g}"
        row[0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(f"{shorten(layer)}: most and least invariant maps by {measure}", fontsize="medium")
    return figure


def _as_pictures(inputs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Turn inputs ``(m, channels, height, width)`` into grey or RGB pictures with values in [0, 1]."""
    inputs = (inputs - inputs.min()) / (np.ptp(inputs) or 1)
    found: npt.NDArray[np.float64] = inputs.transpose(0, 2, 3, 1) if inputs.shape[1] == 3 else inputs.mean(1)
    return found


def show_picture(axes: Axes, picture: npt.NDArray[np.float64], limits: tuple[float, float] | None) -> None:
    """Show a grey or RGB picture without ticks."""
    low, high = limits or (0.0, 1.0)
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high if high > low else low + 1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
