"""Lines over the layers of one or more results."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_invariance.plots.common import (
    LINE_COLOURS,
    MARKERS,
    Results,
    axes_in,
    depths,
    first_measure,
    inches_of,
    is_ratio,
    marks_of,
    named,
    rows_of_layers,
    width_of,
)
from lightning_invariance.plots.labels import SMALL, in_legend, label_layers, shorten, wrap
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.results.table import LayerStatistics

#: Axes that are narrower, in inches, have a short title: a column of a paper.
NARROW = 4.0

#: Layers whose markers do not overlap.
MOST_MARKERS = 60


def layers(
    results: Results,
    measure: str | None = None,
    *,
    dashed: str | Collection[str] = (),
    depth: bool = False,
    ax: Axes | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Which layers are invariant, and in which network? The mean of each layer, a line for each result.

    The band around a line is one standard deviation of the layer's activations; where a result was measured with
    ``confidence``, bars are the intervals of the means. Neighbours whose values agree share a place, ``conv1 + bn1``.

    Args:
        results: an evaluation, several, or legend text → evaluation.
        measure: its name; by default the first.
        dashed: legend texts of dashed lines; in the paper, the networks trained without augmentation.
        depth: whether layers are placed by their depth in per cent instead of their names, so that networks with other
            layers compare.
        ax: axes to draw into; by default a new figure is made.
        size: width and height of the new figure in inches.
    """
    found = named(results)
    measure = measure or first_measure(found.values())
    dashed = [dashed] if isinstance(dashed, str) else dashed
    figure, axes, tables, places = _axes_of_layers(list(found.values()), measure, depth, ax, size)
    few = len(found) <= len(LINE_COLOURS)
    longest = 40 if few else 24  # texts of a legend
    bars = False
    for i, (label, rows, x) in enumerate(zip(found, tables, places, strict=True)):
        around, position = divmod(i, len(LINE_COLOURS))
        colour, marker = LINE_COLOURS[position], MARKERS[(position + around) % len(MARKERS)]  # another pair for each
        mean, std = np.array([row.mean for row in rows]), np.array([row.std for row in rows])
        style = "--" if label in dashed else "-"
        points = 4 if len(x) <= MOST_MARKERS else 0
        text = in_legend(shorten(label, longest)) or None
        axes.plot(x, mean, style, color=colour, marker=marker, ms=points, label=text)
        ends = np.array([(row.low, row.high) for row in rows])
        if np.isfinite(ends).any():  # which, without the bias of few samples, may leave out the mean
            axes.errorbar(x, ends.mean(1), np.diff(ends)[:, 0] / 2, fmt="none", ecolor=colour, capsize=3)
            bars = True
        low = np.maximum(mean - std, 0) if (mean[np.isfinite(mean)] >= 0).all() else mean - std
        axes.fill_between(x, low, mean + std, color=colour, alpha=0.12, linewidth=0)
    level = next(iter(found.values())).confidence or 0.95
    if inches_of(axes)[0] >= NARROW:
        _add_to_title(
            axes, "band: standard deviation of the units" + f"; bars: {level:.0%} intervals over samples" * bars
        )
    if len(found) > 1:
        axes.legend(fontsize=None if few else "x-small", ncols=1 if few else 2 + len(found) // 24)
    if is_ratio(found.values(), measure):
        axes.set_ylim(bottom=0)
    return figure


def stability(
    results: Results,
    measure: str | None = None,
    *,
    depth: bool = False,
    ax: Axes | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Does another seed give another picture? A thin line for each result, their mean, and standard deviations.

    As in the paper's figures 17 to 22: the dashed line is the mean over the results, bars are their standard deviation
    (n − 1). Bands are the confidence intervals over samples of those that have them.

    Args:
        results: evaluations of networks with the same layers; with ``depth``, of as many layers.
        measure: its name; by default the first.
        depth: whether layers are placed by their depth in per cent instead of their names.
        ax: axes to draw into; by default a new figure is made.
        size: width and height of the new figure in inches.
    """
    found = named(results)
    measure = measure or first_measure(found.values())
    figure, axes, tables, places = _axes_of_layers(list(found.values()), measure, depth, ax, size)
    lines: dict[float, list[float]] = {}
    for rows, x in zip(tables, places, strict=True):
        means = [row.mean for row in rows]
        axes.plot(x, means, "-", color="#0072b2", alpha=0.45, linewidth=1, label="_each")
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
    if any(result.confidence for result in found.values()):
        _add_to_title(axes, "bands: intervals over samples")
    if is_ratio(found.values(), measure):
        axes.set_ylim(bottom=0)
    return figure


def _axes_of_layers(
    results: Sequence[InvarianceResult],
    measure: str,
    depth: bool,
    ax: Axes | None,
    size: tuple[float, float] | None,
) -> tuple[Figure, Axes, list[list[LayerStatistics]], list[npt.NDArray[np.float64]]]:
    """A figure, its axes with the layers below, and the layers of each result that are drawn and their places."""
    labels = rows_of_layers(results, measure)
    figure, axes = axes_in(ax, 7 if depth else width_of(len(labels)), 4.5, size)
    tables = [[row for row in result.table(measure) if row.layer in labels or depth] for result in results]
    if depth:
        axes.set_xlabel("depth of the layer in %")
        places = [depths(len(rows)) for rows in tables]
    else:
        label_layers(axes, "x", labels, inches_of(axes)[0], marks_of(results, measure))
        axes.set_xlim(-0.6, len(labels) - 0.4)
        index = {layer: i for i, layer in enumerate(labels)}
        places = [np.array([index[row.layer] for row in rows], dtype=np.float64) for rows in tables]
    axes.set_ylabel(wrap(f"{measure}\nmean of the layer", inches_of(axes)[1]))
    better = {True: "higher", False: "lower"}.get(results[0].higher_is_better.get(measure))  # type: ignore[arg-type]
    axes.set_title(f"{better} is more {results[0].quality(measure)}" if better else "", fontsize="medium")
    if (floor := results[0].floor.get(measure)) is not None and bool(floor.isfinite().any()):
        value = float(floor[floor.isfinite()].mean())
        axes.axhline(value, color="black", linestyle=":", linewidth=1, zorder=0)
        at: Any = ("axes fraction", "data")
        axes.annotate("interpolation alone", (1, value), xycoords=at, ha="right", va="bottom", fontsize=SMALL)
    axes.grid(alpha=0.3)
    return figure, axes, tables, places


def _add_to_title(axes: Axes, note: str) -> None:
    axes.set_title(wrap(f"{axes.get_title()}\n{note}".strip(), inches_of(axes)[0], SMALL), fontsize=SMALL)
