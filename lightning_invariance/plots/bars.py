"""What stands on the right of a figure: the colour bar of a measure, and which line is which layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from lightning_invariance.plots.common import axes_at, colours, depth_colours
from lightning_invariance.plots.labels import draw_marks, shorten, without_prefix
from lightning_invariance.plots.text import LINE, MEDIUM, SMALL, fitting, inches_of

#: The longest colour bar, its width, its distance from the axes, and the height of its points, in inches.
LONGEST, WIDTH, APART, POINT = 4.0, 0.16, 0.12, 0.12

#: The room of a colour bar of a measure, with its numbers and its label, in inches.
ROOM = 1.1

#: More layers than this are not listed in a legend.
MOST_IN_LEGEND = 12

#: The most numbers beside a colour bar.
MOST_NUMBERS = 7


def add_colourbar(axes: Sequence[Axes], scale: Normalize, label: str) -> None:
    """The colour bar of a measure; its points say that values beyond its ends have the colours of these.

    Args:
        axes: those on whose right it stands, as high as they or :data:`LONGEST`. There must be :data:`ROOM` for it.
        scale: of the colours.
        label: of the values.
    """
    figure, right, bottom, top = _place_beside(axes)
    length = min(top - bottom, LONGEST) - 2 * POINT
    low, high = float(scale.vmin or 0.0), float(scale.vmax or 1.0)
    shown, between = _numbers(low, high, isinstance(scale, LogNorm))
    ticks = {float(scale(value)): f"{value:g}" for value in shown}
    bar = _bar(figure, (right + APART, top - POINT - length, length), colours(), ticks)
    draw_marks(bar.yaxis, [float(scale(value)) for value in between], 2.0, far=True)
    bar.set_ylabel(label, fontsize=fitting(label, length))
    for end, beyond, colour in ((0.0, -POINT / length, 0.0), (1.0, 1 + POINT / length, 1.0)):
        corners = [(0.0, end), (0.5, beyond), (1.0, end)]
        bar.add_patch(Polygon(corners, facecolor=colours()(colour), edgecolor="black", linewidth=0.8, clip_on=False))


def room_of_key(names: Sequence[str]) -> float:
    """The room that :func:`key_of_layers` takes, in inches."""
    longest = inches_of(map(shorten, without_prefix(names)[1]), SMALL)
    return longest + (0.65 if len(names) <= MOST_IN_LEGEND else APART + WIDTH + 0.15 + LINE * MEDIUM / 72)


def key_of_layers(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Tell which line is which layer: a legend, or for many layers a colour bar from the first to the last.

    Args:
        axes: those on whose right it stands; the first has the lines. There must be :func:`room_of_key` for it.
        names: of the layers, in the order of the lines.
    """
    figure, right, bottom, top = _place_beside(axes)
    _, names = without_prefix(names)
    if len(names) <= MOST_IN_LEGEND:
        width, height = figure.get_size_inches()
        handles, _ = axes[0].get_legend_handles_labels()
        labels = [shorten(name) for name in names]
        corner = right / width, top / height
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=corner, fontsize=SMALL, frameon=False, borderpad=0
        )
        return
    chosen = sorted({round(x) for x in np.linspace(0, len(names) - 1, 6)})
    ticks = {i / (len(names) - 1): shorten(names[i]) for i in chosen}
    place = right + APART, bottom, top - bottom
    bar = _bar(figure, place, ListedColormap(depth_colours(256)), ticks, SMALL)
    bar.set_ylabel("layer")


def _place_beside(axes: Sequence[Axes]) -> tuple[Figure, float, float, float]:
    """The figure of some axes, and their right, lower and upper ends in inches."""
    figure = axes[0].figure
    assert isinstance(figure, Figure)  # noqa: S101 - not one within another
    width, height = figure.get_size_inches()
    box = Bbox.union([one.get_position() for one in axes])
    return figure, box.x1 * width, box.y0 * height, box.y1 * height


def _bar(
    figure: Figure,
    place: tuple[float, float, float],
    shades: Colormap,
    ticks: Mapping[float, str],
    points: float = MEDIUM,
) -> Axes:
    """An upright bar of colours: its left and lower end and its height in inches, its labels by their share of it.

    A figure's own ``colorbar`` takes as long as all else in a picture.
    """
    left, bottom, height = place
    axes = axes_at(figure, left, bottom, WIDTH, height)
    axes.imshow(np.linspace(0, 1, 256)[:, None], shades, aspect="auto", origin="lower", extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.set_yticks([*ticks], [*ticks.values()], fontsize=points, parse_math=False)
    return axes


def _numbers(low: float, high: float, log: bool) -> tuple[list[float], list[float]]:
    """Round numbers on a scale that are written beside it, and those between them."""
    if not log:
        return [v for v in MaxNLocator(MOST_NUMBERS - 1).tick_values(low, high) if low <= v <= high], []
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    least, most = low * (1 - 1e-9), high * (1 + 1e-9)
    found = {steps: [s * 10.0**p for p in powers for s in steps if least <= s * 10.0**p <= most] for steps in _STEPS}
    tens, all_of_them = found[_STEPS[0]], found[_STEPS[-1]]
    if len(tens) > MOST_NUMBERS:
        return tens[:: math.ceil(len(tens) / MOST_NUMBERS)], tens
    shown = next((numbers for numbers in found.values() if 3 <= len(numbers) <= MOST_NUMBERS), [low, high])
    return shown, all_of_them


#: Which numbers of each power of ten are written, where these are few.
_STEPS = ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10)))
