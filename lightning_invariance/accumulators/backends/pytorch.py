"""Squared deviations and changes by PyTorch's operations, on any device.

Everything is summed in float64. On the CPU values become float64 first, some activations at a time; other devices
subtract in the type of the values, where float64 would take long, and no value is read, which would synchronise.

Deviations within a row are taken from its first value, or another one, before they are taken from their mean: a
constant row then deviates by exactly 0, where its rounded mean may differ from its values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends.base import Wanted
from lightning_invariance.accumulators.backends.chunks import chunk_length, chunks
from lightning_invariance.accumulators.base import add_to
from lightning_invariance.accumulators.column_means import first_states, widen_in_one_tile
from lightning_invariance.accumulators.rows import Rows, States

#: The range of float32 sums of squares that have not lost digits: its smallest normal number is 1e-38, its largest
#: 3e38.
SMALLEST_SQUARE, LARGEST_SQUARE = 1e-30, 1e30


def add_deviations(states: States, rows: Rows, wanted: Wanted) -> bool:
    r"""Add rows; see ``base.py``.

    With d the deviations of n new rows from a column mean of N rows before, its squared deviations grow by
    :math:`\sum d^2 - (\sum d)^2 / (N + n)`, and the mean by :math:`\sum d / (N + n)`.
    """
    rows.widen()
    x, squared = rows.flat, wanted.squared
    if not states["centres"].numel():
        states.update(first_states(x, torch.float64, columns=1 if squared else x.shape[1]))
    widen_in_one_tile(states)
    names, length, total = ("row_spread", "column_spread", "centres", "offsets"), chunk_length(x), rows.before + len(x)
    parts = [torch.split(tensor, length, -1) for tensor in (x, *(states[name] for name in names))]
    for values, row_spread, column_spread, centres, offsets in zip(*parts, strict=True):
        if values.is_cpu:
            values = values.double()
        row_spread += _spreads(values, squared).sum(0)
        deviations = _from_means(values, centres, offsets[0])
        sums = deviations.sum(0, dtype=torch.float64)
        squares = _squares(deviations, 0).addcmul_(sums, sums, value=-1 / total)
        column_spread += squares.sum(0, keepdim=True) if squared else squares
        offsets.add_(sums, alpha=1 / total)
    if wanted.response:
        add_to(states, changes=changes_of_samples(rows, wanted.reference).sum(0))
    return True


def deviations_of_samples(x: Tensor, means: Tensor, squared: bool) -> States:
    """``row_spread`` ``(n, k)`` and ``column_spread`` ``(n, 1, k)``, or ``(n, m, k)``, of each sample.

    Args:
        x: rows ``(n, m, k)``.
        means: of the columns, ``(m, k)`` in float64.
        squared: whether rows add their variance or their standard deviation, and columns are summed or apart.
    """
    of_rows, of_columns = [], []
    for values, some_means in zip(chunks(x), torch.split(means, chunk_length(x), -1), strict=True):
        values = values.double()
        of_rows.append(_spreads(values, squared))
        columns = torch.sub(values, some_means).square_()
        of_columns.append(columns.sum(1, keepdim=True) if squared else columns)
    return {"row_spread": torch.cat(of_rows, -1), "column_spread": torch.cat(of_columns, -1)}


def changes_of_samples(rows: Rows, reference: int | None) -> Tensor:
    r"""What each transformation changes in each sample, ``(samples, m, channels)``.

    With a reference column r, :math:`\frac{1}{2} \sum (x_{ij} - x_{ir})^2`, the variance of the pair of columns.
    Without, :math:`\frac{m}{m - 1} \sum (x_{ij} - \bar x_{i \cdot})^2`, whose mean over j is the variance. Sums over
    the positions of each feature map.
    """
    return torch.cat([*_changes(rows, reference)], -1)


def _changes(rows: Rows, reference: int | None) -> Iterator[Tensor]:
    """The changes of each sample, some channels at a time."""
    maps, m = rows.maps, rows.values.shape[1]
    factor = m / max(m - 1, 1) if reference is None else 1 / 2
    for some in torch.split(maps, max(1, chunk_length(maps[..., 0]) // maps.shape[3]), 2):
        yield factor * _squared_changes(some, reference)


def _squared_changes(maps: Tensor, reference: int | None) -> Tensor:
    """Squared deviations of (n, m, channels, positions) from a column or the row mean, summed over positions.

    On the CPU float32 values have float32 norms, whose digits can be checked there; float64 ones would take twice as
    long as the rest of a same-equivariance.
    """
    wide = None if maps.is_cpu else torch.float64
    deviations = _from_column(maps, reference or 0)
    if reference is None:
        deviations.sub_(deviations.mean(1, keepdim=True, dtype=wide))
    norms: Tensor = torch.linalg.vector_norm(deviations, dim=-1, dtype=wide)
    squares = norms.double().square_()
    if maps.is_cpu and maps.dtype == torch.float32 and not SMALLEST_SQUARE < squares.max() < LARGEST_SQUARE:
        return _squared_changes(maps.double(), reference)
    return squares


def _spreads(values: Tensor, squared: bool) -> Tensor:
    """The squared deviations within each row of (n, m, k), or its standard deviation: (n, k)."""
    deviations, m = _from_column(values, 0), values.shape[1]
    if values.dtype == torch.float64:
        spreads = _squares(deviations.sub_(deviations.mean(1, keepdim=True)), 1)
    else:  # float64 sums hold all digits of float32 deviations, which the means of rows would round
        sums = deviations.sum(1, dtype=torch.float64)
        spreads = _squares(deviations, 1).addcmul_(sums, sums, value=-1 / m)
    return spreads if squared else spreads.div_(m - 1).sqrt_()


def _from_column(values: Tensor, column: int) -> Tensor:
    """Deviations of (n, m, ...) from one of the columns."""
    return values - values[:, column : column + 1]


def _from_means(values: Tensor, centres: Tensor, offsets: Tensor) -> Tensor:
    """Deviations of (n, m, k) from the means, whose rounded sum c + o would cost float64 values some digits."""
    if values.dtype == torch.float64:
        return torch.sub(values, centres).sub_(offsets)
    return torch.sub(values, centres + offsets, out=torch.empty_like(values))


def _squares(values: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """The sum of the squares along some axes, in float64; may overwrite the values."""
    if values.dtype == torch.float64:
        return torch.mul(values, values, out=values).sum(axes)
    found: Tensor = torch.linalg.vector_norm(values, dim=axes, dtype=torch.float64)
    return found.square_()
