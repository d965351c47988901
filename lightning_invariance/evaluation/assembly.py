"""Joining rows that are longer than a batch."""

from __future__ import annotations

from torch import Tensor


class Assembly:
    """Joins the parts of rows that are longer than a batch, in memory that the next row of the layer takes again.

    Args:
        n_transformations: length of a row.
    """

    def __init__(self, n_transformations: int) -> None:
        self._m = n_transformations
        self._rows: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}  # layer → how many columns of its row are there

    def complete(self, layer: str, st: Tensor, columns: slice) -> Tensor | None:
        """The complete row that a part of it ends, until the next one begins.

        Args:
            layer: its name.
            st: complete rows, or a part of one row, which later modules may change in place.
            columns: which part.

        Returns:
            None while columns are missing, and for a row of which not all columns reach the layer.
        """
        if st.shape[1] == self._m:
            return st
        if layer not in self._rows:
            self._rows[layer] = st.new_empty(1, self._m, *st.shape[2:])
        self._rows[layer][:, columns] = st
        filled = 0 if columns.start == 0 else self._filled.get(layer, 0)
        self._filled[layer] = filled + st.shape[1]
        return self._rows[layer] if self._filled[layer] == self._m and columns.stop == self._m else None
