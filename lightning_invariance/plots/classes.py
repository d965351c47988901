"""Heatmap of layers × classes: for which classes is a network invariant?"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_invariance.plots.common import (
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
from lightning_invariance.results.result import InvarianceResult


def classes(
    result: InvarianceResult,
    measure: str | None = None,
    *,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """For which classes is which layer invariant? A column for each layer, a row for each class.

    A cell is the mean over the finite values of the layer for the samples of one class; grey where there are none.

    Args:
        result: an evaluation with :class:`~lightning_invariance.measures.Stratified`.
        measure: its name; by default the first with values by class.
        limits: the ends of the colour scale; see :func:`heatmap`.
        ax: axes to draw into; by default those of a new figure.
        size: width and height of the new figure in inches.

    Raises:
        ValueError: If the result has no values by class.
    """
    found = [name for name in only_one(result) if any(row.by_class for row in result.table(name))]
    if not found or (measure or found[0]) not in found:
        raise ValueError("Expected a result with values by class: measure it with `Stratified(measure, num_classes)`.")
    measure = measure or found[0]
    labels = rows_of_layers([result], measure)
    values = np.array([row.by_class for row in result.table(measure) if row.layer in labels]).T
    scale = scale_of(is_ratio([result], measure), values.ravel().tolist(), limits)
    figure, axes = axes_in(ax, width_of(len(labels)), max(2.5, 1.5 + 0.25 * len(values)), size)
    width, height = inches_of(axes)
    show_cells(axes, values, scale)
    label_layers(axes, "x", labels, width - 0.5, marks_of([result], measure))
    axes.set_yticks(range(len(values)))
    axes.set_ylabel("class")
    axes.set_title(wrap(title_of(result, measure), width), fontsize="medium")
    add_colourbar(figure, [axes], scale, measure, height)
    return figure
