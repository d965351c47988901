"""What an evaluation finds besides the values: samples, transformations, layers, and metrics of predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_invariance.results.table import aligned, format_cell

if TYPE_CHECKING:
    import pandas


#: Names of the layer that is the network's transformed input: the first that no module has.
INPUT_LAYERS = ("input", "network input", "input of the network")


@dataclass(frozen=True, repr=False)
class OutputValues:
    """Values of a metric of predictions and targets, one for each transformation.

    It prints as a table.

    Attributes:
        values: one for each transformation.
        labels: of the transformations.
        higher_is_better: whether higher values are better; None where the metric does not say.
        low, high: bounds of confidence intervals over samples, one for each transformation, with ``confidence`` and for
            metrics that are means over samples, else empty; NaN where all samples have equal values.
        mean_low, mean_high: bounds of the mean over the transformations; None where there are none.
    """

    values: list[float]
    labels: list[str] = field(default_factory=list)
    higher_is_better: bool | None = None
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    mean_low: float | None = None
    mean_high: float | None = None

    @property
    def mean(self) -> float:
        """The mean over the transformations."""
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def worst(self) -> float:
        """The lowest value (the highest where lower is better); NaN if a value or the direction is unknown."""
        if self.higher_is_better is None or not self.values or any(map(math.isnan, self.values)):
            return math.nan
        return min(self.values) if self.higher_is_better else max(self.values)

    @property
    def worst_label(self) -> str:
        """The label of the transformation under which the value is :attr:`worst`; empty if that is unknown."""
        return "" if math.isnan(self.worst) or not self.labels else self.labels[self.values.index(self.worst)]

    def rows(self) -> list[dict[str, Any]]:
        """Return label, value and, where there are intervals, bounds for each transformation."""
        bounds = {"low": self.low, "high": self.high} if self.low else {}
        labels = self.labels or [str(j) for j in range(len(self.values))]
        columns = {"transformation": labels, "value": self.values, **bounds}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a ``DataFrame`` with a row for each transformation (pandas must be installed)."""
        import pandas

        return pandas.DataFrame(self.rows())

    def __repr__(self) -> str:
        ends = f"mean {format_cell(self.mean)}, worst {format_cell(self.worst)}"
        where = f" ({self.worst_label})" if self.worst_label else ""
        rows = self.rows()
        cells = [list(map(format_cell, row.values())) for row in rows]
        return f"{aligned([list(rows[0]), *cells], left=1)}\n{ends}{where}" if rows else ends


@dataclass(kw_only=True, eq=False, repr=False)
class Record:
    """Attributes of an :class:`~lightning_invariance.InvarianceResult` besides its values; explained there."""

    n_samples: int = 0
    n_skipped: int = 0
    input_layer: str = ""
    layer_types: dict[str, str] = field(default_factory=dict)
    transformations: list[str] = field(default_factory=list)
    identity: str = ""
    parameters: dict[str, list[float]] = field(default_factory=dict)
    epoch: int | None = None
    step: int | None = None
    floor: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    reached: dict[str, int] = field(default_factory=dict)
    channel_axis: dict[str, int] = field(default_factory=dict)
    higher_is_better: dict[str, bool | None] = field(default_factory=dict)
    ratios: dict[str, bool] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    biases: dict[str, float] = field(default_factory=dict)
    details: dict[str, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    response: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    response_bounds: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    standard_errors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    confidence: float | None = None
    freedom: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    influences: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    sample_keys: dict[str, Tensor] = field(default_factory=dict)
    sparse: dict[str, dict[str, float]] = field(default_factory=dict)
    outputs: dict[str, OutputValues] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in fields(Record):
            setattr(self, each.name, _copied(getattr(self, each.name)))
        self.skipped = {measure: layers for measure, layers in self.skipped.items() if layers}
        self.outputs = {
            name: found if isinstance(found, OutputValues) else OutputValues(**found)
            for name, found in self.outputs.items()
        }

    def detail(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Return an entry of :attr:`details`: measure → layer → tensor, for measures that have it."""
        found = {
            measure: {layer: entries[name] for layer, entries in layers.items() if name in entries}
            for measure, layers in self.details.items()
        }
        return {measure: layers for measure, layers in found.items() if layers}


def _copied(value: Any) -> Any:
    """Copy containers, but not the numbers and tensors in them."""
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
