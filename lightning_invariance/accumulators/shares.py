"""What each sample adds to squared deviations."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_invariance.accumulators.backends.scratch import chunk_length, chunks
from lightning_invariance.accumulators.base import States


def deviations_of_samples(x: Tensor, means: Tensor | None, squared: bool) -> States:
    """``row_spread`` ``(n, k)`` and ``column_spread`` ``(n, 1, k)``, or ``(n, m, k)``, of each sample.

    Args:
        x: rows ``(n, m, k)``.
        means: of the columns, ``(m, k)``, in the type of the sums; None for ``row_spread`` alone.
        squared: whether rows add their variance or their standard deviation, and columns are summed or apart.
    """
    if means is None and not x.is_cpu:
        return {"row_spread": _spreads(x, squared)}
    m, length = x.shape[1], chunk_length(x)
    of_rows, of_columns = [], []
    for start in range(0, x.shape[2], length):
        values = x[:, :, start : start + length].double()
        deviations = torch.sub(values, values[:, :1])
        rows = deviations.sub_(deviations.mean(1, keepdim=True)).square_().sum(1)
        of_rows.append(rows if squared else rows.div_(m - 1).sqrt_())
        if means is not None:
            columns = torch.sub(values, means[:, start : start + length], out=deviations).square_()
            of_columns.append(columns.sum(1, keepdim=True) if squared else columns)
    found = {"row_spread": torch.cat(of_rows, -1)}
    return found if means is None else {**found, "column_spread": torch.cat(of_columns, -1)}


def _spreads(x: Tensor, squared: bool) -> Tensor:
    """``row_spread`` elsewhere than on the CPU, by few operations: deviations in the type of ``x``, sums in float64.

    Taken from its first value a constant row deviates by exactly 0, from its rounded mean it may not.
    """
    lengths = []
    for values in chunks(x):
        deviations = torch.sub(values, values[:, :1])
        deviations.sub_(deviations.mean(1, keepdim=True))
        lengths.append(torch.linalg.vector_norm(deviations, dim=1, dtype=torch.float64))
    found = torch.cat(lengths, -1)
    return found.square_() if squared else found.div_((x.shape[1] - 1) ** 0.5)
