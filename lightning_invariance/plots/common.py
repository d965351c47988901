"""What the figures share: colours, scales and rendering."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

#: Colours of values that no scale holds; told apart by their lightness too.
INFINITE, DEAD, NAN = "#2ca02c", "#000000", "#bbbbbb"

#: The fixed scale of normalised measures, which are ratios: around 1, transformations matter as much as samples do.
NORMALIZED_RANGE = (0.01, 10)


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to nobody: no pyplot state."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Figure) -> npt.NDArray[np.uint8]:
    """The picture of a figure: ``(height, width, 3)``."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    rgb: npt.NDArray[np.uint8] = np.array(canvas.buffer_rgba())[..., :3]
    return rgb


def scale_of(measure: str, values: Iterable[float]) -> Normalize:
    """The logarithmic colour scale of a measure: fixed for normalised ones, so that epochs compare."""
    if measure.startswith("Normalized"):
        return LogNorm(*NORMALIZED_RANGE)
    positive = [v for v in values if math.isfinite(v) and v > 0]
    if not positive:
        return Normalize(0, 1)
    low, high = min(positive), max(positive)
    return LogNorm(low, high if high > low else low * 10)


def colours() -> Colormap:
    """The perceptual colour map, with the special colours set; it holds no green, black or grey."""
    from matplotlib import colormaps

    return colormaps["plasma"].with_extremes(bad=NAN)


def within(scale: Normalize, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values with those outside the scale put at its ends (a logarithm has no place for 0), and infinite ones NaN."""
    finite = np.where(np.isinf(values), np.nan, values)
    return np.clip(finite, scale.vmin, scale.vmax)


def add_colourbar(figure: Figure, scale: Normalize, cmap: Colormap, label: str) -> None:
    """A colour bar for all axes of the figure."""
    figure.colorbar(ScalarMappable(scale, cmap), ax=figure.axes, label=label, extend="both", pad=0.01)


def special_patches(infinite: int, dead: int, nan: int) -> list[Patch]:
    """Entries of a legend that counts special values; none for those that do not occur."""
    counted = ((INFINITE, "infinite", infinite), (DEAD, "dead", dead), (NAN, "NaN", nan))
    return [Patch(facecolor=colour, label=f"{count} {name}") for colour, name, count in counted if count]


def shorten(name: str, longest: int = 24) -> str:
    """A label that fits, its end kept (layers differ there)."""
    return name if len(name) <= longest else "…" + name[-longest + 1 :]
