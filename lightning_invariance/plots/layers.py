"""Curves over the layers of one or more results."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from lightning_invariance.plots.common import new_figure, shorten
from lightning_invariance.result import InvarianceResult


def layers(results: Mapping[str, InvarianceResult], measure: str | None = None) -> Figure:
    """Which layers are invariant, and in which network? The mean of each layer, a line for each result.

    Lines are dashed in turn, solid first, so that they can be told apart without colour.

    Args:
        results: legend text → an evaluation.
        measure: its name; by default the first.
    """
    if not results:
        raise ValueError("Expected argument `results` to hold at least one result, but it is empty.")
    measure = measure or next(iter(results.values())).measures[0]
    names = list(dict.fromkeys(layer for result in results.values() for layer in result[measure]))
    figure = new_figure(width=min(24, max(6, 2 + 0.4 * len(names))), height=4.5)
    axes = figure.add_subplot()
    for (label, result), style in zip(results.items(), ("-", "--", "-.", ":") * len(results), strict=False):
        means = result.per_layer(measure)
        axes.plot([names.index(name) for name in means], list(means.values()), style, marker="o", ms=4, label=label)
    axes.set_xticks(range(len(names)), [shorten(name) for name in names], rotation=90)
    axes.set_ylabel(f"{measure}, mean of the layer")
    if measure.startswith("Normalized"):
        axes.set_ylim(bottom=0)
    higher = next(iter(results.values())).higher_is_better.get(measure)
    if higher is not None:
        axes.set_title(f"{'higher' if higher else 'lower'} is more invariant", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
