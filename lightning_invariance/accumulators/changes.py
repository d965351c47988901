"""What each transformation changes in a layer: squared deviations from a column, or from the mean of the row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends.scratch import chunk_length, scratch
from lightning_invariance.accumulators.base import Accumulator, Rows, States, add_to

#: The range of float32 sums of squares that have not lost digits: its smallest normal number is 1e-38, its largest
#: 3e38.
SMALLEST_FLOAT32_SQUARE = 1e-30
LARGEST_FLOAT32_SQUARE = 1e30


@dataclass(frozen=True)
class Changes(Accumulator):
    """The changes alone, ``changes`` ``(m, channels)``: for whole feature maps their mean over m is the variance.

    Attributes:
        reference: the column that changes are taken from; None for the mean of the row.
    """

    reference: int | None = None

    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        return {"changes": torch.zeros(0, 0, dtype=torch.float64)}

    def add(self, states: States, rows: Rows) -> None:
        """Add the changes of rows."""
        add_to(states, changes=scaled_changes(rows, self.reference))

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        return {"changes": a["changes"] + b["changes"]}

    def shares(self, rows: Rows, totals: States) -> States:
        """The changes of each sample, ``(samples, m, channels)``."""
        return {"changes": changes_of_samples(rows, self.reference)}


def changes_of_samples(rows: Rows, reference: int | None) -> Tensor:
    """:func:`scaled_changes` of each sample, ``(samples, m, channels)``."""
    maps, m = rows.maps, rows.values.shape[1]
    if maps.is_cpu:
        found = torch.stack([channel_changes(sample, reference) for sample in maps.unsqueeze(1)])
    else:
        some = torch.split(maps, chunk_length(maps.flatten(1).T))
        found = torch.cat([_by_few_operations(samples, reference, (3,)) for samples in some])
    return _scaled(found, m, reference)


def scaled_changes(rows: Rows, reference: int | None) -> Tensor:
    r"""What each transformation contributes to the transformation variance, summed over rows: ``(m, channels)``.

    With a reference column r, :math:`\frac{1}{2} \sum (x_{ij} - x_{ir})^2`, the variance of the pair of columns.
    Without, :math:`\frac{m}{m - 1} \sum (x_{ij} - \bar x_{i \cdot})^2`, whose mean over j is the variance. Sums over
    the positions of each feature map.
    """
    return _scaled(channel_changes(rows.maps, reference), rows.values.shape[1], reference)


def _scaled(changes: Tensor, m: int, reference: int | None) -> Tensor:
    return changes / 2 if reference is not None else changes * (m / max(m - 1, 1))


def channel_changes(maps: Tensor, reference: int | None) -> Tensor:
    """Squared deviations of maps (n, m, channels, positions) from the reference column or the row mean.

    Float64 sums ``(m, channels)``.
    """
    if not maps.is_cpu:
        return _by_few_operations(maps, reference, (0, 3))
    step = max(1, chunk_length(maps[..., 0]) // maps.shape[3])
    sums = []
    for start in range(0, maps.shape[2], step):
        values = maps[:, :, start : start + step]
        # Taken from its first value a constant row deviates by exactly 0, from its rounded mean it may not.
        origin = values[:, 0 if reference is None else reference, None]
        deviations = torch.sub(values, origin, out=scratch(values.flatten(2)).view(values.shape))
        if reference is None:
            deviations.sub_(deviations.mean(1, keepdim=True))
        sums.append(torch.linalg.vector_norm(deviations, dim=-1).double().square_().sum(0))
    changes = torch.cat(sums, -1)
    if maps.dtype == torch.float32 and not SMALLEST_FLOAT32_SQUARE < changes.max() < LARGEST_FLOAT32_SQUARE:
        return channel_changes(maps.double(), reference)
    return changes


def _by_few_operations(maps: Tensor, reference: int | None, over: tuple[int, ...]) -> Tensor:
    """The same on other devices, summed over some axes: float64 holds all squares, so nobody has to look at them."""
    first = reference or 0
    deviations = torch.sub(maps, maps[:, first : first + 1])
    if reference is None:
        deviations.sub_(deviations.mean(1, keepdim=True))
    norms: Tensor = torch.linalg.vector_norm(deviations, dim=over, dtype=torch.float64)
    return norms.square()
