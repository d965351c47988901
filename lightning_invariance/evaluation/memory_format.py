"""Whether a network runs faster on a CPU with the channels of its images last in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_invariance.evaluation.isolation import isolated_random_state
from lightning_invariance.evaluation.probe import Tolerance
from lightning_invariance.outputs import all_tensors_of

#: Inputs of the passes that are timed, and how many of these there are of each format, of which the shortest counts. A
#: first one of each, in which kernels are prepared, does not.
INPUTS, TIMES = 32, 2

#: Fewer inputs take so little time that what a faster format saves is less than what the timed passes take.
FEWEST = 1024

#: Channels last must take less than this part of the time: close calls would differ from one run to the next.
FASTER = 0.95

#: Shape and type of an input.
Kind: TypeAlias = tuple[tuple[int, ...], torch.dtype]

#: Model → what was found for inputs of some kinds: a network that trains is evaluated many times.
_FOUND: WeakKeyDictionary[nn.Module, dict[Kind, bool]] = WeakKeyDictionary()


def with_channels_last(images: Tensor) -> Tensor:
    """The same images ``(batch, channels, height, width)`` with the channels last in memory, also if there is one."""
    return torch.empty_like(images, memory_format=torch.channels_last).copy_(images)


def is_faster_with_channels_last(model: nn.Module, run: Callable[[Tensor], Any], inputs: Tensor, seed: int) -> bool:
    """Time the model with both formats, and remember what was found.

    Args:
        model: in whose convolutions the formats differ.
        run: calls it.
        inputs: a batch of what it is called with.
        seed: of all randomness.

    Returns:
        False also where the model has no use for the format: it fails, as a ``view`` does, or gives other values; and
        where the user asks for deterministic algorithms, which time must not choose.
    """
    if inputs.ndim != 4 or not inputs.is_cpu or torch.are_deterministic_algorithms_enabled():
        return False
    if not any(weights.ndim == 4 for weights in model.parameters()):
        return False
    kind = tuple(inputs.shape[1:]), inputs.dtype
    found = _FOUND.setdefault(model, {})
    if kind not in found:
        first = inputs[:INPUTS].contiguous()
        last = with_channels_last(first)
        try:
            found[kind] = _agree(_timed(run, first, seed)[0], _timed(run, last, seed)[0]) and _is_faster(
                [(_timed(run, last, seed)[1], _timed(run, first, seed)[1]) for _ in range(TIMES)]
            )
        except Exception:  # whatever the model raises for a format that it was not made for; other errors come again
            found[kind] = False
    return found[kind]


def _timed(run: Callable[[Tensor], Any], inputs: Tensor, seed: int) -> tuple[Any, float]:
    """What a pass returns, and its seconds."""
    with isolated_random_state(seed):
        start = time.perf_counter()
        output = run(inputs)
        return output, time.perf_counter() - start


def _is_faster(seconds: list[tuple[float, float]]) -> bool:
    last, first = min(last for last, _ in seconds), min(first for _, first in seconds)
    return last < FASTER * first


def _agree(one: Any, other: Any) -> bool:
    """Whether two outputs hold the same tensors, up to the rounding of other kernels."""
    first, second = dict(all_tensors_of(one)), dict(all_tensors_of(other))
    tolerance = Tolerance.of(first.values())
    return bool(first) and first.keys() == second.keys() and all(tolerance.equal(first[k], second[k]) for k in first)
