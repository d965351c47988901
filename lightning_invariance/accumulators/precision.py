"""In which type sums are added up."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_of(x: Tensor) -> torch.dtype:
    """float64 where the device of a tensor has it; MPS does not."""
    return torch.float32 if x.device.type == "mps" else torch.float64
