"""Labels: names of layers on an axis, by block where there are too many to read, and texts that fit."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from matplotlib.axes import Axes

from lightning_invariance.results.record import INPUT_LAYERS

#: The largest and the smallest font of layer names, in points; smaller ones cannot be read.
LARGEST, SMALLEST = 9.0, 7.0

#: The sizes of most texts and of notes, in points.
MEDIUM, SMALL = 10.0, 8.33

#: The width of a wide letter and the height of a line, as multiples of the font size.
LETTER, LINE = 0.6, 1.3

#: Layers are labelled by block only if this share of them lies in blocks that have room for a label.
MIN_SHARE_IN_BLOCKS = 0.85

#: The parts of a layer's name: modules end with a dot, and a module that performs an operation ends with a dash.
PART = re.compile(r"[^.-]+[.-]?")

#: Marks beside the names of layers.
REACHED, INFINITE = "*", "∞"
MEANINGS = {REACHED: "*: reached by some samples only", INFINITE: "∞: more than 1 % of its units are infinite"}


class Block(NamedTuple):
    """Consecutive layers, from ``start`` to ``stop - 1``, that share a label."""

    label: str
    start: int
    stop: int

    @property
    def centre(self) -> float:
        """The place of its label."""
        return (self.start + self.stop - 1) / 2


def in_legend(name: str) -> str:
    """A name for a legend: matplotlib leaves out labels that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def shorten(name: str, longest: int = 24) -> str:
    """Cut a name to a number of characters; its end is kept, because layers differ there."""
    return name if len(name) <= longest else "…" + name[-longest + 1 :]


def wrap(text: str, inches: float, points: float = MEDIUM) -> str:
    """Break a text into lines that are not longer than this."""
    longest = max(8, int(72 * inches / (LETTER * points)))
    return "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, longest))


def without_prefix(names: Sequence[str]) -> tuple[str, list[str]]:
    """Split names into the modules that all begin with, such as ``"model.backbone."``, and the rest of each.

    The network's input is in no module.
    """
    parts = [PART.findall(name) for name in names if name not in INPUT_LAYERS]
    common = 0
    while len(parts) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    prefix = "".join(parts[0][:common]) if parts else ""
    return prefix, [name.removeprefix(prefix) for name in names]


def blocks(names: Sequence[str], room: float) -> list[Block]:
    """Choose labels for consecutive layers, so that no two of them overlap.

    Every name, where there is room. Else blocks of consecutive layers whose names begin alike, as small as there is
    room for. Else, where names have no parts in common, evenly spread names.

    Args:
        names: in the order of the layers.
        room: how many layers a label takes.
    """
    every = [Block(name, i, i + 1) for i, name in enumerate(names)]
    if room <= 1:
        return every
    parts = [PART.findall(name) for name in names]
    for depth in range(max(map(len, parts), default=0) - 1, 0, -1):
        found = _divided(names, parts, depth)
        if sum(b.stop - b.start for b in found if b.stop - b.start >= room) >= MIN_SHARE_IN_BLOCKS * len(names):
            return _apart(found, room)
    return every[:: math.ceil(room)]


def _apart(found: Sequence[Block], room: float) -> list[Block]:
    """Leave out blocks whose labels would overlap: long blocks go first, short ones need more room around them."""
    kept: list[Block] = []
    for block in sorted(found, key=lambda b: b.start - b.stop):
        least = room if block.stop - block.start >= room else 3 * room
        if all(abs(block.centre - other.centre) >= least for other in kept):
            kept.append(block)
    return sorted(kept, key=lambda b: b.start)


def _divided(names: Sequence[str], parts: Sequence[Sequence[str]], depth: int) -> list[Block]:
    """Group consecutive layers whose names have the first ``depth`` parts in common."""
    found = []
    for head, members in groupby(range(len(names)), key=lambda i: tuple(parts[i][:depth])):
        at = list(members)
        label = names[at[0]] if len(at) == 1 else "".join(head).rstrip("./")
        found.append(Block(label, at[0], at[-1] + 1))
    return found


def label_layers(
    axes: Axes,
    along: Literal["x", "y"],
    labels: Mapping[str, str],
    inches: float,
    marks: Mapping[str, str] | None = None,
) -> list[Block]:
    """Label the axis on which layers stand at 0, 1, 2 and so on; its own label explains prefix and marks of the names.

    Args:
        axes: the axes.
        along: the axis.
        labels: layer → its label, in the order of the layers.
        inches: the length of the axis, at least.
        marks: layer → marks of :data:`MEANINGS` beside its name.

    Returns:
        The labelled layers or blocks; the starts of blocks are marked on the axis.
    """
    prefix, short = without_prefix([*labels.values()])
    signs = [(marks or {}).get(layer, "") for layer in labels]
    found = blocks(short, len(labels) * LINE * SMALLEST / (72 * inches))
    texts = [
        " ".join(
            [shorten(b.label), *(sign for sign in MEANINGS if any(sign in own for own in signs[b.start : b.stop]))]
        )
        for b in found
    ]
    axis, turned = (axes.xaxis, 90) if along == "x" else (axes.yaxis, 0)
    size = min(LARGEST, max(SMALLEST, 72 * inches / LINE / max(len(labels), 1)))
    axis.set_ticks([b.centre for b in found], texts, fontsize=size, rotation=turned, parse_math=False)
    if any(b.stop - b.start > 1 for b in found):
        axis.set_ticks([b.start - 0.5 for b in found], minor=True)
        axis.set_tick_params(which="major", length=0, pad=8)
        axis.set_tick_params(which="minor", length=5)
    notes = [f"layers of {shorten(prefix.rstrip('./'), 40)}"] * bool(prefix)
    notes += [meaning for sign, meaning in MEANINGS.items() if any(sign in own for own in signs)]
    text = "   ".join(notes)
    if wrap(text, inches, SMALL) != text:
        text = "\n".join(wrap(note, inches, SMALL) for note in notes)
    axis.set_label_text(text, fontsize=SMALL, parse_math=False)
    return found
