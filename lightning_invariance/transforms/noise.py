"""Gaussian noise, drawn for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_invariance.transforms.base import CallableSet


def noise(std: Sequence[float] = (0.0, 0.05, 0.1, 0.2), seed: int = 0) -> CallableSet:
    """Gaussian noise of several standard deviations, drawn anew for each sample and each of them.

    The noise of a sample depends on its content and on ``seed`` alone: it is the same in every evaluation, for any
    batch size, order and number of processes. A standard deviation of 0 is the identity, from which responses are
    changes.

    Args:
        std: standard deviations, in units of the input, at least 0 and all different.
        seed: another one draws other noise.

    Raises:
        ValueError: If ``std`` is empty, repeats a number, or holds one below 0.

    Example:
        >>> import torch
        >>> t = noise(std=[0, 0.1])
        >>> x = torch.rand(5, 1, 8, 8)
        >>> bool((t(x)[3:] == t(x[3:])).all())
        True
    """
    levels = [float(level) for level in std]
    if not levels or len({*levels}) < len(levels) or not all(level >= 0 for level in levels):
        raise ValueError(f"Expected argument `std` to hold different numbers of at least 0, but got {list(std)}.")
    functions = {f"σ={level:g}": partial(_with_noise, std=level) for level in levels}
    same = f"σ={0.0:g}" if 0.0 in levels else None
    return CallableSet(functions, parameters={"std": levels}, identity=same, seed=seed)


def _with_noise(x: Tensor, std: float) -> Tensor:
    if not x.is_floating_point():
        raise ValueError(f"Expected floating-point inputs, but got {x.dtype}: noise is no change of tokens.")
    return x + std * torch.randn(x.shape).to(x)  # drawn on the CPU, for equal noise on all devices
