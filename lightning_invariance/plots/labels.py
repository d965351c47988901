"""Names of layers on an axis: without what all begin with, and by block where they are too many to read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from matplotlib.axes import Axes

#: Labels of this size, in points, can still be read; one inch has room for so many.
SMALLEST, LARGEST = 7.0, 9.0
LABELS_PER_INCH = 72 / (1.3 * SMALLEST)

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


def label_layers(
    axes: Axes,
    names: Sequence[str],
    inches: float,
    along: Literal["x", "y"] = "x",
    marks: Mapping[str, str] | None = None,
) -> list[Block]:
    """Write the names of layers along an axis on which they stand at 0, 1, 2, ….

    Args:
        axes: where.
        names: of the layers, in their order.
        inches: how long the axis is.
        along: which axis.
        marks: layer → marks beside its name, of :data:`MEANINGS`.

    Returns:
        The blocks that were labelled.
    """
    prefix, short = without_prefix(names)
    signs = [(marks or {}).get(name, "") for name in names]
    found = blocks(short, len(names) / (inches * LABELS_PER_INCH))
    size = min(LARGEST, max(SMALLEST, 72 * inches / 1.3 / max(len(names), 1)))
    axis = axes.xaxis if along == "x" else axes.yaxis
    used = {sign: [i for i, own in enumerate(signs) if sign in own] for sign in MEANINGS}
    texts = [
        shorten(b.label) + "".join(f" {s}" for s, at in used.items() if any(b.start <= i < b.stop for i in at))
        for b in found
    ]
    axis.set_ticks([b.centre for b in found], texts, fontsize=size)
    if along == "x":
        axis.set_tick_params(rotation=90)
    if any(b.stop - b.start > 1 for b in found):  # marks at the ends of blocks, not at their centres
        axis.set_tick_params(length=0)
        axis.set_ticks([b.start - 0.5 for b in found], minor=True)
        axis.set_tick_params(which="minor", length=5)
    notes = [f"layers of {prefix.rstrip('./')}"] * bool(prefix) + [MEANINGS[sign] for sign, at in used.items() if at]
    axis.set_label_text("   ".join(notes), fontsize="small")
    return found


def draw_borders(axes: Axes, found: Sequence[Block], along: Literal["x", "y"], width: float = 0.5) -> None:
    """White lines before all blocks but the first, on axes whose layers stand along x or y."""
    draw = axes.axvline if along == "x" else axes.axhline
    for block in found[1:]:
        draw(block.start - 0.5, color="white", linewidth=width)
