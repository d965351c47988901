"""The result of a comparison of two evaluations: differences with their intervals and p-values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from lightning_invariance.messages import number_of, some
from lightning_invariance.results.drawing import drawn
from lightning_invariance.results.table import aligned, format_cell

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

#: Unit of a comparison → the question that its test answers.
QUESTIONS = {
    "the same samples": "Do these two networks also differ on other samples? Paired test, of equal samples.",
    "different samples": "Do these two networks also differ on other samples? The samples are different: an unpaired"
    " test, which is less sensitive.",
    "other groups of the same samples": "Do these two networks also differ on other samples? The samples are equal, but"
    " in another order, and so in other groups: an unpaired test, which is less sensitive.",
    "seeds": "Do networks of other seeds also differ, on these samples? Welch's test, one mean for each seed.",
}


@dataclass(frozen=True)
class Difference:
    """One row of a :class:`Comparison`: a layer, or the network.

    Attributes:
        layer: its name in the first result; ``"network"`` for the mean over layers.
        a, b: the mean of the layer in the first and in the second result.
        difference: b − a.
        low, high: bounds of its confidence interval; not adjusted for the number of layers.
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


@dataclass(eq=False, repr=False)
class Comparison(Mapping[str, Difference]):
    """The value of :func:`compare`: layer → :class:`Difference`, in the order of the first network.

    Attributes:
        measure: its name.
        rows: the differences of the layers.
        network: the difference of the means over these layers.
        unit: what is independent in the test: ``"the same samples"``, ``"different samples"``, ``"other groups of the
            same samples"`` or ``"seeds"``.
        count: number of samples, groups or seeds of each result.
        confidence: of the intervals; 1 − confidence is the level of the tests.
        margin: the largest difference that does not matter; None where none was named.
        unmatched: layers that only one of the two has.
        higher_is_better: whether higher values of the measure are more invariant; None where neither direction is.
        names: of the two results.
        quality: ``"invariant"`` or ``"equivariant"``.
    """

    measure: str
    rows: Sequence[Difference]
    network: Difference
    unit: str
    count: tuple[int, int]
    confidence: float
    margin: float | None
    unmatched: Sequence[str]
    higher_is_better: bool | None
    names: tuple[str, str] = ("a", "b")
    quality: str = "invariant"

    def __post_init__(self) -> None:
        self.rows, self.unmatched = _adjusted(self.rows), list(self.unmatched)

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
    def question(self) -> str:
        """The question that the test answers."""
        return QUESTIONS[self.unit]

    @property
    def differing(self) -> list[str]:
        """The layers that differ: their adjusted p-value is below 1 − confidence."""
        return [row.layer for row in self.rows if row.p < 1 - self.confidence]

    @property
    def equivalent(self) -> list[str]:
        """The layers that are equivalent within ``margin``."""
        return [row.layer for row in self.rows if row.equivalent < 1 - self.confidence]

    @property
    def not_worse(self) -> list[str]:
        """The layers for which the first is not less invariant than the second by ``margin`` or more."""
        return [row.layer for row in self.rows if row.not_worse < 1 - self.confidence]

    @property
    def verdict(self) -> str:
        """The result in one sentence: which is more invariant, in how many layers, and by how much at the last."""
        one, other = self.names
        rows = [row for row in self.rows if row.layer in self.differing]
        if not rows:
            return f"{one} and {other} cannot be told apart in any of {number_of(len(self.rows), 'layer')}."
        if self.higher_is_better is None:
            return f"{one} and {other} differ in {len(rows)} of {number_of(len(self.rows), 'layer')}."
        counts = dict.fromkeys((other, one), 0)
        for row in rows:
            counts[self._more_invariant(row)] += 1
        best = sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])
        text = f"{best[0]} is more {self.quality} in {counts[best[0]]} of {number_of(len(self.rows), 'layer')}"
        text += f", {best[1]} in {counts[best[1]]}" if best[1:] else ""
        if (last := self.rows[-1]) in rows:
            half = format_cell(last.high - last.difference)
            whose = f"{self._more_invariant(last)} " if best[1:] else ""
            text += f"; at the last, {last.layer}, {whose}by {format_cell(abs(last.difference))} ± {half}"
        others = len(self.rows) - len(rows)
        return text + (f"; the other {others} cannot be told apart." if others else ".")

    def _more_invariant(self, row: Difference) -> str:
        return self.names[1] if (row.difference > 0) == self.higher_is_better else self.names[0]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a ``DataFrame`` with a row for each layer and one for the network (pandas must be installed)."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in (*self.rows, self.network)])

    def plot(self) -> Figure:
        """Draw the differences and their intervals: :func:`lightning_invariance.plots.compare`."""
        return drawn("comparison", "draw_comparison", self)

    def __str__(self) -> str:
        names = ["layer", "a", "b", "difference", "low", "high", "p"]
        names += [] if self.margin is None else ["equivalent", "not_worse"]
        names += ["doubt"] if any(row.doubt for row in self.rows) else []
        table = [
            [*({"a": self.names[0], "b": self.names[1]}.get(name, name) for name in names)],
            *([format_cell(getattr(row, name)) for name in names] for row in (*self.rows, self.network)),
        ]
        for cells, row in zip(table[1:], (*self.rows, self.network), strict=True):
            cells[names.index("p")] += " *" if row.p < 1 - self.confidence else "  "
        margin = "" if self.margin is None else f" Margin {self.margin:g}."
        about = [
            self.verdict,
            f"{self.measure}, {self.names[1]} − {self.names[0]}. {self.question}",
            f"{self.confidence:.0%} intervals; p-values adjusted by Holm's method over"
            f" {number_of(len(self.rows), 'layer')}, * below {1 - self.confidence:.2g}.{margin}",
        ]
        about += [f"Only one of them has {some(self.unmatched)}."] if self.unmatched else []
        return "\n".join([*about, aligned(table, left=len(names))])

    __repr__ = __str__


def _adjusted(rows: Sequence[Difference]) -> list[Difference]:
    """Adjust all p-values by Holm's method, each kind as one family."""
    found = list(rows)
    for name in ("p", "equivalent", "not_worse"):
        adjusted = holm([getattr(row, name) for row in rows])
        found = [replace(row, **{name: p}) for row, p in zip(found, adjusted, strict=True)]  # type: ignore[arg-type]
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979), in the given order; NaN stay NaN and do not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = list(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted
