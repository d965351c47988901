"""Shared by the figures: checked arguments, axes, colours, colour bars, legends and rendering."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from lightning_invariance.messages import given, number_of
from lightning_invariance.plots.labels import INFINITE, REACHED, in_legend, shorten, without_prefix, wrap
from lightning_invariance.plots.style import NAN
from lightning_invariance.results.intervals import MAX_LEFT_OUT
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.results.table import LayerStatistics

#: One result, or several: by the text of the legend, or in a sequence, numbered from 1.
Results = InvarianceResult | Mapping[str, InvarianceResult] | Sequence[InvarianceResult]

#: Colours that colour-blind readers tell apart (Okabe and Ito 2008), and a marker for each.
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^DvPX"

#: The colours of ratios lie between 1 / k and k: at 1 transformations matter as much as samples do. k is the smallest
#: for which all but this share of the values lie inside, and in this range.
BEYOND, NARROWEST, WIDEST = 0.02, 1.25, 100.0
DIVERGING = "RdBu_r"

#: Neighbouring layers whose values agree within this relative difference share a row: rounding differs between them.
ALIKE = 1e-4

#: The height of axes above others, the largest size of a figure and the longest colour bar, in inches.
ABOVE, LARGEST, LONGEST_BAR = 1.5, 15.0, 4.0

#: More layers than this are not listed in a legend.
MOST_IN_LEGEND = 12


class Scale(NamedTuple):
    """Colours of values."""

    norm: Normalize
    colours: Colormap


class Picture(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        data = BytesIO()
        self.savefig(data, format="png")
        return data.getvalue()


def new_figure(width: float, height: float, size: tuple[float, float] | None = None) -> Figure:
    """A figure of a size in inches, or of the size that the user wants, whose layout makes room for all labels."""
    width, height = size or (width, height)
    figure = Picture(figsize=(min(width, LARGEST), min(height, LARGEST)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def axes_in(ax: Axes | None, width: float, height: float, size: tuple[float, float] | None) -> tuple[Figure, Axes]:
    """The axes to draw into and their figure: the user's, or in a new figure."""
    if ax is None:
        figure = new_figure(width, height, size)
        return figure, figure.add_subplot()
    return figure_of(ax), ax


def figure_of(axes: Axes) -> Figure:
    """The figure of axes, also where they are in a part of it."""
    figure: Figure = axes.figure.figure
    return figure


def inches_of(axes: Axes) -> tuple[float, float]:
    """The width and height of axes, before the layout makes room for labels."""
    box = axes.get_position()
    width, height = figure_of(axes).get_size_inches()
    return float(box.width * width), float(box.height * height)


def new_axes(
    width: float, height: float, above: str | None, size: tuple[float, float] | None = None
) -> tuple[Figure, Axes | None, Axes]:
    """A new figure of a size in inches, low axes with the title ``above`` unless it is None, and axes below them."""
    if above is None:
        figure = new_figure(width, height, size)
        return figure, None, figure.add_subplot()
    figure = new_figure(width, height + ABOVE, size)
    first, second = figure.subplots(2, 1, sharex=True, height_ratios=(ABOVE, height))
    first.set_title(shorten(above, 50), loc="left", fontsize="small")
    first.grid(alpha=0.3)
    return figure, first, second


def show_cells(axes: Axes, values: npt.NDArray[np.float64], scale: Scale) -> None:
    """Draw a cell for each value, the first row on top."""
    shown = within(scale.norm, values)
    axes.imshow(shown, norm=scale.norm, cmap=scale.colours, aspect="auto", interpolation="nearest")


def add_colourbar(figure: Figure, axes: Sequence[Axes], scale: Scale, label: str, height: float) -> None:
    """Add the colour bar of a measure to axes of a height in inches; values beyond it have the colours of its ends."""
    length, span = min(height, LONGEST_BAR), float(scale.norm.vmax or 1) / float(scale.norm.vmin or 1)
    ticks: Any = MaxNLocator(6)
    if isinstance(scale.norm, LogNorm):
        ticks = (
            LogLocator(subs=(1, 2, 5) if span < 1000 else (1,)) if span > 6 else LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
        )
    looks: dict[str, Any] = {"aspect": 6 * length, "shrink": min(1.0, length / height), "anchor": (0, 1), "pad": 0.02}
    values = ScalarMappable(scale.norm, scale.colours)
    bar = figure.colorbar(values, ax=list(axes), extend="both", ticks=ticks, format="%.3g", **looks)
    bar.minorticks_off()
    note = "\n1: as much as between samples" * (scale.colours.name == DIVERGING)
    bar.set_label(wrap(label + note, length))


def key_of_layers(figure: Figure, axes: Sequence[Axes], names: Sequence[str]) -> None:
    """Add a legend for the lines of layers in the first axes, or for many layers a colour bar over the depth."""
    texts = [shorten(name) for name in without_prefix(names)[1]]
    if len(texts) <= MOST_IN_LEGEND:
        handles, _ = axes[0].get_legend_handles_labels()
        figure.legend(handles, map(in_legend, texts), loc="outside right upper", fontsize="small", frameon=False)
        return
    chosen = evenly(len(texts), 6)
    shades = ScalarMappable(Normalize(0, len(texts) - 1), ListedColormap(depth_colours(256)))
    bar = figure.colorbar(shades, ax=list(axes), label="layer", aspect=25)
    bar.set_ticks(chosen, labels=[texts[i] for i in chosen], fontsize="small", parse_math=False)


def render(figure: Figure) -> npt.NDArray[np.uint8]:
    """The pixels of a figure, of shape ``(height, width, 3)``."""
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib has no types for it
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def named(results: Results) -> dict[str, InvarianceResult]:
    """Results by the text of the legend."""
    if isinstance(results, InvarianceResult | str | PathLike):
        return {"": only_one(results)}
    pairs: Any = results.items() if isinstance(results, Mapping) else ((str(i + 1), r) for i, r in enumerate(results))
    found: dict[str, InvarianceResult] = {str(name): only_one(result) for name, result in pairs}
    if not found:
        raise ValueError("Expected argument `results` to hold at least one result, but it is empty.")
    return found


def only_one(result: Any) -> InvarianceResult:
    """Check that an argument is one result.

    Raises:
        TypeError: If it is several results, a file, or something else.
    """
    if not isinstance(result, InvarianceResult):
        hint = "; `InvarianceResult.load` reads a file" if isinstance(result, str | PathLike) else ""
        hint = f" of {len(result)} results: give one, such as `[-1]`" if isinstance(result, list | tuple) else hint
        got = type(result).__name__ if isinstance(result, list | tuple) else given(result)
        raise TypeError(f"Expected argument `result` to be one InvarianceResult, but got {got}{hint}.")
    return result


def first_measure(results: Iterable[InvarianceResult]) -> str:
    """The measure to draw by default: the first of the first result."""
    return next(map(only_one, results)).measures[0]


def limits_of(values: Iterable[float]) -> tuple[float, float] | None:
    """The smallest and largest positive finite values, if there are any."""
    positive = [v for v in values if math.isfinite(v) and v > 0]
    return (min(positive), max(positive)) if positive else None


def scale_of(
    is_ratio: bool, values: Iterable[float], limits: tuple[float, float] | None = None, log: bool = True
) -> Scale:
    """The colour scale of a measure, between ``limits`` or, by default, limits that follow the values.

    Ratios have a diverging scale about 1: blue below, where the layer is more invariant than samples vary, red above.
    Measures with negative values, such as R², have a linear scale.
    """
    values = [value for value in values if math.isfinite(value)]
    if (limits or (min(values, default=0),))[0] < 0:
        low, high = limits or (float(np.quantile(values, BEYOND)), max(values))
        return Scale(Normalize(low, high if high > low else low + 1), _colours("plasma"))
    found = limits or (limits_of_ratios(values) if is_ratio and log else limits_of(values))
    low, high = found or (0.0, 1.0)
    if not log or found is None:
        return Scale(Normalize(0.0 if limits is None else low, high), _colours("plasma"))
    norm = LogNorm(low, high if high > low else low * 10)
    return Scale(norm, _colours(DIVERGING if is_ratio else "plasma"))


def scale_of_response(values: Iterable[float], limits: tuple[float, float] | None = None) -> Scale:
    """The colour scale of responses: from 0, no change, in the palest colour."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = limits or (0.0, max([*finite, 0.0]) or 1.0)
    return Scale(Normalize(low, high), _colours("YlOrRd"))


def limits_of_ratios(values: Iterable[float]) -> tuple[float, float]:
    """Ends of a colour scale that is symmetric about 1, such as 0.5 and 2, given the values that it is to show."""
    positive = [abs(math.log(v)) for v in values if math.isfinite(v) and v > 0]
    k = math.exp(float(np.quantile(positive, 1 - BEYOND))) if positive else NARROWEST
    k = min(max(k, NARROWEST), WIDEST)
    return 1 / k, k


def _colours(name: str) -> Colormap:
    """A colour map with grey for NaN; it holds no green, black or grey itself."""
    return colormaps[name].with_extremes(bad=NAN)


def order_of_layers(results: Iterable[InvarianceResult], measure: str) -> list[str]:
    """The layers of all results, each where its neighbours in its own network are, so that no line goes backwards."""
    order: list[str] = []
    for result in results:
        after = -1
        for layer in result.get(measure, {}):
            if layer in order:
                after = order.index(layer)
            else:
                after += 1
                order.insert(after, layer)
    return order


def rows_of_layers(results: Sequence[InvarianceResult], measure: str) -> dict[str, str]:
    """Layer → its label, such as ``"conv1 + bn1"`` for neighbours whose values agree in all results: the first of them.

    The normalised variance does not change in a batch norm, for instance.
    """
    tables = [{row.layer: row for row in result.table(measure)} for result in results if measure in result]

    def is_alike(one: str, other: str) -> bool:
        return all(_is_alike(rows.get(one), rows.get(other)) for rows in tables)

    return joined(order_of_layers(results, measure), is_alike)


def joined(layers: Iterable[str], is_alike: Callable[[str, str], bool]) -> dict[str, str]:
    """The first of each group of neighbours that are alike → the label of the group."""
    groups: list[list[str]] = []
    for layer in layers:
        if groups and is_alike(groups[-1][-1], layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return {group[0]: " + ".join([group[0], *(_within(group[0], name) for name in group[1:])]) for group in groups}


def _is_alike(one: LayerStatistics | None, other: LayerStatistics | None) -> bool:
    if one is None or other is None:
        return one is other
    numbers = [(getattr(one, name), getattr(other, name)) for name in ("mean", "std", "min", "max")]
    close = all(a == b or abs(a - b) <= ALIKE * max(abs(one.mean), abs(one.max)) for a, b in numbers)
    return close and one.shape == other.shape and (one.infinite, one.dead) == (other.infinite, other.dead)


def _within(first: str, name: str) -> str:
    """The part of a layer's name that differs from the module of the first one: ``bn1`` of ``layer1.0.bn1``."""
    module = first.rpartition(".")[0] + "."
    return name.removeprefix(module) if len(module) > 1 else name


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the numbers 0, 1, …, count − 1, evenly spread, with the first and the last."""
    return sorted({round(x) for x in np.linspace(0, count - 1, min(count, most))})


def title_of(result: InvarianceResult, name: str) -> str:
    """The title of a picture: measure or monitor, and the set of transformations."""
    varying = [parameter for parameter, values in result.parameters.items() if len(set(values)) > 1]
    kind = f" ({', '.join(varying)})" if varying else ""
    return f"{name}: {number_of(result.n_samples, 'sample')} × {len(result.transformations)} transformations{kind}"


def depth_colours(count: int) -> list[Any]:
    """A colour for the line of each layer, from the first (dark) to the last (light)."""
    return [colormaps["plasma"](0.88 * i / max(count - 1, 1)) for i in range(count)]


def within(scale: Normalize, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Clip values to a scale, because a logarithm has no place for 0; infinite values become NaN."""
    finite = np.where(np.isinf(values), np.nan, values)
    return np.clip(finite, scale.vmin, scale.vmax)


def width_of(count: int) -> float:
    """The width in inches of a figure with so many layers along x, with 1.5 inches for numbers and colour bar."""
    return min(LARGEST, max(6, 2.5 + 0.4 * min(count, 15) + 0.18 * max(count - 15, 0)))


def depths(count: int) -> npt.NDArray[np.float64]:
    """The depth of each layer, from 0 % for the first to 100 % for the last."""
    return np.linspace(0, 100, count) if count > 1 else np.array([100.0])


def marks_of(results: Iterable[InvarianceResult], measure: str) -> dict[str, str]:
    """Layer → the marks beside its name: reached by some samples only, and infinite units."""
    reached: set[str] = set()
    infinite: set[str] = set()
    for result in results:
        reached.update(result.reached)
        rows = result.table(measure) if measure in result else ()
        infinite.update(row.layer for row in rows if row.infinite and row.share_infinite > MAX_LEFT_OUT)
    return {layer: REACHED * (layer in reached) + INFINITE * (layer in infinite) for layer in reached | infinite}


def is_ratio(results: Iterable[InvarianceResult], measure: str) -> bool:
    """Whether a measure is a ratio; results of one measure agree on that."""
    return any(result.ratios.get(measure, False) for result in results)
