"""Colours of infinite, dead and undefined values, and a bar chart of the channels of one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

#: The colours of infinite values, dead units and NaN, which differ in lightness, too.
INFINITE, DEAD, NAN = "#2ca02c", "#000000", "#bbbbbb"


def special_patches(infinite: int, dead: int, nan: int) -> list[Patch]:
    """Entries of a legend that counts the special values that occur."""
    counted = ((INFINITE, "infinite", infinite), (DEAD, "dead", dead), (NAN, "NaN", nan))
    return [Patch(facecolor=colour, label=f"{count} {name} channels") for colour, name, count in counted if count]


def draw_bars(axes: Axes, values: Sequence[float], label: str) -> None:
    """Draw a bar for each channel; infinite and undefined values fill the height in green and grey, and are counted.

    Args:
        axes: where to draw.
        values: one for each channel.
        label: of the values.
    """
    finite = {i: value for i, value in enumerate(values) if math.isfinite(value)}
    axes.bar([*finite], [*finite.values()], color="#0072b2")
    others = {INFINITE: [i for i, v in enumerate(values) if math.isinf(v)]}
    others[NAN] = [i for i, v in enumerate(values) if math.isnan(v)]
    for colour, places in others.items():
        for place in places:
            axes.axvspan(place - 0.4, place + 0.4, color=colour, linewidth=0)
    patches = special_patches(len(others[INFINITE]), 0, len(others[NAN]))
    if patches:
        axes.legend(handles=patches, fontsize="small")
    axes.set_xlabel("channel")
    axes.set_ylabel(label)
