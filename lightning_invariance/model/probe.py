"""Forward passes over a few inputs, to find the layout of every layer's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_invariance.model.hooks import Catcher
from lightning_invariance.model.input_dependence import Dependence
from lightning_invariance.model.sample_axis import CONSTANT, Finding, Outputs, example_inputs, probe
from lightning_invariance.random_state import isolated_random_state

#: Runs the network on some inputs of a batch, given their positions in it.
Call: TypeAlias = Callable[[Tensor, Tensor], Any]

#: An output of a layer, without values; its channel axis, counted from the end, if known; and the number of inputs.
Output: TypeAlias = tuple[Tensor, int | None, int]

#: Errors of a model that is called in the wrong way, to whose message a hint can be added.
FAILURES = (TypeError, NotImplementedError, RuntimeError, IndexError, AttributeError, ValueError)

HINT = (
    "The model was called with x of shape {}. If it is not called as `model(x)`, give `forward=lambda model, x: ...`,"
    " or `forward=lambda model, x, batch: ...` where it needs more of the batch; if x is another part of a batch,"
    " `input_fn=`; if it needs other samples, `data=`."
)


class Probed(NamedTuple):
    """Results of a probe.

    Attributes:
        findings: layer → its layout, or why it cannot be measured.
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
        seed: seed of all randomness.
        takes_batch: whether the network also receives the rest of the batch.

    Raises:
        TypeError: Like every error in :data:`FAILURES`, if the network fails; the message has a hint.
    """
    inputs, positions = example_inputs(batch)
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
                    raise type(error)(f"{error}\n{HINT.format(tuple(shown.shape))}") from error
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
        # Operations that do not depend on the input, such as masks and positions, are not reported as left out.
        constant = {name for name, finding in found.items() if finding == CONSTANT and "/" in name}
        catcher.operations.returned |= constant
        found = {name: finding for name, finding in found.items() if name not in catcher.operations.returned}
    return Probed(found, last)
