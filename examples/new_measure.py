"""Measures of your own: the range within rows over the range within columns, and one that needs a second pass.

    python examples/new_measure.py

They work wherever the measures of the package do: in ``evaluate``, in the callback, in distributed runs, within
``Stratified`` (with one pass), in tables and pictures. ``tests/test_new_measure.py`` holds them to the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_invariance import evaluate, rotations
from lightning_invariance.accumulators import Accumulator, Rows, States
from lightning_invariance.measures import Measure, NormalizedVariance, Sums, quotient


@dataclass(frozen=True)
class Ranges(Accumulator):
    """The ranges of all rows, added up, and the lowest and the highest value of each column."""

    def empty(self) -> States:
        """The states before the first row."""
        return {"row_ranges": torch.zeros(0), "low": torch.zeros(0, 0), "high": torch.zeros(0, 0)}

    def add(self, states: States, rows: Rows) -> None:
        """Add rows to the states, in place."""
        x = rows.flat.double()  # (samples, transformations, activations)
        added = {"row_ranges": (x.amax(1) - x.amin(1)).sum(0), "low": x.amin(0), "high": x.amax(0)}
        states.update(self.merge(states, added) if rows.before else added)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        low, high = torch.minimum(a["low"], b["low"]), torch.maximum(a["high"], b["high"])
        return {"row_ranges": a["row_ranges"] + b["row_ranges"], "low": low, "high": high}


class NormalizedRange(Measure):
    """Normalized Range: the mean range within rows over the mean range within columns; 0 is invariant."""

    needs = (Ranges(),)
    is_ratio = True
    least_samples = 2

    def value(self, sums: Sums) -> Tensor:
        """The value of every activation."""
        return quotient(sums["row_ranges"] / sums.n_samples, (sums["high"] - sums["low"]).mean(0))


@dataclass(frozen=True)
class RowsAbove(Accumulator):
    """How many rows have a range above ``level``, which is ``factor`` times the mean range that a first pass found."""

    factor: float

    def empty(self) -> States:
        """The states before the second pass."""
        return {"level": torch.zeros(0), "above": torch.zeros(0, dtype=torch.long)}

    def add(self, states: States, rows: Rows) -> None:
        """Count rows above the level."""
        ranges = (rows.flat.amax(1) - rows.flat.amin(1)).double()
        states["above"] = states["above"] + (ranges > states["level"]).sum(0)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {"level": a["level"], "above": a["above"] + b["above"]}


class WideRows(Measure):
    """Wide rows: the share of samples whose range is more than ``factor`` times the mean range; lower is more even."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__(needs=[Ranges()], needs_again=[RowsAbove(factor)])
        self.factor = factor

    def second_pass(self, sums: Sums) -> States:
        """The level, and no row above it so far."""
        level = self.factor * sums["row_ranges"] / sums.n_samples
        return {"level": level, "above": torch.zeros_like(level, dtype=torch.long)}

    def value(self, sums: Sums) -> Tensor:
        """The share of every activation."""
        return sums["above"].double() / sums.n_samples


def main() -> None:
    """Print the new measures beside the normalised variance for a small network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    measures = [NormalizedRange(), WideRows(), NormalizedVariance()]
    result = evaluate(model, torch.rand(64, 1, 16, 16), rotations(8), measures)
    print(result)


if __name__ == "__main__":
    main()
