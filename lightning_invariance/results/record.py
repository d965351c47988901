"""What an evaluation finds besides the values: samples, transformations, layers, and metrics of predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class OutputValues:
    """Values of a metric of predictions and targets, one for each transformation.

    Attributes:
        values: one for each transformation.
        higher_is_better: whether higher values are better; None where the metric does not say.
        low, high: bounds of confidence intervals over samples, one for each transformation, with ``confidence`` and for
            metrics that are means over samples, else empty; NaN where all samples have equal values.
        mean_low, mean_high: bounds of the mean over the transformations; None where there are none.
    """

    values: list[float]
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


@dataclass(kw_only=True, eq=False, repr=False)
class Record:
    """Attributes of an :class:`~lightning_invariance.InvarianceResult` besides its values; explained there."""

    n_samples: int = 0
    n_skipped: int = 0
    transformations: list[str] = field(default_factory=list)
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


def _copied(value: Any) -> Any:
    """Copy containers, but not the numbers and tensors in them."""
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
