"""Find a device with float64 for the sums of activations."""

from __future__ import annotations

from functools import cache

import torch


def summed_on(device: torch.device) -> torch.device:
    """Where activations of a device are summed: there, or on the CPU where the device has no float64, as MPS has not.

    Such devices mostly share the memory of the CPU; float32 sums of many samples would not be exact.
    """
    return device if has_float64(device) else torch.device("cpu")


def has_float64(device: torch.device) -> bool:
    """Whether a device can add in float64."""
    return _has_float64(device.type)


@cache
def _has_float64(kind: str) -> bool:
    try:
        torch.ones(2, dtype=torch.float64, device=kind).sum()
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError):  # of MPS, and of GPUs for XPU without it
        return False
    return True
