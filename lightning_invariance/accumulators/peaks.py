"""The highest values of rows and of whole ST matrices, and how often rows fire, for Goodfellow's measure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import N_SAMPLES, Accumulator, Context, Rows, States

#: The highest values of the rows of a layer may take so many bytes.
MOST_PEAKS = 2**25


@dataclass(frozen=True)
class Peaks(Accumulator):
    """The highest value of each row, as long as those of all rows have room: ``peaks`` ``(signs, places, k)``.

    ``peaks`` is empty once there were more rows than room. The first ``n_samples`` places are filled.

    Attributes:
        signs: 1 for the highest, −1 for the lowest value (times −1) of each row.
        capacity: the most rows; fewer in layers where they would take more than :data:`MOST_PEAKS` bytes.
        expected: how many rows there will be; 0 where that is not known.
    """

    signs: tuple[int, ...]
    capacity: int
    expected: int = 0

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"peaks": torch.zeros(0, 0, 0)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the highest values of rows, if there is room."""
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
        """The highest values of the rows of both, if they have room."""
        rows = [(states["peaks"], int(states[N_SAMPLES])) for states in (a, b)]
        fit = all(peaks.numel() for peaks, _ in rows) and sum(n for _, n in rows) <= self.capacity
        return {"peaks": torch.cat([peaks[:, :n] for peaks, n in rows], 1) if fit else a["peaks"][:0]}

    def prepared(self, context: Context) -> Accumulator:
        """With the number of samples."""
        return replace(self, expected=context.n_samples or 0)


@dataclass(frozen=True)
class Extremes(Accumulator):
    """The highest of all values of each activation, in order: ``extremes`` ``(signs, at most capacity, k)``.

    Attributes:
        signs: 1 for the highest, −1 for the lowest values (times −1).
        capacity: how many.
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
    """How many rows hold a value above ``thresholds`` ``(signs, k)``: ``firing_rows`` of the same shape.

    For a second pass, which begins with thresholds that follow from the first pass and from the attributes.

    Attributes:
        signs: 1 where high values fire, −1 where low ones do.
        alpha: share of values that should fire.
        threshold: how thresholds are found.
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
        """The states after the rows of both, which have the same thresholds."""
        return {"thresholds": a["thresholds"], "firing_rows": a["firing_rows"] + b["firing_rows"]}


def rounded_down(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """Thresholds in the type of activations, rounded down so that comparisons with them equal those in float64."""
    levels = thresholds.to(dtype)
    return torch.where(levels.double() > thresholds, levels.nextafter(-torch.full_like(levels, torch.inf)), levels)
