"""What the figures share: places, colours, scales, and rendering."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lightning_invariance.messages import given
from lightning_invariance.plots.labels import INFINITE, REACHED, shorten
from lightning_invariance.plots.style import NAN
from lightning_invariance.plots.text import TITLE, QuickRenderer, fitting
from lightning_invariance.results.intervals import NOTABLE
from lightning_invariance.results.result import InvarianceResult

#: One result, or several: by the text of the legend, or just one after the other.
Results = InvarianceResult | Mapping[str, InvarianceResult] | Sequence[InvarianceResult]

#: Colours that colour-blind readers tell apart (Okabe and Ito 2008), each with a marker.
LINES = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#cc79a7", "D"),
    ("#e69f00", "v"),
    ("#56b4e9", "P"),
    ("#000000", "X"),
)

#: The fixed scale of measures that are ratios: around 1, transformations matter as much as samples do.
RANGE_OF_RATIOS = (0.01, 10.0)

#: The height of axes above others, in inches.
ABOVE = 1.2

#: The room for numbers beside an axis, and its label, in inches.
NUMBERS = 0.8

#: The largest width and height of a figure, in inches of 100 pixels.
LARGEST = 15.0


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """A figure that belongs to nobody: no pyplot state.

    Args:
        width: in inches.
        height: in inches.
        layout: None for axes that are placed by hand, with :func:`axes_at`: the constrained layout takes longer than
            all else in a picture.
    """
    figure = Figure(figsize=(min(width, LARGEST), min(height, LARGEST)), dpi=100, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """New axes at a place in inches from the lower left corner of the figure."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def axes_below(
    figure: Figure, left: float, bottom: float, width: float, height: float, apart: float | None
) -> tuple[Axes | None, Axes]:
    """New axes, and before them low ones above, unless ``apart``, the inches between them, is None."""
    above = None if apart is None else axes_at(figure, left, bottom + height + apart, width, ABOVE)
    return above, axes_at(figure, left, bottom, width, height)


def align_above(above: Axes, axes: Axes, label: str) -> None:
    """Let axes above others show what belongs to the same places along x.

    They do not share the axis: its ticks would be made and drawn twice.

    Args:
        above: of :func:`axes_below`.
        axes: the others, with their limits and ticks.
        label: of what is drawn above.
    """
    above.set_xlim(axes.get_xlim())
    draw_grid(above, axes.get_xticks())
    above.set_xticks([])
    above.grid(alpha=0.3)
    label = shorten(label)
    above.set_ylabel(label, fontsize=fitting(label, ABOVE + 0.2))


def draw_grid(axes: Axes, places: Iterable[float]) -> None:
    """Upright lines of a grid where there are no ticks."""
    lines = [[(x, 0), (x, 1)] for x in places]
    looks = {"color": rcParams["grid.color"], "linewidth": rcParams["grid.linewidth"], "alpha": 0.3, "zorder": 0.5}
    axes.add_collection(LineCollection(lines, transform=axes.get_xaxis_transform(), **looks), autolim=False)


def box_of(axes: Sequence[Axes]) -> tuple[Figure, Bbox]:
    """The figure of some axes, and the box around them in inches."""
    figure = axes[0].figure
    assert isinstance(figure, Figure)  # noqa: S101 - not one within another
    width, height = figure.get_size_inches()
    box = Bbox.union([one.get_position() for one in axes])
    return figure, Bbox.from_extents(box.x0 * width, box.y0 * height, box.x1 * width, box.y1 * height)


def write_title(figure: Figure, text: str) -> None:
    """A title at the upper end of a figure, as large as its width allows."""
    width, height = figure.get_size_inches()
    figure.suptitle(text, y=1 - 0.08 / height, fontsize=fitting(text, width - 0.2, TITLE))


def render(figure: Figure) -> npt.NDArray[np.uint8]:
    """The picture of a figure: ``(height, width, 3)``."""
    width, height = np.round(figure.bbox.size).tolist()
    renderer = QuickRenderer(width, height, figure.dpi)
    figure.draw(renderer)
    return np.ascontiguousarray(np.asarray(renderer.buffer_rgba())[..., :3])  # type: ignore[no-untyped-call]


def named(results: Results) -> dict[str, InvarianceResult]:
    """Text of the legend → result."""
    if isinstance(results, InvarianceResult | str | PathLike):
        return {"": only_one(results)}
    pairs: Any = results.items() if isinstance(results, Mapping) else ((str(i + 1), r) for i, r in enumerate(results))
    found: dict[str, InvarianceResult] = {str(name): only_one(result) for name, result in pairs}
    if not found:
        raise ValueError("Expected argument `results` to hold at least one result, but it is empty.")
    return found


def only_one(result: Any) -> InvarianceResult:
    """The result.

    Raises:
        TypeError: If it is several of them, a file, or something else.
    """
    if not isinstance(result, InvarianceResult):
        hint = "; `InvarianceResult.load` reads a file" if isinstance(result, str | PathLike) else ""
        raise TypeError(f"Expected argument `result` to be one InvarianceResult, but got {given(result)}{hint}.")
    return result


def first_measure(results: Iterable[InvarianceResult]) -> str:
    """The measure that is drawn where none is named."""
    return next(map(only_one, results)).measures[0]


def limits_of(values: Iterable[float]) -> tuple[float, float] | None:
    """The smallest and largest positive finite values, if there are any."""
    positive = [v for v in values if math.isfinite(v) and v > 0]
    return (min(positive), max(positive)) if positive else None


def scale_of(
    is_ratio: bool, values: Iterable[float], limits: tuple[float, float] | None = None, log: bool = True
) -> Normalize:
    """The colour scale of a measure: between ``limits``; fixed for ratios, so that epochs and networks compare."""
    found = limits or (RANGE_OF_RATIOS if is_ratio else limits_of(values))
    if not log:
        low, high = (0.0, 1.0) if found is None else found
        return Normalize(0.0 if limits is None else low, high)
    if found is None:
        return Normalize(0, 1)
    low, high = found
    return LogNorm(low, high if high > low else low * 10)


def colours() -> Colormap:
    """The perceptual colour map, with the special colours set; it holds no green, black or grey."""
    return colormaps["plasma"].with_extremes(bad=NAN)


def depth_colours(count: int) -> list[Any]:
    """A colour for each layer, from the first (dark) to the last (light, but dark enough for a line)."""
    return [colormaps["plasma"](0.88 * i / max(count - 1, 1)) for i in range(count)]


def within(scale: Normalize, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values with those outside the scale put at its ends (a logarithm has no place for 0), and infinite ones NaN."""
    finite = np.where(np.isinf(values), np.nan, values)
    return np.clip(finite, scale.vmin, scale.vmax)


def width_of(count: int) -> float:
    """A width that has room for so many layers, as far as figures go; an inch and a half is for what stands beside."""
    return min(LARGEST, max(6, 2.5 + 0.4 * min(count, 15) + 0.18 * max(count - 15, 0)))


def layers_of(results: Iterable[InvarianceResult], measure: str) -> list[str]:
    """The layers of all results, in the order of the networks."""
    return list(dict.fromkeys(layer for result in results for layer in result[measure]))


def depths(count: int) -> npt.NDArray[np.float64]:
    """Where layers lie between the first, at 0 %, and the last, at 100 %."""
    return np.linspace(0, 100, count) if count > 1 else np.array([100.0])


def marks_of(results: Iterable[InvarianceResult], measure: str) -> dict[str, str]:
    """Layer → what is to be said of it beside its name."""
    reached: set[str] = set()
    infinite: set[str] = set()
    for result in results:
        reached.update(result.reached)
        rows = result.table(measure) if measure in result else ()
        infinite.update(row.layer for row in rows if row.infinite and row.share_infinite > NOTABLE)
    return {layer: REACHED * (layer in reached) + INFINITE * (layer in infinite) for layer in reached | infinite}


def is_ratio(results: Iterable[InvarianceResult], measure: str) -> bool:
    """Whether a measure is a ratio; results of one measure agree on that."""
    return any(result.ratios.get(measure, False) for result in results)


def direction(results: Iterable[InvarianceResult], measure: str) -> str:
    """What a measure says, for a title."""
    higher = next(iter(results)).higher_is_better.get(measure)
    return "" if higher is None else f"{'higher' if higher else 'lower'} is more invariant"
