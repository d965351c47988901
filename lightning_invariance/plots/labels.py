"""Names of layers on an axis: without what all begin with, and by block where they are too many to read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.markers import TICKDOWN, TICKLEFT
from matplotlib.transforms import ScaledTranslation

from lightning_invariance.plots.text import LINE, SMALL, fitting, inches_of

#: Labels of this size, in points, can still be read; one inch has room for so many.
SMALLEST, LARGEST = 7.0, 9.0
LABELS_PER_INCH = 72 / (1.3 * SMALLEST)

#: The distance of labels from the axis, in points.
APART = 6.0

#: Which share of the layers must lie in blocks that are long enough for a label.
MOSTLY = 0.85

#: What separates the parts of a name: modules from each other, and an operation from its module.
PART = re.compile(r"[^./]+[./]?")

#: Marks of layers: only some samples reached them; more than 1 % of their units are infinite, and not in the mean.
REACHED, INFINITE = "*", "∞"
MEANINGS = {REACHED: "*: reached by some samples only", INFINITE: "∞: more than 1 % of its units are infinite"}


class Block(NamedTuple):
    """Layers that follow each other and share a label: those at ``start`` to ``stop - 1``."""

    label: str
    start: int
    stop: int

    @property
    def centre(self) -> float:
        """Where its label stands."""
        return (self.start + self.stop - 1) / 2


def in_legend(name: str) -> str:
    """A name as a legend shows it: Matplotlib leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def shorten(name: str, longest: int = 24) -> str:
    """A label that fits, its end kept (layers differ there)."""
    return name if len(name) <= longest else "…" + name[-longest + 1 :]


def without_prefix(names: Sequence[str]) -> tuple[str, list[str]]:
    """What all names begin with, in whole parts such as ``"model.backbone."``, and the rest of each."""
    parts = [PART.findall(name) for name in names]
    common = 0
    while len(names) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return "".join(parts[0][:common]) if parts else "", ["".join(p[common:]) for p in parts]


def blocks(names: Sequence[str], room: float) -> list[Block]:
    """What to label, for names that stand in a row: no two labels closer than the room for one.

    Every name where there is room. Else blocks, layers in a row whose names begin alike: of the finest division whose
    blocks are mostly as long as a label needs. Where names have no parts in common, some of them, evenly spread.

    Args:
        names: in their order.
        room: how many layers a label takes.
    """
    every = [Block(name, i, i + 1) for i, name in enumerate(names)]
    if room <= 1:
        return every
    parts = [PART.findall(name) for name in names]
    for depth in range(max(map(len, parts), default=0) - 1, 0, -1):
        found = _divided(names, parts, depth)
        if sum(b.stop - b.start for b in found if b.stop - b.start >= room) >= MOSTLY * len(names):
            return _apart(found, room)
    return every[:: math.ceil(room)]


def _apart(found: Sequence[Block], room: float) -> list[Block]:
    """Blocks whose centres are as far from each other as labels need: long ones, and short ones where there is room."""
    kept: list[Block] = []
    for block in sorted(found, key=lambda b: b.start - b.stop):
        least = room if block.stop - block.start >= room else 3 * room
        if all(abs(block.centre - other.centre) >= least for other in kept):
            kept.append(block)
    return sorted(kept, key=lambda b: b.start)


def _divided(names: Sequence[str], parts: Sequence[Sequence[str]], depth: int) -> list[Block]:
    found = []
    for head, members in groupby(range(len(names)), key=lambda i: tuple(parts[i][:depth])):
        at = list(members)
        label = names[at[0]] if len(at) == 1 else "".join(head).rstrip("./")
        found.append(Block(label, at[0], at[-1] + 1))
    return found


class LayerLabels:
    """The names of layers along an axis on which they stand at 0, 1, 2, …, and what is to be said of them.

    They are texts, not ticks, which take three times as long, and few artists: all marks are one, all borders another.

    Args:
        names: of the layers, in their order.
        inches: how long the axis is.
        marks: layer → marks beside its name, of :data:`MEANINGS`.

    Attributes:
        blocks: what is labelled.
        room: how much room labels and notes take beside the axis, in inches.
    """

    def __init__(self, names: Sequence[str], inches: float, marks: Mapping[str, str] | None = None) -> None:
        prefix, short = without_prefix(names)
        signs = [(marks or {}).get(name, "") for name in names]
        used = {sign: [i for i, own in enumerate(signs) if sign in own] for sign in MEANINGS}
        self.blocks = blocks(short, len(names) / (inches * LABELS_PER_INCH))
        self._texts = [
            shorten(b.label) + "".join(f" {s}" for s, at in used.items() if any(b.start <= i < b.stop for i in at))
            for b in self.blocks
        ]
        self._points = min(LARGEST, max(SMALLEST, 72 * inches / 1.3 / max(len(names), 1)))
        self._length = inches_of(self._texts, self._points) + APART / 72
        meanings = [MEANINGS[sign] for sign, at in used.items() if at]
        self._note, self._small = _note(prefix.rstrip("./"), meanings, inches)
        self.room = self._length + (LINE * SMALL * len(self._note.splitlines()) + 4) / 72 + 0.05

    def write(self, axes: Axes, along: Literal["x", "y"]) -> None:
        """Write them beside an axis."""
        axis, lies = (axes.xaxis, True) if along == "x" else (axes.yaxis, False)
        inches = axes.figure.dpi_scale_trans
        away = ScaledTranslation(0, -APART / 72, inches) if lies else ScaledTranslation(-APART / 72, 0, inches)
        place = axes.get_xaxis_transform() if lies else axes.get_yaxis_transform()
        looks: dict[str, Any] = (
            {"rotation": 90, "ha": "center", "va": "top"} if lies else {"ha": "right", "va": "center_baseline"}
        )
        for block, text in zip(self.blocks, self._texts, strict=True):
            x, y = (block.centre, 0.0) if lies else (0.0, block.centre)
            axes.text(x, y, text, size=self._points, transform=place + away, parse_math=False, **looks)
        axis.set_ticks([])
        axis.set_label_text(self._note, fontsize=self._small, parse_math=False)
        axis.labelpad = 72 * self._length + 2
        self._draw_marks(axes, along)

    def _draw_marks(self, axes: Axes, along: Literal["x", "y"]) -> None:
        """Short lines outside of the axes, where layers stand, or where blocks begin. One artist, unlike ticks."""
        long = any(block.stop - block.start > 1 for block in self.blocks)
        places = [block.start - 0.5 if long else block.centre for block in self.blocks]
        zeros = [0.0] * len(places)
        looks: dict[str, Any] = {"linestyle": "", "color": "black", "markeredgewidth": 0.8}
        looks |= {"markersize": 5.0 if long else 3.5, "marker": TICKDOWN if along == "x" else TICKLEFT}
        transform = axes.get_xaxis_transform() if along == "x" else axes.get_yaxis_transform()
        x, y = (places, zeros) if along == "x" else (zeros, places)
        axes.figure.add_artist(Line2D(x, y, transform=transform, **looks))  # the axes' own lines are those of layers

    def draw_borders(self, axes: Axes, along: Literal["x", "y"], width: float = 0.5) -> None:
        """White lines before all blocks but the first."""
        places = [block.start - 0.5 for block in self.blocks[1:]]
        lines = [[(x, 0), (x, 1)] if along == "x" else [(0, x), (1, x)] for x in places]
        across = axes.get_xaxis_transform() if along == "x" else axes.get_yaxis_transform()
        axes.add_collection(LineCollection(lines, colors="white", linewidths=width, transform=across), autolim=False)


def _note(prefix: str, meanings: Sequence[str], inches: float) -> tuple[str, float]:
    """What all names begin with and the meanings of marks, in as few lines as an axis has room for, and their size."""
    long, short = ([f"layers of {name}"] * bool(name) + [*meanings] for name in (prefix, shorten(prefix)))
    for text in ("   ".join(long), "\n".join(long)):
        if inches_of([text], SMALL) <= inches:
            return text, SMALL
    return "\n".join(short), fitting("\n".join(short), inches, SMALL)
