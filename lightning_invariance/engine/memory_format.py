"""Whether a network runs faster on a CPU with the channels of its images last in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_invariance.model.hooks import Catcher
from lightning_invariance.model.layout import Tolerance
from lightning_invariance.model.outputs import tensors_of
from lightning_invariance.random_state import isolated_random_state

#: Inputs of the two passes whose values are compared.
FEW = 5

#: Inputs of the passes that are timed, and how many of these there are of each format, of which the shortest counts. A
#: first one of each, in which kernels are prepared, does not.
INPUTS, TIMES = 32, 2

#: Fewer inputs take so little time that what a faster format saves is less than what the timed passes take.
FEWEST = 1024

#: Channels last must take less than this part of the time: close calls would differ from one run to the next.
FASTER = 0.95

#: Model → what was found for what it is called with: a network that trains is evaluated many times. None where a pass
#: with channels last has failed: then never again.
_FOUND: WeakKeyDictionary[nn.Module, dict[Hashable, bool] | None] = WeakKeyDictionary()


class ChannelsLastError(Exception):
    """A pass of a model with channels last has failed, and may not fail with the format of the images."""


def with_channels_last(images: Tensor) -> Tensor:
    """The same images ``(batch, channels, height, width)`` with the channels last in memory, also if there is one."""
    return torch.empty_like(images, memory_format=torch.channels_last).copy_(images)


def never_with_channels_last(model: nn.Module) -> None:
    """Remember that a pass with channels last has failed."""
    _FOUND[model] = None


def is_faster_with_channels_last(
    model: nn.Module, run: Callable[[Tensor], Any], catcher: Catcher, inputs: Tensor, called: Hashable, seed: int
) -> bool:
    """Time the model with both formats, and remember what was found.

    Args:
        model: without 4-axis parameters, as those of 2-D convolutions are, it is not timed.
        run: calls it.
        catcher: hooks of the layers; its consumer is put back afterwards.
        inputs: a batch of what it is called with.
        called: how it is called.
        seed: of all randomness.

    Returns:
        False also where the format changes what a layer returns by more than rounding, or makes the model fail, as
        ``view`` does for a tensor with channels last; and where the user asks for deterministic algorithms, which time
        must not choose.
    """
    if inputs.ndim != 4 or not inputs.is_cpu or torch.are_deterministic_algorithms_enabled():
        return False
    if not any(weights.ndim == 4 for weights in model.parameters()):
        return False
    found = _FOUND.setdefault(model, {})
    if found is None:
        return False
    key = inputs.shape[1:], inputs.dtype, called, tuple(map(id, model.modules()))
    if key not in found:
        try:
            found[key] = _agree(run, catcher, inputs[:FEW], seed) and _is_faster(run, inputs[:INPUTS], seed)
        except Exception:  # of whatever kind: the model was not made for the format, or will fail with its own, too
            found[key] = False
    return found[key]


def _agree(run: Callable[[Tensor], Any], catcher: Catcher, inputs: Tensor, seed: int) -> bool:
    """Whether all layers, and the model, return the same with both formats, up to the rounding of other kernels."""
    first, last = (_outputs(run, catcher, x, seed) for x in (inputs, with_channels_last(inputs)))
    tolerance = Tolerance.of(first.values())
    return first.keys() == last.keys() and all(tolerance.equal(output, last[name]) for name, output in first.items())


def _outputs(run: Callable[[Tensor], Any], catcher: Catcher, inputs: Tensor, seed: int) -> dict[str, Tensor]:
    """What each layer returns, and the model under names that no layer has."""
    found: dict[str, Tensor] = {}

    def consumer(layer: str, output: Tensor, axis: int | None) -> None:
        found[layer] = output.clone()  # later modules may change it in place

    before, catcher.consumer = catcher.consumer, consumer
    try:
        with isolated_random_state(seed):
            output = run(inputs)
    finally:
        catcher.consumer = before
    return {**found, **{f"/output{place}": tensor for place, tensor in tensors_of(output)}}


def _is_faster(run: Callable[[Tensor], Any], inputs: Tensor, seed: int) -> bool:
    """Whether the shortest pass with channels last takes clearly less time than that with the format of the images."""
    both = inputs, with_channels_last(inputs)
    times = [[_seconds(run, x, seed) for x in both] for _ in range(1 + TIMES)][1:]
    first, last = (min(of_format) for of_format in zip(*times, strict=True))
    return bool(last < FASTER * first)


def _seconds(run: Callable[[Tensor], Any], inputs: Tensor, seed: int) -> float:
    with isolated_random_state(seed):
        start = time.perf_counter()
        run(inputs)
        return time.perf_counter() - start
