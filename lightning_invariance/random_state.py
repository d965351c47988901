"""Seeding every random generator for a while, and putting back its state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def isolated_random_state(seed: int) -> Iterator[None]:
    """Seed every random generator, and put back their states afterwards, also when an error is raised."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    get, put = _generators_of_accelerator()
    of_accelerator = get()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # Without an accelerator, torch.manual_seed would note the seed and its caller for CUDA, once more each time.
        (torch if torch.accelerator.is_available() else torch.default_generator).manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        put(of_accelerator)


def _generators_of_accelerator() -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """What gets and puts back the states of its random generators; CUDA and XPU have several, MPS has one."""
    module = torch.get_device_module() if torch.accelerator.is_available() else None
    for name in ("rng_state_all", "rng_state"):
        if hasattr(module, f"get_{name}"):
            return getattr(module, f"get_{name}"), getattr(module, f"set_{name}")
    return lambda: None, lambda states: None
