"""Run a network on a few inputs to find where samples stand in the output of each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_invariance.model.dependence import Dependence
from lightning_invariance.model.hooks import Catcher
from lightning_invariance.model.layout import CONSTANT, Finding, Outputs, few_of, probe
from lightning_invariance.random_state import isolated_random_state

#: Runs the network on some inputs of a batch, given their positions in it.
Call: TypeAlias = Callable[[Tensor, Tensor], Any]

#: What a layer returned, without values; the axis of its channels, counted from the end, where the module says it; and
#: for how many inputs.
Output: TypeAlias = tuple[Tensor, int | None, int]

#: Errors of a model that is called otherwise than it is made for, whose message can be added to.
FAILURES = (TypeError, NotImplementedError, RuntimeError, IndexError, AttributeError, ValueError)


class Probed(NamedTuple):
    """What a probe has found.

    Attributes:
        findings: layer → where the inputs of a batch stand in its output, or why it cannot be measured.
        outputs: layer → its output, without values.
    """

    findings: dict[str, Finding]
    outputs: dict[str, Output]


def probe_batch(batch: Tensor, catcher: Catcher, call: Call, seed: int, takes_batch: bool) -> Probed:
    """Run a network on copies of a few inputs of a batch.

    Args:
        batch: the inputs, ``(batch, *input_shape)``.
        catcher: hooks of the layers.
        call: runs the network.
        seed: of all randomness.
        takes_batch: whether the network also sees what else there is of the samples.

    Raises:
        TypeError: As all errors of :data:`FAILURES`, if the network fails, with what it was called with.
    """
    inputs, positions = few_of(batch)
    last: dict[str, Output] = {}

    def outputs_of(numbers: Sequence[int], number: int, shift: int = 0) -> Outputs:
        outputs: Outputs = {}
        chosen = list(numbers)
        shown = inputs.roll(shift, 0)[chosen] if shift else inputs[chosen]

        def consumer(layer: str, output: Tensor, axis: int | None) -> None:
            outputs[layer] = output.clone()  # later modules may change it in place
            last[layer] = torch.empty_like(output, device="meta"), axis, len(chosen)

        with isolated_random_state(seed + number), catcher.recording(consumer):
            try:
                call(shown, positions[chosen])
            except FAILURES as error:
                if type(error) in FAILURES:
                    raise type(error)(f"{error}\n{_how_called(tuple(shown.shape))}") from error
                raise
        return outputs

    def independent() -> set[str]:
        constant: set[str] = set()
        dependence = Dependence(inputs)

        def consumer(layer: str, output: Tensor, axis: int | None) -> None:
            if not dependence.holds(output):
                constant.add(layer)

        with isolated_random_state(seed), catcher.recording(consumer), dependence:
            call(inputs, positions)
        return constant

    found = probe(outputs_of, independent, partial(outputs_of, shift=1) if takes_batch else None)
    if catcher.operations is not None:
        # What does not depend on the input, such as masks and positions, is nobody's layer.
        constant = {name for name, finding in found.items() if finding == CONSTANT and "/" in name}
        catcher.operations.returned |= constant
        found = {name: finding for name, finding in found.items() if name not in catcher.operations.returned}
    return Probed(found, last)


def _how_called(shape: tuple[int, ...]) -> str:
    """What to look at where a model's forward fails."""
    return (
        f"The model was called with x of shape {shape}. If it is not called as `model(x)`, give `forward=lambda model,"
        " x: ...`, or `forward=lambda model, x, batch: ...` where it needs more of the batch; if x is another part of a"
        " batch, `input_fn=`; if it needs other samples, `data=`."
    )
