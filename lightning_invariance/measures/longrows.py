"""Variances within rows that come in parts, without any sums of columns."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.measures.base import Measure, States


class LongRows(Measure):
    """The transformation variance of rows longer than a batch, in constant memory: five numbers for each activation.

    ``update`` takes complete rows, or a part of one row and whether it is the last. Used by
    :func:`~lightning_invariance.evaluate` for sets whose column sums would not fit into memory.

    Args:
        squared: if false, the mean of the standard deviations.
    """

    variances: Tensor
    reference: Tensor
    sums: Tensor
    squares: Tensor
    length: Tensor

    def __init__(self, squared: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.squared = squared
        empty = torch.zeros(0, dtype=torch.float64)
        self._add_states(variances=empty, reference=empty, sums=empty, squares=empty, length=torch.tensor(0))

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """Shared by all of the same kind."""
        return frozenset([(LongRows, self.squared)])

    def update(self, st_block: Tensor, last: bool = True) -> None:
        """Add complete rows, or a part of one row ``(1, part, *activation_shape)``.

        Args:
            st_block: floating-point tensor ``(samples, transformations, *activation_shape)``.
            last: whether the rows are complete now.
        """
        with torch.no_grad():
            x = st_block.detach().flatten(2) if st_block.ndim > 2 else st_block.detach()[..., None]
            x = x.double()
            if not self.reference.numel() or len(x) > 1:
                # About its first value a constant row is exactly zero.
                self.reference, self.length = x[:, 0].clone(), torch.zeros_like(self.length)
                self.sums = self.squares = torch.zeros_like(self.reference)
                self.activation_shape = torch.tensor(st_block.shape[2:], dtype=torch.long, device=x.device)
            deviation = x - self.reference.view(len(x), 1, -1)
            self.sums = self.sums + deviation.sum(1)
            self.squares = self.squares + deviation.square().sum(1)
            self.length = self.length + x.shape[1]
            if last:
                self._end_rows()

    def _end_rows(self) -> None:
        length = int(self.length)
        spread = (self.squares - self.sums.square() / length).clamp_min(0) / (length - 1)
        total = (spread if self.squared else spread.sqrt()).sum(0)
        self.variances = self.variances + total if self.variances.numel() else total
        self.n_samples = self.n_samples + len(spread)
        self.columns = torch.full_like(self.columns, length)
        self.reference = self.sums = self.squares = torch.zeros_like(self.variances[:0])

    def compute(self) -> Tensor:
        """The value of every activation."""
        return self._shaped(self.variances / self.n_samples)

    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        """Not used: rows are not split."""

    def _merge(self, a: States, b: States) -> States:
        return {**a, "variances": a["variances"] + b["variances"]}
