"""Joining rows that are longer than a batch."""

from __future__ import annotations

from torch import Tensor


class Assembly:
    """Joins the parts of rows that are longer than a batch, in memory that the next row of the layer takes again.

    Args:
        n_transformations: length of a row.

    Attributes:
        partial: layers that not all columns of some row have reached.
    """

    def __init__(self, n_transformations: int) -> None:
        self.partial: set[str] = set()
        self._m = n_transformations
        self._rows: dict[str, Tensor] = {}
        self._reached: dict[str, tuple[int, int]] = {}  # layer → the row that came last, and where its columns end

    def goes_on(self, layer: str, columns: slice, row: int) -> bool:
        """Whether a part of a row begins where the one before has ended.

        Args:
            layer: its name.
            columns: which part.
            row: a number of the row.
        """
        before, end = self._reached.get(layer, (row, 0))
        if before != row:
            if end != self._m:
                self.partial.add(layer)
            end = 0
        goes_on = bool(columns.start == end)
        if not goes_on:
            self.partial.add(layer)
        self._reached[layer] = row, columns.stop if goes_on else -1
        return goes_on

    def complete(self, layer: str, st: Tensor, columns: slice) -> Tensor | None:
        """The complete row that a part of it ends, until the next one begins; None while columns are missing.

        Args:
            layer: its name.
            st: complete rows, or a part of one row that goes on, which later modules may change in place.
            columns: which part.
        """
        if st.shape[1] == self._m:
            return st
        if layer not in self._rows:
            self._rows[layer] = st.new_empty(1, self._m, *st.shape[2:])
        self._rows[layer][:, columns] = st
        return self._rows[layer] if columns.stop == self._m else None

    def end(self) -> set[str]:
        """The layers that some row has reached in part, when all rows have come."""
        return self.partial | {layer for layer, (_, end) in self._reached.items() if end != self._m}
