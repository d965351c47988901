"""Bars of the differences between two results."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from lightning_invariance.plots.common import ALIKE, axes_in, figure_of, inches_of, joined, marks_of, width_of
from lightning_invariance.plots.labels import label_layers, shorten, wrap
from lightning_invariance.results.compare import aligned_layers
from lightning_invariance.results.compare import compare as compared
from lightning_invariance.results.comparison import Comparison, Difference
from lightning_invariance.results.result import InvarianceResult

#: The colour and hatch of bars above and below 0, and the opacity of bars that may be chance.
ABOVE, BELOW, PALE = ("#d55e00", "//"), ("#0072b2", ""), 0.35


def compare(
    one: InvarianceResult,
    other: InvarianceResult,
    measure: str | None = None,
    *,
    names: tuple[str, str] = ("a", "b"),
    depth: bool = False,
    ax: Axes | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Where do two networks, or two moments, differ? The difference of the means of each layer, a bar for each.

    Where both were measured with ``confidence``, bars have the intervals of :func:`lightning_invariance.compare`, and
    those that may be chance are pale.

    Args:
        one: an evaluation.
        other: an evaluation to compare it with.
        measure: its name; by default the first.
        names: of the two; the bars are the second minus the first.
        depth: whether layers meet by their depth in per cent instead of their names: for each layer of ``one`` the
            value of ``other`` is interpolated between its two nearest layers of the same type.
        ax: axes to draw into; by default a new figure is made.
        size: width and height of the new figure in inches.

    Raises:
        ValueError: If they have no layer in common and ``depth`` is false.
    """
    measure = measure or one.measures[0]
    marks, higher = marks_of([one, other], measure), one.higher_is_better.get(measure)
    if measure in one.influences and measure in other.influences:
        align, confidence = "depth" if depth else "name", one.confidence or 0.95
        comparison = compared(one, other, measure, confidence=confidence, align=align, names=names)
        return draw_comparison(comparison, marks=marks, ax=ax, size=size)
    first, second = one.per_layer(measure), other.per_layer(measure)
    pairs, _ = aligned_layers([one], [other], measure, "depth" if depth else "name")
    difference = np.array([sum(w * second[name] for name, w in parts.items()) - first[layer] for layer, parts in pairs])
    axes = axes_in(ax, width_of(len(pairs)), 4.5, size)[1]
    labels = {layer: layer for layer, _ in pairs}
    return _drawn(axes, measure, labels, difference, names, marks, higher, one.quality(measure))


def _is_alike(one: Difference, other: Difference) -> bool:
    numbers = ((one.a, other.a), (one.b, other.b), (one.difference, other.difference), (one.p, other.p))
    return all(abs(a - b) <= ALIKE * max(abs(a), abs(b)) for a, b in numbers)


def draw_comparison(
    comparison: Comparison,
    *,
    marks: Mapping[str, str] | None = None,
    ax: Axes | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Draw the differences of a comparison with intervals; pale where they may be chance, with a band for the margin.

    Args:
        comparison: made by :func:`lightning_invariance.compare`.
        marks: layer → marks beside its name.
        ax: axes to draw into; by default a new figure is made.
        size: width and height of the new figure in inches.
    """
    labels = joined(comparison, lambda one, other: _is_alike(comparison[one], comparison[other]))
    rows = [row for row in comparison.rows if row.layer in labels]
    difference = np.array([row.difference for row in rows])
    layers, higher = [row.layer for row in rows], comparison.higher_is_better
    chance = {i for i, layer in enumerate(layers) if layer not in comparison.differing}
    axes = axes_in(ax, width_of(len(layers)), 4.5, size)[1]
    look = comparison.names, marks or {}, higher, comparison.quality
    figure = _drawn(axes, comparison.measure, labels, difference, *look, chance)
    half = np.array([row.high - row.difference for row in rows])
    axes.errorbar(np.arange(len(rows)), difference, half, fmt="none", ecolor="black", capsize=3, linewidth=1)
    if comparison.margin is not None:
        axes.axhspan(-comparison.margin, comparison.margin, color="#009e73", alpha=0.15, linewidth=0, zorder=0)
    title = f"{axes.get_title()}\n{comparison.confidence:.0%} intervals over {comparison.unit}; pale: may be chance"
    axes.set_title(wrap(title.strip(), inches_of(axes)[0]), fontsize="medium")
    return figure


def _drawn(
    axes: Axes,
    measure: str,
    labels: Mapping[str, str],
    difference: npt.NDArray[np.float64],
    names: tuple[str, str],
    marks: Mapping[str, str],
    higher_is_better: bool | None,
    quality: str,
    chance: Collection[int] = (),
) -> Figure:
    """A bar for each layer; the bars at the positions in ``chance`` are pale."""
    width, height = inches_of(axes)
    looks = [ABOVE if value > 0 else BELOW for value in difference]
    shades = [to_rgba(colour, PALE if i in chance else 1) for i, (colour, _) in enumerate(looks)]
    hatches = [hatch for _, hatch in looks]
    axes.bar(range(len(labels)), difference, color=shades, hatch=hatches, edgecolor="white", linewidth=0)
    axes.axhline(0, color="black", linewidth=0.8)
    label_layers(axes, "x", labels, width, marks)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    one, other = (shorten(name) for name in names)
    axes.set_ylabel(wrap(f"{measure}:\n{other} − {one}", height))
    axes.grid(alpha=0.3, axis="y")
    if higher_is_better is not None:
        place = "above" if higher_is_better else "below"
        axes.set_title(f"{place} 0: {other} is more {quality}", fontsize="medium")
    return figure_of(axes)
