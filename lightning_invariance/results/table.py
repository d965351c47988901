"""Statistics of the values of each layer, printed as a table."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from lightning_invariance.results.intervals import MAX_LEFT_OUT, Interval


@dataclass(frozen=True)
class LayerStatistics:
    """One row of :meth:`InvarianceResult.table`.

    Attributes:
        layer: its name.
        shape: of the activation; ``(channels, height, width)`` for feature maps.
        mean, std, min, max: of the finite values, ``std`` with n − 1; NaN if there are none.
        dead: how many activations never change (0/0).
        infinite: how many values are infinite (x/0).
        nan: how many values are NaN: the activation was NaN or infinite itself, or the measure is undefined.
        samples: how many samples passed through the layer; 0 if unknown. Shown where layers differ.
        low, high: bounds of the confidence interval of the mean; NaN where there is none, and then not shown.
        live_mean: mean of the finite values of activations that are not dead. Shown where some are.
        doubt: why the interval may be too narrow; see :class:`~lightning_invariance.results.intervals.Interval`.
        type: class of its module, such as ``Conv2d``; empty if unknown.
        by_class: mean of the finite values for each class; empty without classes.
    """

    layer: str
    shape: tuple[int, ...]
    mean: float
    std: float
    min: float
    max: float
    dead: int
    infinite: int
    nan: int
    samples: int = 0
    live_mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    doubt: str = ""
    type: str = ""
    by_class: tuple[float, ...] = ()

    @property
    def share_infinite(self) -> float:
        """Fraction of the values that are infinite, and so not in the mean."""
        return self.infinite / max(1, math.prod(self.shape))

    @property
    def share_left_out(self) -> float:
        """Fraction of the values that are infinite or NaN, and so not in the mean."""
        return (self.infinite + self.nan) / max(1, math.prod(self.shape))

    @property
    def share_dead(self) -> float:
        """Fraction of the activations that never change."""
        return self.dead / max(1, math.prod(self.shape))

    @classmethod
    def of(cls, layer: str, values: Tensor, dead: Tensor | None, samples: int = 0) -> LayerStatistics:
        """Summarise the values of a layer."""
        is_finite = values.isfinite()
        all_finite = bool(is_finite.all())
        finite = values.flatten() if all_finite else values[is_finite]
        live = finite if dead is None or not bool(dead.any()) else values[is_finite & ~dead.reshape(values.shape)]
        some = finite.numel() > 0
        low, high = (float(limit) for limit in finite.aminmax()) if some else (math.nan, math.nan)
        return cls(
            layer=layer,
            shape=tuple(values.shape),
            mean=float(finite.mean()) if some else math.nan,
            std=float(finite.std()) if finite.numel() > 1 else (0.0 if some else math.nan),
            min=low,
            max=high,
            dead=0 if dead is None else int(dead.sum()),
            infinite=0 if all_finite else int(values.isinf().sum()),
            nan=0 if all_finite else int(values.isnan().sum()),
            samples=samples,
            live_mean=float(live.mean()) if live.numel() else math.nan,
        )


#: The columns of a printed table.
COLUMNS = (
    "layer",
    "type",
    *(each.name for each in fields(LayerStatistics)[1:] if each.name not in ("type", "by_class")),
)


class Table(list[LayerStatistics]):
    """A list of statistics, one row for each layer, that prints as a table."""

    def with_intervals(self, intervals: Mapping[str, Interval]) -> Table:
        """Return the rows with the intervals of their means, by layer."""
        return Table(
            replace(row, low=each.low, high=each.high, doubt=each.doubt) if (each := intervals.get(row.layer)) else row
            for row in self
        )

    def cells(self) -> list[list[str]]:
        """Format the heading and the rows."""
        shown = {
            "type": any(row.type for row in self),
            "samples": len({row.samples for row in self}) > 1,
            "live_mean": any(row.dead for row in self),
            **dict.fromkeys(("low", "high"), any(not math.isnan(row.low) for row in self)),
            "doubt": any(row.doubt for row in self),
        }
        names = [name for name in COLUMNS if shown.get(name, True)]
        classes = [f"class {label}" for label in range(max((len(row.by_class) for row in self), default=0))]
        rows = [[format_cell(getattr(row, name)) for name in names] for row in self]
        for row, cells in zip(self, rows, strict=True):
            for name, fraction in (("infinite", row.share_infinite), ("dead", row.share_dead)):
                if fraction > MAX_LEFT_OUT:
                    cells[names.index(name)] += f" ({fraction:.0%})"
            cells += [format_cell(value) for value in row.by_class]
        return [[*names, *classes], *rows]

    def __str__(self) -> str:
        cells = self.cells()
        return aligned(cells, left=1 + cells[0].index("shape"))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        heading, *rows = self.cells()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class Worst:
    """The transformation that changes a layer most.

    Attributes:
        layer: its name.
        label: of the transformation.
        value: the response of the layer to it: 0 for no change; for ratios 1 for a change as large as between samples.
        low, high: bounds of its confidence interval; NaN where there is none, and then not shown.
    """

    layer: str
    label: str
    value: float
    low: float = math.nan
    high: float = math.nan


class WorstTable(list[Worst]):
    """A list of the worst transformations, one for each layer, that prints as a table."""

    def __str__(self) -> str:
        bounds = ["low", "high"] if any(not math.isnan(row.low) for row in self) else []
        names = ["layer", "label", "value", *bounds]
        heading = ["layer", "worst", "change", *bounds]
        return aligned([heading, *([format_cell(getattr(row, name)) for name in names] for row in self)], left=2)

    __repr__ = __str__


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Print cells in columns: the first ``left`` ones left-aligned, the others right-aligned."""
    columns = [(max(map(len, column)), "<" if i < left else ">") for i, column in enumerate(zip(*rows, strict=True))]
    lines = (
        "  ".join(f"{cell:{side}{width}}" for cell, (width, side) in zip(row, columns, strict=True)) for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def format_cell(value: object) -> str:
    """Format a number, a shape or a text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return "×".join(map(str, value)) or "scalar"
    return str(value)
