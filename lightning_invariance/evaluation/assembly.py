"""From the output of a layer to complete rows of its ST matrix."""

from __future__ import annotations

import torch
from torch import Tensor


class Assembly:
    """Finds the batch axis of outputs, and joins rows that are longer than a batch.

    Args:
        n_transformations: length of a row.
    """

    def __init__(self, n_transformations: int) -> None:
        self._m = n_transformations
        self._axes: dict[str, int] = {}
        self._parts: dict[str, list[Tensor]] = {}

    def block(self, layer: str, output: Tensor, axis: int | None, rows: int, columns: int) -> Tensor:
        """The output of a layer for some inputs as an ST block ``(rows, columns, *activation_shape)``.

        Args:
            layer: its name.
            output: what it made of the inputs.
            axis: the axis of the batch; None for the first that is as long as the batch.
            rows: number of samples among the inputs.
            columns: number of transformations among the inputs.

        Raises:
            RuntimeError: If no axis is as long as the batch.
        """
        batch = rows * columns
        if layer not in self._axes:
            if axis is None:
                axis = next((a for a, size in enumerate(output.shape) if size == batch), 0)
            self._axes[layer] = axis
        axis = self._axes[layer]
        if output.ndim <= axis or output.shape[axis] != batch:
            raise RuntimeError(
                f"Expected layer {layer!r} to return a value for each of the {batch} inputs of a batch, but it returned"
                f" a tensor of shape {tuple(output.shape)}. Leave it out with `layers`."
            )
        if axis:
            output = output.movedim(axis, 0)
        return output.reshape(rows, columns, *output.shape[1:])

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
