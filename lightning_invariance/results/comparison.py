"""What a comparison of two evaluations found: differences with their intervals and p-values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from lightning_invariance.messages import number_of, some
from lightning_invariance.results.drawing import drawn

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

#: What a comparison by each kind of unit says.
QUESTIONS = {
    "the same samples": "Would these two networks differ on other samples, too? The samples are the same: paired.",
    "different samples": "Would these two networks differ on other samples, too? The samples are not the same, so that"
    " the test is unpaired, and sees less.",
    "other groups of the same samples": "Would these two networks differ on other samples, too? The samples are the"
    " same, but came in another order, so that other groups of them were compared: unpaired, which sees less.",
    "seeds": "Would networks of other seeds differ, too, on these samples? Welch's test, a number each.",
}


@dataclass(frozen=True)
class Difference:
    """One row of a :class:`Comparison`: a layer, or the network.

    Attributes:
        layer: its name in the first result; ``"network"`` for the mean over layers.
        a: the mean of the layer in the first result.
        b: that in the second.
        difference: b − a.
        low: lower bound of its confidence interval; not adjusted for the number of layers.
        high: upper bound.
        p: two-sided p-value of no difference, adjusted for the number of layers by Holm's method.
        equivalent: p-value of a difference of ``margin`` or more, adjusted; small: they are equivalent. NaN without.
        not_worse: p-value of b being more invariant than a by ``margin`` or more, adjusted; small: a is not worse.
        doubt: why the interval may be too narrow.
    """

    layer: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    equivalent: float = math.nan
    not_worse: float = math.nan
    doubt: str = ""


class Comparison(Mapping[str, Difference]):
    """What :func:`compare` found: layer → :class:`Difference`, in the order of the first network.

    Attributes:
        measure: its name.
        rows: the differences of the layers.
        network: that of the mean over these layers.
        unit: what was independent: ``"the same samples"``, ``"different samples"``, ``"other groups of the same
            samples"`` or ``"seeds"``.
        question: what the test answers.
        count: how many of them there were; of measures that look at samples in groups, how many groups.
        confidence: of the intervals; 1 − confidence is the level of the tests.
        margin: the largest difference that does not matter; None where none was named.
        unmatched: layers that only one of the two has.
        higher_is_better: whether higher values of the measure are more invariant; None where neither is.
    """

    def __init__(
        self,
        measure: str,
        rows: Sequence[Difference],
        network: Difference,
        unit: str,
        count: tuple[int, int],
        confidence: float,
        margin: float | None,
        unmatched: Sequence[str],
        higher_is_better: bool | None,
    ) -> None:
        self.measure, self.network, self.unit, self.count = measure, network, unit, count
        self.rows = _adjusted(rows)
        self.question, self.confidence, self.margin = QUESTIONS[unit], confidence, margin
        self.unmatched, self.higher_is_better = list(unmatched), higher_is_better

    def __getitem__(self, layer: str) -> Difference:
        for row in self.rows:
            if row.layer == layer:
                return row
        raise KeyError(f"No layer {layer!r} in this comparison; it has {some(self)}.")

    def __iter__(self) -> Iterator[str]:
        return (row.layer for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def differing(self) -> list[str]:
        """The layers that differ: whose adjusted p-value is below 1 − confidence."""
        return [row.layer for row in self.rows if row.p < 1 - self.confidence]

    @property
    def equivalent(self) -> list[str]:
        """The layers that are equivalent within ``margin``."""
        return [row.layer for row in self.rows if row.equivalent < 1 - self.confidence]

    @property
    def not_worse(self) -> list[str]:
        """The layers for which the first is not less invariant than the second by ``margin`` or more."""
        return [row.layer for row in self.rows if row.not_worse < 1 - self.confidence]

    def to_pandas(self) -> pandas.DataFrame:
        """A ``DataFrame`` with a row for each layer and one for the network (pandas must be installed)."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in (*self.rows, self.network)])

    def plot(self) -> Figure:
        """The picture: :func:`lightning_invariance.plots.compare`."""
        return drawn("comparison.draw_comparison", self)

    def __str__(self) -> str:
        names = ["layer", "a", "b", "difference", "low", "high", "p"]
        if self.margin is not None:
            names += ["equivalent", "not_worse"]
        if any(row.doubt for row in self.rows):
            names.append("doubt")
        table = [names, *([_cell(getattr(row, name)) for name in names] for row in (*self.rows, self.network))]
        for cells, row in zip(table[1:], (*self.rows, self.network), strict=True):
            cells[names.index("p")] += " *" if row.p < 1 - self.confidence else "  "
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(f"{cell:{w}s}" for cell, w in zip(cells, widths, strict=True)).rstrip() for cells in table]
        about = [f"{self.measure}, b − a. {self.question}"]
        margin = "" if self.margin is None else f" Margin {self.margin:g}."
        about.append(
            f"{self.confidence:.0%} intervals; p by Holm over {number_of(len(self.rows), 'layer')},"
            f" * below the level.{margin}"
        )
        if self.unmatched:
            about.append(f"Only one of them has {some(self.unmatched)}.")
        return "\n".join([*about, *lines])

    __repr__ = __str__


def _adjusted(rows: Sequence[Difference]) -> list[Difference]:
    """The rows with all p-values adjusted by Holm's method; each kind is a family."""
    found = list(rows)
    for name in ("p", "equivalent", "not_worse"):
        adjusted = holm([getattr(row, name) for row in rows])
        found = [replace(row, **{name: p}) for row, p in zip(found, adjusted, strict=True)]  # type: ignore[arg-type]
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979), in the same order; NaN are none and do not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = list(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
