"""What the figures share: colours, scales, labels of layers, and rendering."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from lightning_invariance.plots.labels import INFINITE, REACHED, shorten, without_prefix
from lightning_invariance.result import InvarianceResult
from lightning_invariance.style import NAN
from lightning_invariance.table import NOTABLE

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

#: The largest width and height of a figure, in inches of 100 pixels.
LARGEST = 15.0

#: The longest colour bar, in inches.
LONGEST_BAR = 4.5

#: More layers than this are not listed in a legend.
MOST_IN_LEGEND = 12


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to nobody: no pyplot state."""
    figure = Figure(figsize=(min(width, LARGEST), min(height, LARGEST)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Figure) -> npt.NDArray[np.uint8]:
    """The picture of a figure: ``(height, width, 3)``."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    rgb: npt.NDArray[np.uint8] = np.array(canvas.buffer_rgba())[..., :3]
    return rgb


def named(results: Results) -> dict[str, InvarianceResult]:
    """Text of the legend → result."""
    if isinstance(results, InvarianceResult):
        return {"": results}
    pairs: Any = results.items() if isinstance(results, Mapping) else ((str(i + 1), r) for i, r in enumerate(results))
    found: dict[str, InvarianceResult] = dict(pairs)
    if not found:
        raise ValueError("Expected argument `results` to hold at least one result, but it is empty.")
    return found


def first_measure(results: Iterable[InvarianceResult]) -> str:
    """The measure that is drawn where none is named."""
    return next(iter(results)).measures[0]


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


def add_colourbar(figure: Figure, axes: Axes | list[Axes], scale: Normalize, label: str) -> None:
    """A colour bar of a measure for some axes of the figure, at their upper end."""
    width, height = figure.get_size_inches()
    length = min(1.0, LONGEST_BAR / height)
    figure.colorbar(
        ScalarMappable(scale, colours()),
        ax=axes,
        label=label,
        extend="both",
        pad=0.1 / width,
        fraction=0.9 / width,
        shrink=length,
        anchor=(0.0, 1.0),
        aspect=25 * length * height / LONGEST_BAR,
    )


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
    marks: dict[str, str] = {}
    for result in results:
        for row in result.table(measure) if measure in result else ():
            signs = REACHED * (row.layer in result.reached) + INFINITE * (row.share_infinite > NOTABLE)
            marks[row.layer] = marks.get(row.layer, "") + signs
    return marks


def key_of_layers(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """Tell which line is which layer: a legend, or for many layers a colour bar from the first to the last."""
    _, names = without_prefix(names)
    if len(names) <= MOST_IN_LEGEND:
        handles, _ = axes.get_legend_handles_labels()
        labels = [shorten(name) for name in names]
        figure.legend(handles, labels, loc="outside right upper", fontsize="small", frameon=False)
        return
    shades = ScalarMappable(Normalize(0, len(names) - 1), ListedColormap(depth_colours(256)))
    bar = figure.colorbar(shades, ax=figure.axes, label="layer", pad=0.01)
    ticks = sorted({round(x) for x in np.linspace(0, len(names) - 1, 6)})
    bar.set_ticks(ticks, labels=[shorten(names[i]) for i in ticks])


def is_ratio(results: Iterable[InvarianceResult], measure: str) -> bool:
    """Whether a measure is a ratio; results of one measure agree on that."""
    return any(result.ratios.get(measure, False) for result in results)


def direction(results: Iterable[InvarianceResult], measure: str) -> str:
    """What a measure says, for a title."""
    higher = next(iter(results)).higher_is_better.get(measure)
    return "" if higher is None else f"{'higher' if higher else 'lower'} is more invariant"
