r"""Squared deviations within the rows and columns of the ST matrix, and the means of its columns.

The sums, and why they lose no digits, are derived in ``csrc/deviations.c``. This file takes the same sums with
PyTorch's operations where C does not: in float64, for standard deviations, and where it was not compiled. Other devices
have their own operations in ``devices.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends import c_kernels, devices
from lightning_invariance.accumulators.backends.scratch import chunk_length, scratch
from lightning_invariance.accumulators.base import (
    N_SAMPLES,
    Accumulator,
    Context,
    Influenced,
    InfluenceKernel,
    Rows,
    States,
    add_to,
)
from lightning_invariance.accumulators.changes import changes_of_samples, scaled_changes
from lightning_invariance.accumulators.column_means import far_apart, means_of, narrow, widen
from lightning_invariance.accumulators.deviation_influences import DeviationInfluences
from lightning_invariance.accumulators.shares import deviations_of_samples

#: Rows times columns of one step, which bounds the rounding of a float32 sum; longer rows are summed in float64.
MOST_VALUES = c_kernels.MOST_COLUMNS

#: A sum over rows of squares smaller than ``smallest`` may hold terms that float32 has rounded to 0, and one above
#: ``largest`` may leave float32 (3e38) where it is multiplied. Rounding float32 offsets o of N rows costs about
#: (6e-8 o)² N of a column's squared deviations: where these are below 1e-4 N o², that would be more than 4e-11 of
#: them, a thousandth of what the values themselves lose, and the means become float64. Fewer than 8 rows may be alike
#: by chance, but not below 1e-9 N o², where rounding costs up to 4e-6 of them.
LIMITS = c_kernels.Limits(smallest=1e-24, largest=1e30, far=1e-4, rows_for_far=8, far_of_few=1e-9)

#: Layers with fewer values a row than this have float64 means, which cost little there.
FEWEST_FLOAT32_VALUES = 2**11

#: Where the squared deviations within a row are less than those from one of its columns over this, float32 has lost as
#: much of their digits as that factor: float64 takes their place. With fewer columns they cannot be.
MOST_LOST = 20

#: Columns have a common centre where the range of the first row is within this fraction of its first value.
CLOSE = 1 / 4


@dataclass(frozen=True)
class Deviations(Accumulator):
    r"""Squared deviations within the rows and columns of the ST matrix, and the means of the columns.

    For k activations and m transformations (m + 3) k numbers:

    - ``row_spread`` ``(k,)``: :math:`\sum_i \sum_j (x_{ij} - \bar x_{i \cdot})^2`, float64.
    - ``column_spread`` ``(1, k)``: :math:`\sum_j \sum_i (x_{ij} - \mu_j)^2`, float64, about the means as they are kept.
    - ``centres`` ``(k,)`` and ``offsets`` ``(k / width, m, width)``: the column means, :math:`\mu_j = c + o_j`; see
      :func:`~lightning_invariance.accumulators.column_means.means_of`. In float32 where that suffices, which halves
      the memory.

    With ``squared=False``, ``row_spread`` is the sum of the rows' standard deviations, and ``column_spread`` ``(m, k)``
    is kept for each column. With ``response``, ``changes`` ``(m, channels)`` tells what each transformation changes;
    see :func:`~lightning_invariance.accumulators.changes.scaled_changes`.

    Attributes:
        squared: whether variances or standard deviations are averaged.
        response: whether ``changes`` are kept.
        reference: the column that changes are taken from; None for the mean of the row.
        exact: whether means and all sums are float64, for values that are small differences of these.
    """

    squared: bool = True
    response: bool = False
    reference: int | None = None
    exact: bool = False

    takes_half = True
    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        vector, matrix, tiles = (torch.zeros(*[0] * axes, dtype=torch.float64) for axes in (1, 2, 3))
        changes = {"changes": matrix} if self.response else {}
        return {"row_spread": vector, "column_spread": matrix, "centres": vector, "offsets": tiles, **changes}

    def add(self, states: States, rows: Rows) -> None:
        """Add rows: on the CPU in C where it takes them, and elsewhere as ``devices.py`` does."""
        if self.exact and not rows.values.is_cpu:
            rows = replace(rows, values=rows.values.double())
        if rows.values.is_cpu:
            rows.widen()
        x = rows.flat
        if not states["centres"].numel():
            states.update(self._first(x, self.exact))
        if not x.is_cpu:
            devices.add_deviations(states, rows, LIMITS, self.squared, self.response, self.reference)
            return
        beside = self._beside(states, rows)
        add = self._add if rows.before > 1 else self._add_first
        in_c = add(states, x, rows.before, beside)
        if self.response and not (in_c and beside.changes is not None):
            add_to(states, changes=scaled_changes(rows, self.reference))

    def merge(self, a: States, b: States) -> States:
        r"""The states after the rows of both (Chan, Golub and LeVeque 1983, the paper's reference 20).

        With δ the difference of two means, the squared deviations grow by n_a n_b / (n_a + n_b) δ².
        """
        n, n_other = a[N_SAMPLES], b[N_SAMPLES]
        means, others = means_of(a), means_of(b)
        apart = others - means
        share = n_other / (n + n_other).to(apart.dtype)
        moved = (share * apart).view(len(apart), -1, a["offsets"].shape[2]).movedim(1, 0)
        between = n * share * apart.square()
        if self.squared:
            between = between.sum(0, keepdim=True)
        response = {"changes": a["changes"] + b["changes"]} if self.response else {}
        states = {
            "row_spread": a["row_spread"] + b["row_spread"],
            "column_spread": a["column_spread"] + b["column_spread"] + between,
            "centres": a["centres"].to(means.dtype),
            "offsets": a["offsets"] + moved,
            **response,
        }
        if a["offsets"].dtype == b["offsets"].dtype != means.dtype:
            narrow(states, LIMITS, int(n + n_other))
        return states

    def shares(self, rows: Rows, totals: States) -> States:
        """The squared deviations, and the changes, of each sample."""
        changes = {"changes": changes_of_samples(rows, self.reference)} if self.response else {}
        return deviations_of_samples(rows.flat, means_of(totals), self.squared) | changes

    def influence_kernel(self, totals: States, about: Influenced) -> InfluenceKernel | None:
        """The influences in C, of variances of single activations."""
        return DeviationInfluences.of(totals, about, self.reference) if self.squared else None

    def prepared(self, context: Context) -> Accumulator:
        """With changes from the identity, where the set knows of one."""
        return replace(self, reference=context.transformations.identity) if self.response else self

    def includes(self, other: Accumulator) -> bool:
        """One with a response also serves measures without, and an exact one those that need not be."""
        if not isinstance(other, Deviations) or self.exact < other.exact or self.response < other.response:
            return False
        return self.squared == other.squared and (self.reference == other.reference or not other.response)

    def dead(self, states: States) -> Tensor:
        """Which activations never changed, over all samples and transformations."""
        return (states["row_spread"] == 0) & (states["column_spread"] == 0).all(0)

    def _beside(self, states: States, rows: Rows) -> c_kernels.Beside:
        """What C is to find beside the sums."""
        m, *shape = rows.values.shape[1:]
        if not self.squared or not c_kernels.takes(rows.values) or m > MOST_VALUES:
            return c_kernels.Beside()
        if not self.response:
            return c_kernels.Beside()
        channels, inner = (shape[rows.channel_axis], math.prod(shape[rows.channel_axis + 1 :])) if shape else (1, 1)
        if not states["changes"].numel():
            states["changes"] = torch.zeros(m, channels, dtype=torch.float64)
        return c_kernels.Beside(states["changes"], self.reference, inner)

    def _add_first(self, states: States, x: Tensor, before: int, beside: c_kernels.Beside) -> bool:
        """Add rows after fewer than two, of which cannot be told how far columns are apart; whether C did."""
        if not before and states["offsets"].dtype == torch.float32:
            in_c = self._add(states, x, before, beside)
            if states["offsets"].dtype == torch.float32:
                return in_c
            states.update(self._first(x, wide=True))  # columns are so far apart that the sums have lost digits
            if beside.changes is not None:
                beside.changes.zero_()
        most = max(1, MOST_VALUES // x.shape[1])
        some, x = x[:most], x[most:]
        widen(states)
        in_c = self._add(states, some, before, beside.of(slice(most)))
        before += len(some)
        if not self.exact and some.dtype == torch.float32 and states["offsets"].numel() >= FEWEST_FLOAT32_VALUES:
            narrow(states, LIMITS, before)
        return self._add(states, x, before, beside.of(slice(most, None))) if len(x) else in_c

    def _add(self, states: States, x: Tensor, before: int, beside: c_kernels.Beside) -> bool:
        """Add rows ``x`` (n, m, k) to those before; whether C did."""
        if x.dtype == torch.float64 != states["offsets"].dtype:
            widen(states)
        sums = (states["row_spread"], states["column_spread"], states["centres"], states["offsets"])
        far = c_kernels.add_deviations(x, before, *sums, LIMITS, beside) if self.squared else None
        if far is None:
            for part in torch.split(x, max(1, MOST_VALUES // x.shape[1])):
                if self._add_by_pytorch(states, part, before):
                    widen(states)
                before += len(part)
        elif far:
            widen(states)
        return far is not None

    def _first(self, x: Tensor, wide: bool = False) -> States:
        """States without rows whose means are the first row of ``x``: constant columns then deviate by exactly 0."""
        n, m, k = x.shape
        in_float32 = not wide and x.is_cpu and n > 1 and m * k >= FEWEST_FLOAT32_VALUES
        first = x[0].to(x.dtype if in_float32 else torch.float64)
        low, high = first.amin(0), first.amax(0)
        # The differences of close numbers are exact. Columns that are not close have no centre.
        centres = torch.where(high - low <= CLOSE * first[0].abs(), first[0], 0)
        squares = torch.zeros(1 if self.squared else m, k, dtype=torch.float64, device=x.device)
        if c_kernels.takes(x):
            tiles = k // c_kernels.WIDTH if k % c_kernels.WIDTH == 0 else 1
        else:  # a tile for each of PyTorch's threads, which then read what they wrote themselves; elsewhere one
            tiles = math.gcd(k, torch.get_num_threads()) if x.is_cpu else 1
        offsets = (first - centres).view(m, tiles, -1).movedim(1, 0).contiguous()
        return {"row_spread": squares[0].clone(), "column_spread": squares, "centres": centres, "offsets": offsets}

    def _add_by_pytorch(self, states: States, x: Tensor, before: int) -> bool:
        """Add rows ``x`` (n, m, k); whether columns are so far apart that float32 offsets are too coarse."""
        offsets, spread = states["offsets"], states["row_spread"]
        in_float32 = offsets.dtype == torch.float32 and max(x.shape[:2]) <= MOST_VALUES
        dtype = torch.float32 if in_float32 else spread.dtype
        tiles, _, width = offsets.shape
        axis = 0 if tiles > width else -1
        length = max(1, chunk_length(x) // (width if axis == 0 else tiles))
        by_tiles = x.view(*x.shape[:2], tiles, width).movedim(2, 0), states["centres"].view(tiles, 1, width), offsets
        split = (torch.split(each, length, axis) for each in by_tiles)
        added = [
            self._sums_of_piece(_Piece(x, centres, offsets, before).to(dtype), spread.dtype, states["offsets"].dtype)
            for x, centres, offsets in zip(*split, strict=True)
        ]
        rows, squares, moved = (torch.cat(part, axis) for part in zip(*added, strict=True))
        states["row_spread"] = spread + rows.flatten()
        states["column_spread"] = states["column_spread"] + squares.movedim(1, 0).flatten(1)
        states["offsets"] = moved
        return offsets.dtype != spread.dtype and far_apart(states, LIMITS, before + len(x))

    def _sums_of_piece(self, piece: _Piece, wide: torch.dtype, kept: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What some activations add to ``row_spread`` and ``column_spread``, and their new offsets.

        ``means``, ``rounding``, ``sums`` and ``shift`` are M, r, D and s of ``csrc/deviations.c``.
        """
        x, centres, offsets, before = piece
        m, total = x.shape[2], before + x.shape[1]
        deviations = torch.sub(x, x[:, :, :1], out=scratch(x))
        of_rows = deviations.sum(2)
        squares = torch.mul(deviations, deviations, out=deviations).sum(2)
        # Proved not to be negative, but the squares of tiny deviations may have vanished in float32.
        variances = torch.addcmul(squares, of_rows, of_rows, value=-1 / m).clamp_min_(0)
        rows = variances.sum(1)
        cancels = m > MOST_LOST and x.dtype != wide and bool((MOST_LOST * variances < squares).any())

        means = offsets + centres
        torch.sub(x, means[:, None], out=deviations)
        sums = deviations.sum(1)
        torch.mul(deviations, deviations, out=deviations)
        squares = deviations.flatten(1, 2).sum(1, keepdim=True) if self.squared else deviations.sum(1)
        if cancels or (x.dtype != wide and (_lost(rows, of_rows) or _lost(squares.sum(1), sums))):
            return self._sums_of_piece(piece.to(wide), wide, kept)
        rows = rows if self.squared else variances.div_(m - 1).sqrt_().sum(1)

        held = means - centres
        rounding = (centres - (means - held)).add_(offsets - held)
        sums = sums.add_(before * rounding)
        moved = (sums / total).sub_(rounding).add_(offsets).to(kept)
        shift = torch.sub(moved.to(x.dtype), offsets).add_(rounding)
        change = shift.mul(total).sub_(sums, alpha=2).mul_(shift).addcmul_(rounding, rounding, value=before)
        squares = squares.to(wide) + (change.sum(1, keepdim=True) if self.squared else change)
        return rows.to(wide), squares, moved


class _Piece(NamedTuple):
    """Rows of some activations, and the means of the rows before.

    Attributes:
        x: ``(tiles, n, m, k)``.
        centres: ``(tiles, 1, k)``.
        offsets: ``(tiles, m, k)``.
        before: number of rows before.
    """

    x: Tensor
    centres: Tensor
    offsets: Tensor
    before: int

    def to(self, dtype: torch.dtype) -> _Piece:
        """The same in another type."""
        return _Piece(self.x.to(dtype), self.centres.to(dtype), self.offsets.to(dtype), self.before)


def _lost(squares: Tensor, sums: Tensor) -> bool:
    """Whether float32 does not hold squares (tiles, k): too large, or too small although some of the sums are not 0."""
    low, high = squares.aminmax()
    if not high <= LIMITS.largest:  # true for NaN, too
        return True
    return bool(low < LIMITS.smallest) and bool(((squares < LIMITS.smallest) & (sums != 0).any(1)).any())
