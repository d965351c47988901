"""What the backends of squared deviations have in common.

A backend has a function ``add_deviations(states, rows, wanted) -> bool``. It adds rows to the states of
:class:`~lightning_invariance.accumulators.deviations.Deviations`, whose docstring defines them, or begins these where
they are empty. It returns False, and has changed no sum, where it does not take the rows:

========================  ===========================================================================================
``c_deviations.py``       float32 and half precision on the CPU, variances, at most 256 columns, where C was compiled;
                          means in float32 where that suffices, in tiles
``devices.py``            float32 and half precision on a GPU, variances, at most 256 columns, where Triton works;
                          means in float64
``pytorch.py``            everything; means in float64
========================  ===========================================================================================

Whichever backend adds a block, another one may add the next.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_invariance.accumulators.rows import Rows


class Wanted(NamedTuple):
    """What of squared deviations is wanted.

    Attributes:
        squared: whether variances or standard deviations are averaged.
        response: whether to sum what each transformation changes.
        reference: the column that changes are taken from; None for the mean of the row.
    """

    squared: bool = True
    response: bool = False
    reference: int | None = None


def channels_of(rows: Rows) -> tuple[int, int]:
    """The number of channels, and how many neighbouring activations belong to one before the next one's follow."""
    shape, axis = rows.values.shape[2:], rows.channel_axis
    return (shape[axis], math.prod(shape[axis + 1 :])) if shape else (1, 1)
