"""Highest values of rows and of all activations, and firing rates of rows, for Goodfellow's measure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.rows import N_SAMPLES, Context, Rows, States

#: Largest size of ``peaks`` for one layer, in bytes.
MOST_PEAKS = 2**25


@dataclass(frozen=True)
class Peaks(Accumulator):
    """The highest value of each row, ``peaks`` ``(signs, places, k)``; empty if there are more rows than ``capacity``.

    The first ``n_samples`` places are filled.

    Attributes:
        signs: 1 for the highest value of each row, −1 for the lowest (times −1).
        capacity: largest number of rows; fewer in layers whose peaks would exceed :data:`MOST_PEAKS` bytes.
        expected: number of rows in all; 0 if unknown.
    """

    signs: tuple[int, ...]
    capacity: int
    expected: int = 0

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"peaks": torch.zeros(0, 0, 0)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the highest values of rows within the capacity."""
        x, before = rows.flat, rows.before
        after, k = before + len(x), x.shape[2]
        room = min(self.capacity, MOST_PEAKS // (len(self.signs) * k * x.element_size()))
        if max(after, self.expected) > room or (before and not states["peaks"].numel()):
            states["peaks"] = states["peaks"][:0]
            return
        if after > states["peaks"].shape[1]:
            places = min(room, max(self.expected, 2 * after))
            peaks = torch.zeros(len(self.signs), places, k, dtype=x.dtype, device=x.device)
            if before:
                peaks[:, :before] = states["peaks"][:, :before]
            states["peaks"] = peaks
        for own, sign in zip(states["peaks"], self.signs, strict=True):
            own[before:after] = x.amax(1) if sign > 0 else -x.amin(1)

    def merge(self, a: States, b: States) -> States:
        """The highest values of the rows of both, within the capacity."""
        rows = [(states["peaks"], int(states[N_SAMPLES])) for states in (a, b)]
        fit = all(peaks.numel() for peaks, _ in rows) and sum(n for _, n in rows) <= self.capacity
        return {"peaks": torch.cat([peaks[:, :n] for peaks, n in rows], 1) if fit else a["peaks"][:0]}

    def prepared(self, context: Context) -> Accumulator:
        """Reserve places for the number of samples."""
        return replace(self, expected=context.n_samples or 0)


@dataclass(frozen=True)
class Extremes(Accumulator):
    """The highest values of each activation, in descending order: ``extremes`` ``(signs, at most capacity, k)``.

    Attributes:
        signs: 1 for the highest values, −1 for the lowest (times −1).
        capacity: how many values are kept.
    """

    signs: tuple[int, ...]
    capacity: int

    grows = True
    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"extremes": torch.zeros(0, 0, 0, dtype=torch.float64)}

    def add(self, states: States, rows: Rows) -> None:
        """Keep the highest values."""
        values = rows.flat.flatten(0, 1)
        found = torch.stack([sign * values for sign in self.signs]).to(states["extremes"].dtype)
        states["extremes"] = self._highest([states["extremes"], found])

    def merge(self, a: States, b: States) -> States:
        """The highest values of both."""
        return {"extremes": self._highest([a["extremes"], b["extremes"]])}

    def _highest(self, found: list[Tensor]) -> Tensor:
        values = torch.cat([each for each in found if each.numel()], 1)
        return values.topk(min(self.capacity, values.shape[1]), dim=1).values


@dataclass(frozen=True)
class Firing(Accumulator):
    """The number of rows with a value above ``thresholds``: ``firing_rows``; both are ``(signs, k)``.

    It belongs to a second pass, whose thresholds are computed from the first pass and the attributes.

    Attributes:
        signs: 1 for units that fire at high values, −1 for units that fire at low values.
        alpha: fraction of values above the threshold.
        threshold: how the threshold is estimated, see :class:`~lightning_invariance.measures.Goodfellow`.
    """

    signs: tuple[int, ...]
    alpha: float
    threshold: str

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first pass has ended."""
        matrix = torch.zeros(0, 0, dtype=torch.float64)
        return {"thresholds": matrix, "firing_rows": matrix.long()}

    def add(self, states: States, rows: Rows) -> None:
        """Count rows that fire."""
        levels = rounded_down(states["thresholds"], rows.values.dtype)
        found = [(sign * rows.flat > level).any(1).sum(0) for sign, level in zip(self.signs, levels, strict=True)]
        states["firing_rows"] = states["firing_rows"] + torch.stack(found)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both, whose thresholds are equal."""
        return {"thresholds": a["thresholds"], "firing_rows": a["firing_rows"] + b["firing_rows"]}


def rounded_down(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert thresholds to the type of activations, rounded down: comparisons then give the results of float64."""
    levels = thresholds.to(dtype)
    return torch.where(levels.double() > thresholds, levels.nextafter(-torch.full_like(levels, torch.inf)), levels)
