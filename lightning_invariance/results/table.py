"""Statistics of the values of a layer, and a table of them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from torch import Tensor

from lightning_invariance.results.intervals import NOTABLE, Interval


@dataclass(frozen=True)
class LayerStatistics:
    """One row of :meth:`InvarianceResult.table`.

    Attributes:
        layer: its name.
        shape: of the activation; ``(channels, height, width)`` for feature maps.
        mean: over the finite values; NaN if there are none. The same for ``std`` (n − 1), ``min`` and ``max``.
        std: see mean.
        min: see mean.
        max: see mean.
        dead: how many activations never changed (0/0).
        infinite: how many values are infinite (x/0).
        nan: how many values are NaN: the activation was NaN or infinite itself, or the measure is undefined.
        samples: how many samples reached the layer; 0 where that is not known. Tables show it where layers differ.
        low: of the confidence interval of the mean; NaN where there is none, and then not shown. So is ``high``.
        high: see low.
        doubt: why the interval may be too narrow; see :class:`~lightning_invariance.results.intervals.Interval`.
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
    low: float = math.nan
    high: float = math.nan
    doubt: str = ""

    @property
    def share_infinite(self) -> float:
        """Which share of the values is infinite, and so not in the mean."""
        return self.infinite / max(1, math.prod(self.shape))

    @property
    def share_left_out(self) -> float:
        """Which share of the values is infinite or NaN, and so not in the mean."""
        return (self.infinite + self.nan) / max(1, math.prod(self.shape))

    @property
    def share_dead(self) -> float:
        """Which share of the activations never changed."""
        return self.dead / max(1, math.prod(self.shape))

    @classmethod
    def of(cls, layer: str, values: Tensor, dead: Tensor | None, samples: int = 0) -> LayerStatistics:
        """Summarise the values of a layer."""
        is_finite = values.isfinite()
        every = bool(is_finite.all())
        finite = values.flatten() if every else values[is_finite]
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
            infinite=0 if every else int(values.isinf().sum()),
            nan=0 if every else int(values.isnan().sum()),
            samples=samples,
        )


class Table(list[LayerStatistics]):
    """Rows of statistics, one a layer, that print as a table."""

    def with_intervals(self, intervals: Mapping[str, Interval]) -> Table:
        """The same rows with the intervals of their means, by layer."""
        known = [intervals.get(row.layer) for row in self]
        return Table(
            row if each is None else replace(row, low=each.low, high=each.high, doubt=each.doubt)
            for row, each in zip(self, known, strict=True)
        )

    def cells(self) -> list[list[str]]:
        """The table as text, the heading first."""
        names = [field.name for field in fields(LayerStatistics)]
        if len({row.samples for row in self}) < 2:
            names.remove("samples")
        if all(math.isnan(row.low) for row in self):
            names = [name for name in names if name not in ("low", "high")]
        if not any(row.doubt for row in self):
            names.remove("doubt")
        rows = [[_cell(getattr(row, name)) for name in names] for row in self]
        for row, cells in zip(self, rows, strict=True):
            for name, share in (("infinite", row.share_infinite), ("dead", row.share_dead)):
                if share > NOTABLE:
                    cells[names.index(name)] += f" ({share:.0%})"
        return [names, *rows]

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zipped))
            for zipped in (list(zip(row, widths, strict=True)) for row in cells)
        ]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        heading, *rows = self.cells()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return "×".join(map(str, value)) or "scalar"
    return str(value)
