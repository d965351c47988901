"""Joining rows that are longer than a batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Assembly:
    """Joins the parts of rows that are longer than a batch.

    Args:
        n_transformations: length of a row.
    """

    def __init__(self, n_transformations: int) -> None:
        self._m = n_transformations
        self._parts: dict[str, list[Tensor]] = {}

    def complete(self, layer: str, st: Tensor, last: bool) -> Tensor | None:
        """The complete row that a part of it ends; None while columns are missing.

        Args:
            layer: its name.
            st: complete rows, or a part of one row.
            last: whether the row ends with this part.
        """
        if st.shape[1] == self._m:
            return st
        parts = self._parts.setdefault(layer, [])
        parts.append(st.clone())  # later modules may change it in place
        return torch.cat(self._parts.pop(layer), dim=1) if last else None
