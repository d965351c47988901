"""What stands on the right of a figure: the colour bar of a measure, and which line is which layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import BboxImage
from matplotlib.lines import Line2D
from matplotlib.markers import TICKRIGHT
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, BboxTransformTo, Transform, TransformedBbox

from lightning_invariance.plots.common import box_of, colours, depth_colours
from lightning_invariance.plots.labels import in_legend, shorten, without_prefix
from lightning_invariance.plots.text import LINE, MEDIUM, SMALL, fitting, inches_of

#: The longest colour bar, its width, its distance from the axes, and the height of its points, in inches.
LONGEST, WIDTH, APART, POINT = 4.0, 0.16, 0.12, 0.12

#: The room of a colour bar of a measure, with its numbers and its label, in inches.
ROOM = 1.1

#: More layers than this are not listed in a legend.
MOST_IN_LEGEND = 12

#: The room for a number beside a colour bar, in inches.
NUMBER = 0.25

#: Which numbers of each power of ten are written, where these are few.
STEPS = ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10)))

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def add_colourbar(axes: Sequence[Axes], scale: Normalize, label: str) -> None:
    """The colour bar of a measure; its points say that values beyond its ends have the colours of these.

    Args:
        axes: those on whose right it stands, as high as they or :data:`LONGEST`. There must be :data:`ROOM` for it.
        scale: of the colours.
        label: of the values.
    """
    figure, box = box_of(axes)
    length = min(box.height, LONGEST) - 2 * POINT
    low, high, most = float(scale.vmin or 0.0), float(scale.vmax or 1.0), int(length / NUMBER)
    shown, between = (_powers if isinstance(scale, LogNorm) else _steps)(low, high, most)
    bar = _Bar(figure, box.x1 + APART, box.y1 - POINT - length, length)
    bar.draw(colours(), pointed=True)
    bar.write(scale(np.array(shown)).tolist(), _written(shown), label)
    bar.mark(scale(np.array(between)).tolist(), 2.0)


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
    figure, box = box_of(axes)
    _, names = without_prefix(names)
    if len(names) <= MOST_IN_LEGEND:
        width, height = figure.get_size_inches()
        handles, _ = axes[0].get_legend_handles_labels()
        labels = [in_legend(shorten(name)) for name in names]
        corner = box.x1 / width, box.y1 / height
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=corner, fontsize=SMALL, frameon=False, borderpad=0
        )
        return
    chosen = sorted({round(x) for x in np.linspace(0, len(names) - 1, 6)})
    bar = _Bar(figure, box.x1 + APART, box.y0, box.height)
    bar.draw(ListedColormap(depth_colours(256)), pointed=False)
    bar.write([i / (len(names) - 1) for i in chosen], [shorten(names[i]) for i in chosen], "layer", SMALL)


class _Bar:
    """An upright bar of colours, at a place in inches.

    It consists of what is seen alone: the ``colorbar`` of a figure takes as long as all else in a picture, and axes
    with ticks a third of that.
    """

    def __init__(self, figure: Figure, left: float, bottom: float, height: float) -> None:
        self.figure, self.right, self.height = figure, left + WIDTH, height
        across, up = figure.get_size_inches()
        #: From (0, 0) and (1, 1), the corners of the bar, to the figure.
        self.place: Transform = BboxTransformTo(
            Bbox.from_bounds(left / across, bottom / up, WIDTH / across, height / up)
        )
        self.place += figure.transFigure

    def draw(self, shades: Colormap, pointed: bool) -> None:
        """Draw its colours and its outline, with points in the colours of the ends."""
        image = BboxImage(TransformedBbox(Bbox.unit(), self.place), cmap=shades, norm=Normalize(0, 1), origin="lower")
        image.set_data(np.linspace(0, 1, 256)[:, None])
        self.figure.add_artist(image)
        tip = POINT / self.height * pointed
        for end, beyond, colour in ((0.0, -tip, 0.0), (1.0, 1 + tip, 1.0)) if pointed else ():
            corners = [(0.0, end), (0.5, beyond), (1.0, end)]
            self._add(Polygon(corners, facecolor=shades(colour), edgecolor="none"))
        outline = [(0, 0), (0.5, -tip), (1, 0), (1, 1), (0.5, 1 + tip), (0, 1)]
        self._add(Polygon(outline, fill=False, edgecolor="black", linewidth=0.8))

    def write(self, at: Sequence[float], texts: Sequence[str], label: str, points: float = MEDIUM) -> None:
        """Write texts beside it, at shares of its height, and what they are."""
        self.mark(at, 3.5)
        inch = 1 / WIDTH
        for share, text in zip(at, texts, strict=True):
            x = 1 + 0.1 * inch
            self._text(x, share, text, size=points, ha="left", va="center_baseline")
        x = 1 + (0.15 + inches_of(texts, points)) * inch
        size = fitting(label, self.height)
        self._text(x, 0.5, label, size=size, rotation=90, ha="left", va="center")

    def mark(self, at: Sequence[float], points: float) -> None:
        """Draw short lines on its right."""
        looks: dict[str, Any] = {"linestyle": "", "color": "black", "marker": TICKRIGHT, "markeredgewidth": 0.8}
        self._add(Line2D([1.0] * len(at), at, markersize=points, **looks))

    def _text(self, x: float, y: float, text: str, **looks: Any) -> None:
        self.figure.text(x, y, text, transform=self.place, parse_math=False, **looks)

    def _add(self, artist: Artist) -> None:
        artist.set_transform(self.place)
        self.figure.add_artist(artist)


def _steps(low: float, high: float, most: int) -> tuple[list[float], list[float]]:
    """Round numbers on a scale that are written beside it, and those that are only marked."""
    found = MaxNLocator(min(most, 7), steps=[1, 2, 5, 10]).tick_values(low, high)
    return [value for value in found if low <= value <= high], []


def _powers(low: float, high: float, most: int) -> tuple[list[float], list[float]]:
    """The same for a logarithmic scale: powers of ten, and what is between them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    least, largest = low * (1 - 1e-9), high * (1 + 1e-9)
    found = [[n * 10.0**power for power in powers for n in numbers] for numbers in STEPS]
    inside = [[value for value in values if least <= value <= largest] for values in found]
    if len(inside[0]) > most:
        return inside[0][:: math.ceil(len(inside[0]) / most)], inside[0]
    return next((values for values in inside if 3 <= len(values) <= most), [low, high]), inside[-1]


def _written(values: Sequence[float]) -> list[str]:
    """Numbers as they are, or as powers of ten where they have many zeros."""
    powers = [math.log10(value) if value > 0 else 0.5 for value in values]
    if (
        all(math.isclose(power, round(power), abs_tol=1e-9) for power in powers)
        and max(map(abs, powers), default=0) > 3
    ):
        return [f"10{str(round(power)).translate(SUPERSCRIPTS)}" for power in powers]
    return [f"{value:.3g}" for value in values]
