"""Where two networks, or two moments, differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from lightning_invariance.plots.common import depths, marks_of, new_figure, width_of
from lightning_invariance.plots.labels import LayerLabels, shorten
from lightning_invariance.results.compare import compare as compared
from lightning_invariance.results.comparison import Comparison
from lightning_invariance.results.result import InvarianceResult

#: Bars above and below 0, and those that may be chance.
ABOVE, BELOW, CHANCE = ("#d55e00", "//"), ("#0072b2", ""), 0.35


def compare(
    one: InvarianceResult,
    other: InvarianceResult,
    measure: str | None = None,
    *,
    names: tuple[str, str] = ("one", "other"),
    depth: bool = False,
) -> Figure:
    """Where do two networks, or two moments, differ? The difference of the means of each layer, a bar for each.

    Where both were measured with ``confidence``, bars have the intervals of :func:`lightning_invariance.compare`, and
    those that may be chance are pale.

    Args:
        one: an evaluation.
        other: another.
        measure: its name; by default the first.
        names: how the two are called; the bars are the second minus the first.
        depth: whether layers meet by their depth in per cent instead of their names: for each layer of ``one`` the
            value of ``other`` is interpolated between its two nearest layers.

    Raises:
        ValueError: If they have no layer in common and ``depth`` is false.
    """
    measure = measure or one.measures[0]
    marks, higher = marks_of([one, other], measure), one.higher_is_better.get(measure)
    if measure in one.influences and measure in other.influences:
        comparison = compared(
            one, other, measure, confidence=one.confidence or 0.95, align="depth" if depth else "name"
        )
        return draw_comparison(comparison, names=names, marks=marks)
    first, second = one.per_layer(measure), other.per_layer(measure)
    common = list(first) if depth else [layer for layer in first if layer in second]
    if not common:
        raise ValueError("Expected results with layers in common, but they have none: compare them with `depth=True`.")
    if depth:
        found = np.interp(depths(len(first)), depths(len(second)), list(second.values()))
        second = dict(zip(common, found.tolist(), strict=True))
    difference = np.array([second[layer] - first[layer] for layer in common])
    return _drawn(measure, common, difference, names, marks, higher)


def draw_comparison(
    comparison: Comparison, *, names: tuple[str, str] = ("a", "b"), marks: Mapping[str, str] | None = None
) -> Figure:
    """The differences of a comparison with their intervals; pale where they may be chance, a band for the margin.

    Args:
        comparison: what :func:`lightning_invariance.compare` found.
        names: how the two are called.
        marks: layer → what is to be said of it beside its name.
    """
    rows = comparison.rows
    difference = np.array([row.difference for row in rows])
    figure = _drawn(
        comparison.measure,
        [row.layer for row in rows],
        difference,
        names,
        marks or {},
        comparison.higher_is_better,
        chance={i for i, row in enumerate(rows) if row.layer not in comparison.differing},
    )
    axes = figure.axes[0]
    half = np.array([row.high - row.difference for row in rows])
    axes.errorbar(np.arange(len(rows)), difference, half, fmt="none", ecolor="black", capsize=3, linewidth=1)
    if comparison.margin is not None:
        axes.axhspan(-comparison.margin, comparison.margin, color="#009e73", alpha=0.15, linewidth=0, zorder=0)
    unit = "seeds" if comparison.unit == "seeds" else comparison.unit
    title = f"{comparison.confidence:.0%} intervals over {unit}; pale: may be chance"
    above = axes.get_title()
    axes.set_title(f"{above}\n{title}" if above else title, fontsize="medium")
    return figure


def _drawn(
    measure: str,
    layers: Sequence[str],
    difference: npt.NDArray[np.float64],
    names: tuple[str, str],
    marks: Mapping[str, str],
    higher_is_better: bool | None,
    chance: Collection[int] = (),
) -> Figure:
    """A bar for each layer; those at the positions in ``chance`` are pale."""
    figure = new_figure(width_of(len(layers)), 4.5)
    axes = figure.add_subplot()
    pale = np.array([i in chance for i in range(len(layers))], dtype=bool)
    for sign, (colour, hatch) in ((1, ABOVE), (-1, BELOW)):
        for faint in (False, True):
            chosen = (difference * sign > 0) & (pale == faint)
            at, alpha = np.flatnonzero(chosen), CHANCE if faint else 1
            axes.bar(at, difference[chosen], color=colour, hatch=hatch, edgecolor="white", linewidth=0, alpha=alpha)
    axes.axhline(0, color="black", linewidth=0.8)
    LayerLabels(layers, width_of(len(layers)) - 1.0, marks).write(axes, "x")
    axes.set_xlim(-0.6, len(layers) - 0.4)
    one, other = (shorten(name) for name in names)
    axes.set_ylabel(f"{measure}:\n{other} − {one}")
    axes.grid(alpha=0.3, axis="y")
    if higher_is_better is not None:
        place = "above" if higher_is_better else "below"
        axes.set_title(f"{place} 0: {other} is more invariant", fontsize="medium")
    return figure
