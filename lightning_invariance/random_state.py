"""Random generators: of the process and of a user's objects, seeded for a while and put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Generator:
    """A random generator of any library: ``get`` returns its state, ``set`` puts one back, ``seed`` begins anew."""

    get: Callable[[], Any]
    set: Callable[[Any], object]
    seed: Callable[[int], object]

    @classmethod
    def of(cls, value: Any) -> Generator | None:
        """Return the generator that an object of torch, numpy or ``random`` is, or None."""
        if isinstance(value, torch.Generator):
            return cls(value.get_state, value.set_state, value.manual_seed)
        if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            return cls(value.getstate, value.setstate, value.seed)
        if isinstance(value, np.random.RandomState):
            return cls(value.get_state, value.set_state, lambda seed: value.seed(seed % 2**32))
        if isinstance(value, np.random.Generator):
            bits: Any = value.bit_generator

            def put(state: Any) -> None:
                bits.state = state

            return cls(lambda: bits.state, put, lambda seed: put(type(bits)(abs(seed)).state))
        return None


@contextmanager
def isolated_random_state(seed: int, own: Iterable[Generator] = ()) -> Iterator[None]:
    """Seed every random generator, and put back their states afterwards, also when an error is raised.

    Args:
        seed: for all of them.
        own: generators beside the global ones.
    """
    generators = [*_global_generators(), *own]
    states = [generator.get() for generator in generators]
    try:
        for generator in generators:
            generator.seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set(state)


def _global_generators() -> Iterator[Generator]:
    yield Generator(random.getstate, random.setstate, random.seed)
    yield Generator(np.random.get_state, np.random.set_state, lambda seed: np.random.seed(seed % 2**32))
    # Without an accelerator, torch.manual_seed would note the seed and its caller for CUDA, once more each time.
    home = torch if torch.accelerator.is_available() else torch.default_generator
    yield Generator(torch.get_rng_state, torch.set_rng_state, home.manual_seed)
    module = torch.get_device_module() if torch.accelerator.is_available() else None
    for name in ("rng_state_all", "rng_state"):  # CUDA and XPU have several generators, MPS has one
        if hasattr(module, f"get_{name}"):
            yield Generator(getattr(module, f"get_{name}"), getattr(module, f"set_{name}"), lambda seed: None)
            return
