"""Response: a measure against the parameter of the transformations, such as the angle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_invariance.messages import instead_of
from lightning_invariance.plots.common import (
    LINE_COLOURS,
    MARKERS,
    add_colourbar,
    depth_colours,
    evenly,
    first_measure,
    inches_of,
    is_ratio,
    key_of_layers,
    marks_of,
    new_axes,
    new_figure,
    only_one,
    rows_of_layers,
    scale_of_response,
    show_cells,
    title_of,
    within,
)
from lightning_invariance.plots.labels import SMALL, in_legend, label_layers, shorten, without_prefix, wrap
from lightning_invariance.results.result import InvarianceResult

#: The largest number of labels below an axis, of lines that can be told apart, and of maps in a figure.
MOST_LABELS, MOST_LINES, MOST_MAPS = 32, 24, 12

#: The width of a figure of lines or rows, and of a map with the room around it, in inches.
WIDTH, MAP = 8.0, 2.15

#: The height of lines, the largest height of all rows, and the room above and below them, in inches.
HEIGHT, HIGHEST, BESIDE = 3.6, 11.0, 1.0

#: The height of a letter of a label that is turned, in inches.
TURNED = 0.08


def response(
    result: InvarianceResult,
    measure: str | None = None,
    layers: Sequence[str] | None = None,
    *,
    limits: tuple[float, float] | None = None,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Which angles break it? How much each transformation changes each layer, against its parameter.

    The change is from the value under the identity, and so 0 there. A line for each layer, dark for the first and light
    for the last, with a band where it has an interval; points where transformations are categories; for more than two
    dozen layers a row of colours for each. For two parameters, such as the shifts of translations, a map for each
    layer.
    Neighbours whose values agree share a line. Above lines and rows stand the metrics of ``evaluate(outputs=...)``,
    such as the accuracy, with bands where they have intervals. The values are defined at
    :meth:`NormalizedVariance.response_of <lightning_invariance.measures.NormalizedVariance.response_of>`.

    Args:
        result: an evaluation with ``NormalizedVariance(response=True)`` or ``TransformationVariance(response=True)``.
        measure: its name; by default the first that has a response.
        layers: which layers; by default all, and of maps a dozen evenly spread over the depth.
        limits: the ends of the colour scale of rows and maps, by default from 0 to the largest value.
        title: the name in the title; by default the measure's.
        size: width and height of the figure in inches.

    Raises:
        ValueError: If the result has no response, or not of these layers.
    """
    if not only_one(result).response:
        raise ValueError(
            "Expected a result that tells what each transformation does, but it does not: measure it with"
            " `NormalizedVariance(response=True)`."
        )
    measure = measure or (m if (m := first_measure([result])) in result.response else next(iter(result.response)))
    if measure not in result.response:
        raise ValueError(f"Expected a measure with a response, {list(result.response)}, but got {measure!r}.")
    found = result.response[measure]
    for layer in layers or ():
        if layer not in found:
            raise ValueError(f"Expected layers of the result, but got {layer!r}. {instead_of(layer, found, 'It has')}")
    labels = rows_of_layers([result], measure) if layers is None else {layer: layer for layer in layers}
    look = _Look(measure, labels, title or measure, limits, size)
    lines = {layer: np.array(found[layer]) for layer in labels if layer in found}
    varying = {name: np.array(values) for name, values in result.parameters.items() if len(set(values)) > 1}
    if len(varying) == 2:
        return _maps(result, lines, varying, look)
    if len(varying) != 1:
        varying = {"transformation": np.arange(len(result.transformations))}
    ((name, x),) = varying.items()
    if len(lines) > MOST_LINES:
        return _rows(result, lines, name, np.argsort(x, kind="stable"), look)
    return _lines(result, lines, name, x, look)


class _Look(NamedTuple):
    """Measure, layer → label, name in the title, ends of the colour scale, and size of the figure."""

    measure: str
    labels: dict[str, str]
    title: str
    limits: tuple[float, float] | None
    size: tuple[float, float] | None


def _change(result: InvarianceResult) -> str:
    """The name of what a response shows."""
    return f"change from {result.identity}" if result.identity else "change from the mean"


def _lines(result: InvarianceResult, lines: dict[str, np.ndarray], name: str, x: np.ndarray, look: _Look) -> Figure:
    """A line for each layer against the parameter of this name with the values ``x``."""
    order, measure = np.argsort(x, kind="stable"), look.measure
    categories = name == "transformation"
    figure, axes = _new_axes(result, HEIGHT, name, x[order], order, categories, look.size)
    for (layer, values), colour in zip(lines.items(), depth_colours(len(lines)), strict=True):
        style = "o" if categories else "o-" if len(x) <= MOST_LABELS else "-"
        size = 5 if categories else 3
        axes.plot(
            x[order], values[order], style, color=colour, ms=size, linewidth=1.2, label=in_legend(look.labels[layer])
        )
        if categories:
            continue
        if (bounds := result.response_bounds.get(measure, {}).get(layer)) is not None:
            low, high = np.array(bounds)[:, order]
            axes.fill_between(x[order], low, high, color=colour, alpha=0.2, linewidth=0)
    if name == "angle":
        axes.xaxis.set_major_locator(MaxNLocator(9, steps=[1.5, 3, 4.5, 9, 10]))
    axes.set_ylabel(wrap(_change(result), HEIGHT))
    note = title_of(result, look.title)
    if is_ratio([result], measure):
        note += "\n0: the layer does not notice; 1: as large a change as to another sample"
    if measure in result.response_bounds and result.confidence is not None:
        note += f"\nbands: {result.confidence:.0%} intervals over samples"
    axes.set_title(wrap(note, inches_of(axes)[0], SMALL), fontsize=SMALL)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    key_of_layers(figure, [axes], [look.labels[layer] for layer in lines])
    return figure


def _rows(
    result: InvarianceResult,
    lines: dict[str, np.ndarray],
    name: str,
    order: np.ndarray,
    look: _Look,
) -> Figure:
    """A row for each layer, a column for each transformation, in the order of the parameter of this name."""
    values = np.stack([*lines.values()])[:, order]
    scale = scale_of_response(values.ravel().tolist(), look.limits)
    height = min(HIGHEST, 0.16 * len(lines))
    figure, axes = _new_axes(result, height, name, np.arange(len(order)), order, True, look.size)
    height = inches_of(axes)[1]
    show_cells(axes, values, scale)
    labels = {layer: look.labels[layer] for layer in lines}
    found = label_layers(axes, "y", labels, height, marks_of([result], look.measure))
    if len(found) < len(lines):
        axes.hlines([block.start - 0.5 for block in found[1:]], -0.5, len(order) - 0.5, "white", linewidth=0.5)
    figure.suptitle(wrap(title_of(result, look.title), WIDTH), fontsize="medium")
    add_colourbar(figure, [axes], scale, _change(result), height)
    return figure


def _new_axes(
    result: InvarianceResult,
    height: float,
    name: str,
    x: np.ndarray,
    order: np.ndarray,
    labelled: bool,
    size: tuple[float, float] | None,
) -> tuple[Figure, Axes]:
    """A figure with axes for the layers, above them metrics of predictions with bands where they have intervals.

    Args:
        result: an evaluation.
        height: of the axes for the layers, in inches.
        name: of the parameter along x.
        x: where transformations stand.
        order: of the transformations along x.
        labelled: whether they are named below.
        size: of the figure, where the user wants one.
    """
    most = MOST_LABELS if size is None else max(2, round(3 * size[0]))
    ticks = range(0, len(order), -(-len(order) // most)) if labelled else ()
    labels = [shorten(result.transformations[order[j]], 16) for j in ticks]
    title = next(iter(result.outputs)) if len(result.outputs) == 1 else "outputs" if result.outputs else None
    figure, above, axes = new_axes(WIDTH, height + BESIDE + TURNED * max(map(len, labels), default=0), title, size)
    axes.set_xlabel("angle in degrees, counter-clockwise" if name == "angle" else name)
    if labelled:
        axes.set_xticks(ticks, labels, rotation=90, parse_math=False)
    if above is None:
        return figure, axes
    for (metric, found), colour, mark in zip(result.outputs.items(), cycle(LINE_COLOURS), cycle(MARKERS), strict=False):
        values, text = np.array(found.values)[order], in_legend(shorten(metric))
        above.plot(x, values, marker=mark, color=colour, ms=3, label=text)
        if found.low:
            low, high = (np.array(bounds)[order] for bounds in (found.low, found.high))
            above.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
    if len(result.outputs) > 1:
        above.legend(fontsize="small")
    return figure, axes


def _maps(
    result: InvarianceResult,
    lines: dict[str, np.ndarray],
    varying: dict[str, np.ndarray],
    look: _Look,
) -> Figure:
    """A map over two parameters for each layer."""
    chosen = [*lines]
    chosen = [chosen[i] for i in evenly(len(chosen), MOST_MAPS)]
    (name_x, x), (name_y, y) = varying.items()
    scale = scale_of_response([v for layer in chosen for v in lines[layer].tolist()], look.limits)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(MAP * columns + 1.9, MAP * rows + 0.5, look.size)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel().tolist()
    places = np.stack([x / np.ptp(x), y / np.ptp(y)], 1)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    size = min(16.0, 85 * float(apart[apart > 0].min()))  # in points: markers do not touch
    titles = without_prefix([look.labels[layer] for layer in chosen])[1]
    looks: dict[str, Any] = {"norm": scale.norm, "cmap": scale.colours, "plotnonfinite": True, "linewidths": 0}
    for i, (layer, title) in enumerate(zip(chosen, titles, strict=True)):
        grid[i].scatter(x, y, size**2, within(scale.norm, lines[layer]), marker="s", **looks)
        grid[i].set_title(shorten(title), fontsize="small")
        grid[i].tick_params(labelbottom=i + columns >= len(chosen))
    for axes in grid[len(chosen) :]:
        axes.remove()
    grid[0].margins(0.15)
    if name_y == "y":  # downwards, as in images
        grid[0].invert_yaxis()
    figure.supxlabel(name_x, fontsize="medium")
    figure.supylabel(name_y, fontsize="medium")
    add_colourbar(figure, grid[: len(chosen)], scale, _change(result), MAP * rows)
    return figure
