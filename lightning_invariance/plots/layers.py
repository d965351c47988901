"""Curves over the layers of one or more results: one network beside another, or many of a kind."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_invariance.plots.common import (
    LINES,
    Results,
    depths,
    direction,
    draw_grid,
    first_measure,
    is_ratio,
    layers_of,
    marks_of,
    named,
    new_figure,
    width_of,
)
from lightning_invariance.plots.labels import LayerLabels, in_legend, shorten
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
    axes, places = _axes_of_layers(list(found.values()), measure, depth)
    few = len(found) <= len(LINES)
    longest = 40 if few else 24  # texts of a legend
    for i, (label, result) in enumerate(found.items()):
        around, position = divmod(i, len(LINES))
        colour, marker = LINES[position][0], LINES[(position + around) % len(LINES)][1]  # another pair for each
        rows, x = result.table(measure), places(result)
        mean, std = np.array([row.mean for row in rows]), np.array([row.std for row in rows])
        style = "--" if label in dashed else "-"
        size = 4 if len(x) <= MOST_MARKERS else 0
        axes.plot(
            x, mean, style, color=colour, marker=marker, ms=size, label=in_legend(shorten(label, longest)) or None
        )
        known = [row for row in rows if np.isfinite(row.low)]
        if known:
            at = [float(place) for place, row in zip(x, rows, strict=True) if np.isfinite(row.low)]
            bounds = [[row.mean - row.low for row in known], [row.high - row.mean for row in known]]
            axes.errorbar(at, [row.mean for row in known], bounds, fmt="none", ecolor=colour, capsize=3)
        low = np.maximum(mean - std, 0) if (mean[np.isfinite(mean)] >= 0).all() else mean - std
        axes.fill_between(x, low, mean + std, color=colour, alpha=0.12, linewidth=0)
    axes.set_ylabel(f"{measure}\nmean of the layer")
    if len(found) > 1:
        axes.legend(fontsize=None if few else "x-small", ncols=1 if few else 2 + len(found) // 24)
    return _finished(axes, list(found.values()), measure)


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
    axes, places = _axes_of_layers(list(found.values()), measure, depth)
    lines: dict[float, list[float]] = {}
    for result in found.values():
        means, x = list(result.per_layer(measure).values()), places(result)
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
    axes.set_ylabel(f"{measure}\nmean of the layer")
    axes.legend()
    return _finished(axes, list(found.values()), measure)


class _Places:
    """Where the layers of a result lie on the axis."""

    def __init__(self, names: Sequence[str], measure: str, depth: bool) -> None:
        self.index = {name: i for i, name in enumerate(names)}
        self.measure, self.depth = measure, depth

    def __call__(self, result: InvarianceResult) -> npt.NDArray[np.float64]:
        """One place a layer."""
        if self.depth:
            return depths(len(result[self.measure]))
        return np.array([self.index[name] for name in result[self.measure]], dtype=np.float64)


def _axes_of_layers(results: Sequence[InvarianceResult], measure: str, depth: bool) -> tuple[Axes, _Places]:
    """New axes with the layers below."""
    names = layers_of(results, measure)
    figure = new_figure(7 if depth else width_of(len(names)), 4.5)
    axes = figure.add_subplot()
    if depth:
        axes.set_xlabel("depth of the layer in %")
    else:
        labels = LayerLabels(names, width_of(len(names)) - 1.0, marks_of(results, measure))
        labels.write(axes, "x")
        draw_grid(axes, [block.centre for block in labels.blocks])
        axes.set_xlim(-0.6, len(names) - 0.4)
    return axes, _Places(names, measure, depth)


def _finished(axes: Axes, results: Sequence[InvarianceResult], measure: str) -> Figure:
    if is_ratio(results, measure):
        axes.set_ylim(bottom=0)
    axes.set_title(direction(results, measure), fontsize="medium")
    axes.grid(alpha=0.3)
    figure = axes.figure
    assert isinstance(figure, Figure)  # noqa: S101 - not one within another
    return figure
