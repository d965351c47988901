"""Variances within rows that come in parts, without any sum for each column."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_invariance.accumulators.base import Accumulator, Rows, States


@dataclass(frozen=True)
class LongRows(Accumulator):
    """The variances within rows longer than a batch, in constant memory: four numbers for each activation.

    ``row_variances`` ``(k,)``, summed over complete rows. Of rows that are not complete yet ``row_reference``, the
    first value, ``row_sums`` and ``row_squares`` about it, each ``(rows, k)``, and ``row_length`` ``()``, the number of
    columns so far.

    Attributes:
        squared: whether variances or standard deviations are summed.
    """

    squared: bool = True

    takes_parts = True
    cpu_states = ("row_length",)

    def empty(self) -> States:
        """The states before the first row."""
        row = torch.zeros(0, 0, dtype=torch.float64)
        return {
            "row_variances": torch.zeros(0, dtype=torch.float64),
            "row_reference": row,
            "row_sums": row,
            "row_squares": row,
            "row_length": torch.tensor(0),
        }

    def add(self, states: States, rows: Rows) -> States:
        """The states after complete rows, or after a part of some rows."""
        x = rows.flat.double()
        states = dict(states)
        if not int(states["row_length"]):
            states["row_reference"] = x[:, 0].clone()  # a constant row deviates from it by exactly 0
            states["row_sums"] = states["row_squares"] = torch.zeros_like(states["row_reference"])
        deviations = x - states["row_reference"][:, None]
        states["row_sums"] = states["row_sums"] + deviations.sum(1)
        states["row_squares"] = states["row_squares"] + deviations.square().sum(1)
        states["row_length"] = states["row_length"] + x.shape[1]
        return self._completed(states) if rows.last else states

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both, which are complete."""
        return {**a, "row_variances": a["row_variances"] + b["row_variances"]}

    def _completed(self, states: States) -> States:
        m = int(states["row_length"])
        variances = (states["row_squares"] - states["row_sums"].square() / m).clamp_min(0) / (m - 1)
        total = (variances if self.squared else variances.sqrt()).sum(0)
        before = states["row_variances"]
        return {**self.empty(), "row_variances": before + total if before.numel() else total}
