"""Sums over a block of rows: by C, by Triton, or by PyTorch's operations."""

from lightning_invariance.accumulators.backends import c_deviations, devices, pytorch
from lightning_invariance.accumulators.backends.base import Wanted
from lightning_invariance.accumulators.rows import Rows, States


def add_deviations(states: States, rows: Rows, wanted: Wanted) -> None:
    """Add rows by the first backend that takes them; see ``base.py``."""
    for backend in (c_deviations, devices, pytorch):
        if backend.add_deviations(states, rows, wanted):
            return
