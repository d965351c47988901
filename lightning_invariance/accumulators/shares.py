"""What each sample adds to squared deviations, once the means of the columns are known."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import States
from lightning_invariance.accumulators.memory import chunk_length


def deviations_of_samples(x: Tensor, means: Tensor, squared: bool) -> States:
    """``row_spread`` ``(n, k)`` and ``column_spread`` ``(n, 1, k)``, or ``(n, m, k)``, of each sample.

    Args:
        x: rows ``(n, m, k)``.
        means: of the columns, ``(m, k)``, in the type of the sums.
        squared: whether rows add their variance or their standard deviation, and columns are summed or apart.
    """
    m, length = x.shape[1], chunk_length(x)
    of_rows, of_columns = [], []
    for values, mean in zip(torch.split(x, length, -1), torch.split(means, length, -1), strict=True):
        wide = values.to(means.dtype)
        deviations = torch.sub(wide, wide[:, :1])
        rows = deviations.sub_(deviations.mean(1, keepdim=True)).square_().sum(1)
        columns = torch.sub(wide, mean, out=deviations).square_()
        of_rows.append(rows if squared else rows.div_(m - 1).sqrt_())
        of_columns.append(columns.sum(1, keepdim=True) if squared else columns)
    return {"row_spread": torch.cat(of_rows, -1), "column_spread": torch.cat(of_columns, -1)}
