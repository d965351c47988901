"""The measure against the parameter of the transformation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_invariance.messages import instead_of
from lightning_invariance.plots.bars import ROOM, add_colourbar, key_of_layers, room_of_key
from lightning_invariance.plots.cells import show_cells
from lightning_invariance.plots.common import (
    ABOVE,
    LINES,
    NUMBERS,
    align_above,
    axes_at,
    axes_below,
    colours,
    depth_colours,
    first_measure,
    is_ratio,
    marks_of,
    new_figure,
    only_one,
    scale_of,
    within,
    write_title,
)
from lightning_invariance.plots.labels import LayerLabels, in_legend, shorten, without_prefix
from lightning_invariance.plots.text import fitting, inches_of
from lightning_invariance.results.result import InvarianceResult

#: Labels that fit below an axis.
MOST_LABELS = 32

#: Lines that can be told apart.
MOST_LINES = 24

#: The width of the figure; below axes without the labels of transformations, above them, and between those of layers
#: and of outputs; of a map with what is beside it, and between maps; in inches.
WIDTH, BELOW, TOP, APART, MAP, BETWEEN = 8.0, 0.5, 0.35, 0.13, 2.15, 0.3

#: The largest height of all rows together, in inches.
HIGHEST = 11.0

AXIS_OF_ANGLES = "angle in degrees, counter-clockwise"

#: Maps that fit into one figure.
MOST_MAPS = 12


def response(
    result: InvarianceResult,
    measure: str | None = None,
    layers: Sequence[str] | None = None,
    *,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Which angles break it? What each transformation does to each layer, against its parameter.

    A line for each layer, dark for the first and light for the last, with a band where it has an interval; for more
    than two dozen layers a row of colours for each. For two parameters, such as the shifts of translations, a map for
    each layer. Above lines and rows stands what ``evaluate(outputs=...)`` found, such as the accuracy, with bands where
    it has intervals. What is drawn is said at
    :meth:`NormalizedVariance.response_of <lightning_invariance.measures.NormalizedVariance.response_of>`.

    Args:
        result: an evaluation with ``NormalizedVariance(response=True)`` or ``TransformationVariance(response=True)``.
        measure: its name; by default the first that has a response.
        layers: which layers; by default all, and of maps a dozen evenly spread over the depth.
        limits: the ends of the colour scale of rows and maps; see :func:`heatmap`.

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
    lines = {layer: np.array(found[layer]) for layer in layers or found}
    varying = {name: np.array(values) for name, values in result.parameters.items() if len(set(values)) > 1}
    if len(varying) == 2:
        return _maps(result, lines, varying, measure, limits)
    if len(lines) > MOST_LINES:
        return _rows(result, lines, varying, measure, limits)
    return _lines(result, lines, varying, measure)


def _lines(
    result: InvarianceResult, lines: dict[str, np.ndarray], varying: dict[str, np.ndarray], measure: str
) -> Figure:
    count = len(result.transformations)
    name, x, order = _ordered(result, varying)
    ticks = range(0, count, -(-count // MOST_LABELS)) if name == "transformation" else ()
    labels = [shorten(result.transformations[j], 16) for j in ticks]
    left, bottom = NUMBERS + 0.15, BELOW + inches_of(labels)
    width, height = WIDTH - left - room_of_key([*lines]), 3.6
    figure = new_figure(WIDTH, bottom + height + TOP + (ABOVE + TOP if result.outputs else 0), layout=None)
    above, axes = axes_below(figure, left, bottom, width, height, TOP if result.outputs else None)
    for (layer, values), colour in zip(lines.items(), depth_colours(len(lines)), strict=True):
        style = "o-" if count <= MOST_LABELS else "-"
        axes.plot(x[order], values[order], style, color=colour, ms=3, linewidth=1.2, label=in_legend(layer))
        if (bounds := result.response_bounds.get(measure, {}).get(layer)) is not None:
            low, high = np.array(bounds)[:, order]
            axes.fill_between(x[order], low, high, color=colour, alpha=0.2, linewidth=0)
    if name == "transformation":
        axes.set_xticks(ticks, labels, rotation=90, parse_math=False)
    elif name == "angle":
        axes.set_xticks(_angles(x))
    axes.set_xlabel(AXIS_OF_ANGLES if name == "angle" else name)
    about = f"{measure}\nof one transformation"
    axes.set_ylabel(about, fontsize=fitting(about, height))
    if is_ratio([result], measure):
        title = (
            "0: the layer does not notice; 1: as large a change as to another sample"
            if (np.stack([*lines.values()]) == 0).all(0).any()
            else "change from the mean over the transformations; 1: as large as to another sample"
        )
        axes.set_title(title, fontsize=fitting(title, width))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if above is not None:
        _draw_outputs(above, axes, result, x[order], order)
    key_of_layers([axes], [*lines])
    return figure


def _rows(
    result: InvarianceResult,
    lines: dict[str, np.ndarray],
    varying: dict[str, np.ndarray],
    measure: str,
    limits: tuple[float, float] | None,
) -> Figure:
    """A row for each layer, a column for each transformation, in the order of the parameter."""
    names, values = [*lines], np.stack([*lines.values()])
    scale = scale_of(is_ratio([result], measure), values.ravel().tolist(), limits)
    name, _, order = _ordered(result, varying)
    ticks = range(0, len(order), -(-len(order) // MOST_LABELS))
    below = [shorten(result.transformations[order[j]], 16) for j in ticks]
    height, bottom = min(HIGHEST, 0.16 * len(names)), BELOW + inches_of(below)
    labels = LayerLabels(names, height, marks_of([result], measure))
    left = max(labels.room, NUMBERS)
    figure = new_figure(WIDTH, bottom + height + TOP + (ABOVE + APART if result.outputs else 0), layout=None)
    above, axes = axes_below(figure, left, bottom, WIDTH - left - ROOM, height, APART if result.outputs else None)
    show_cells(axes, within(scale, values[:, order]), scale, colours())
    labels.write(axes, "y")
    if len(labels.blocks) < len(names):
        labels.draw_borders(axes, "y")
    axes.set_xticks(ticks, below, rotation=90, parse_math=False)
    axes.set_xlabel(AXIS_OF_ANGLES if name == "angle" else name)
    if above is not None:
        _draw_outputs(above, axes, result, np.arange(len(order)), order)
    write_title(figure, f"{measure} of one transformation")
    add_colourbar([axes], scale, measure)
    return figure


def _draw_outputs(above: Axes, axes: Axes, result: InvarianceResult, x: np.ndarray, order: np.ndarray) -> None:
    """Draw what the output is worth under each transformation above the axes of the layers.

    Args:
        above: where.
        axes: those of the layers.
        result: an evaluation.
        x: where transformations stand.
        order: of the transformations.
    """
    align_above(above, axes, next(iter(result.outputs)) if len(result.outputs) == 1 else "output")
    for (name, found), (colour, marker) in zip(result.outputs.items(), cycle(LINES), strict=False):
        above.plot(x, np.array(found.values)[order], marker=marker, color=colour, ms=3, label=in_legend(shorten(name)))
        if found.low:
            low, high = (np.array(bounds)[order] for bounds in (found.low, found.high))
            above.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
    if len(result.outputs) > 1:
        above.legend(fontsize="small")


def _ordered(result: InvarianceResult, varying: dict[str, np.ndarray]) -> tuple[str, np.ndarray, np.ndarray]:
    """The parameter that varies, its values, and the order of the transformations along it."""
    places = np.arange(len(result.transformations))
    name, x = next(iter(varying.items())) if len(varying) == 1 else ("transformation", places)
    return name, x, np.argsort(x, kind="stable")


def _angles(x: np.ndarray) -> np.ndarray:
    """Round angles between the smallest and the largest."""
    step = next(step for step in (15, 30, 45, 90, 180) if step * 9 > np.ptp(x))
    return np.arange(np.ceil(x.min() / step) * step, x.max() + 1, step)


def _maps(
    result: InvarianceResult,
    lines: dict[str, np.ndarray],
    varying: dict[str, np.ndarray],
    measure: str,
    limits: tuple[float, float] | None,
) -> Figure:
    chosen = [*lines]
    if len(chosen) > MOST_MAPS:
        chosen = [chosen[round(i)] for i in np.linspace(0, len(chosen) - 1, MOST_MAPS)]
    (name_x, x), (name_y, y) = varying.items()
    scale = scale_of(is_ratio([result], measure), [v for layer in chosen for v in lines[layer].tolist()], limits)
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(NUMBERS + MAP * columns + ROOM, BELOW + MAP * rows + 0.05, layout=None)
    # Markers as large as the smallest distance between two of them allows.
    places = np.stack([x / np.ptp(x), y / np.ptp(y)], 1)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    size = min(16.0, 0.85 * 72 * 1.6 * float(apart[apart > 0].min()) / 1.15)
    limits_x, limits_y = (
        (values.min() - 0.15 * np.ptp(values), values.max() + 0.15 * np.ptp(values)) for values in (x, y)
    )
    maps = []
    for i, (layer, title) in enumerate(zip(chosen, map(shorten, without_prefix(chosen)[1]), strict=True)):
        row, column = divmod(i, columns)
        bottom = BELOW + MAP * (rows - 1 - row)
        axes = axes_at(figure, NUMBERS + MAP * column, bottom, MAP - BETWEEN, MAP - BETWEEN)
        shown = within(scale, lines[layer])
        axes.scatter(x, y, size**2, shown, marker="s", norm=scale, cmap=colours(), plotnonfinite=True, linewidths=0)
        axes.set_title(title, fontsize=fitting(title, MAP - 0.1))
        axes.set_xlim(limits_x)
        axes.set_ylim(limits_y[::-1] if name_y == "y" else limits_y)  # that of images: down
        # Ticks take longer than all else, and are the same in all maps.
        if column == 0:
            axes.set_ylabel(name_y)
        else:
            axes.set_yticks([])
        if i + columns >= len(chosen):
            axes.set_xlabel(name_x)
        else:
            axes.set_xticks([])
        maps.append(axes)
    add_colourbar(maps, scale, f"{measure} of one transformation")
    return figure
