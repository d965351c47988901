"""Lines over the layers of one or more results."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_invariance.plots.common import (
    LINE_COLOURS,
    MARKERS,
    Results,
    depths,
    first_measure,
    is_ratio,
    marks_of,
    named,
    new_figure,
    width_of,
)
from lightning_invariance.plots.labels import in_legend, label_layers, shorten, wrap
from lightning_invariance.results.result import InvarianceResult

#: Layers whose markers do not overlap.
MOST_MARKERS = 60


def layers(
    results: Results, measure: str | None = None, *, dashed: str | Collection[str] = (), depth: bool = False
) -> Figure:
    """Which layers are invariant, and in which network? The mean of each layer, a line for each result.

    The band around a line is one standard deviation of the layer's activations; where a result was measured with
    ``confidence``, bars are the intervals of the means.

    Args:
        results: an evaluation, several, or legend text → evaluation.
        measure: its name; by default the first.
        dashed: legend texts of dashed lines; in the paper, the networks trained without augmentation.
        depth: whether layers are placed by their depth in per cent instead of their names, so that networks with other
            layers compare.
    """
    found = named(results)
    measure = measure or first_measure(found.values())
    dashed = [dashed] if isinstance(dashed, str) else dashed
    figure, axes, places = _axes_of_layers(list(found.values()), measure, depth)
    few = len(found) <= len(LINE_COLOURS)
    longest = 40 if few else 24  # texts of a legend
    for i, ((label, result), x) in enumerate(zip(found.items(), places, strict=True)):
        around, position = divmod(i, len(LINE_COLOURS))
        colour, marker = LINE_COLOURS[position], MARKERS[(position + around) % len(MARKERS)]  # another pair for each
        rows = result.table(measure)
        mean, std = np.array([row.mean for row in rows]), np.array([row.std for row in rows])
        style = "--" if label in dashed else "-"
        size = 4 if len(x) <= MOST_MARKERS else 0
        text = in_legend(shorten(label, longest)) or None
        axes.plot(x, mean, style, color=colour, marker=marker, ms=size, label=text)
        bounds = np.array([(row.mean - row.low, row.high - row.mean) for row in rows])
        if np.isfinite(bounds).any():
            axes.errorbar(x, mean, bounds.T, fmt="none", ecolor=colour, capsize=3)
        low = np.maximum(mean - std, 0) if (mean[np.isfinite(mean)] >= 0).all() else mean - std
        axes.fill_between(x, low, mean + std, color=colour, alpha=0.12, linewidth=0)
    if len(found) > 1:
        axes.legend(fontsize=None if few else "x-small", ncols=1 if few else 2 + len(found) // 24)
    if is_ratio(found.values(), measure):
        axes.set_ylim(bottom=0)
    return figure


def stability(results: Results, measure: str | None = None, *, depth: bool = False) -> Figure:
    """Does another seed give another picture? A thin line for each result, their mean, and standard deviations.

    As in the paper's figures 17 to 22: the dashed line is the mean over the results, bars are their standard deviation
    (n − 1). Bands are the confidence intervals over samples of those that have them.

    Args:
        results: evaluations of networks with the same layers; with ``depth``, of as many layers.
        measure: its name; by default the first.
        depth: whether layers are placed by their depth in per cent instead of their names.
    """
    found = named(results)
    measure = measure or first_measure(found.values())
    figure, axes, places = _axes_of_layers(list(found.values()), measure, depth)
    lines: dict[float, list[float]] = {}
    for result, x in zip(found.values(), places, strict=True):
        means = list(result.per_layer(measure).values())
        axes.plot(x, means, "-", color="#0072b2", alpha=0.45, linewidth=1, label="_each")
        rows = result.table(measure)
        low, high = [row.low for row in rows], [row.high for row in rows]
        if np.isfinite(low).any():
            axes.fill_between(x, low, high, color="#0072b2", alpha=0.1, linewidth=0)
        for place, value in zip(x.tolist(), means, strict=True):
            lines.setdefault(place, []).append(value)
    at = sorted(lines)
    mean = [float(np.mean(lines[place])) for place in at]
    std = [float(np.std(lines[place], ddof=1)) if len(lines[place]) > 1 else 0.0 for place in at]
    label = f"mean and standard deviation of {len(found)}"
    axes.errorbar(at, mean, std, fmt="--", color="#d55e00", capsize=3, linewidth=2, label=label)
    axes.legend()
    if is_ratio(found.values(), measure):
        axes.set_ylim(bottom=0)
    return figure


def _axes_of_layers(
    results: Sequence[InvarianceResult], measure: str, depth: bool
) -> tuple[Figure, Axes, list[npt.NDArray[np.float64]]]:
    """A figure, its axes with the layers below, and the places of the layers of each result."""
    names = list(dict.fromkeys(layer for result in results for layer in result[measure]))
    width = 7 if depth else width_of(len(names))
    figure = new_figure(width, 4.5)
    axes = figure.add_subplot()
    if depth:
        axes.set_xlabel("depth of the layer in %")
        places = [depths(len(result[measure])) for result in results]
    else:
        label_layers(axes, "x", names, width - 1.5, marks_of(results, measure))
        axes.set_xlim(-0.6, len(names) - 0.4)
        index = {name: i for i, name in enumerate(names)}
        places = [np.array([index[name] for name in result[measure]], dtype=np.float64) for result in results]
    axes.set_ylabel(wrap(f"{measure}\nmean of the layer", 3))
    better = {True: "higher is more invariant", False: "lower is more invariant", None: ""}
    axes.set_title(better[results[0].higher_is_better.get(measure)], fontsize="medium")
    axes.grid(alpha=0.3)
    return figure, axes, places
