"""Forward passes over a few inputs, to find the layout of every layer's output."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_invariance.model.hooks import Catcher
from lightning_invariance.model.input_dependence import Dependence
from lightning_invariance.model.outputs import all_tensors_of, why_not
from lightning_invariance.model.sample_axis import (
    COMPANIONS,
    CONSTANT,
    MIXED,
    PASSES,
    RANDOM,
    REPEATED,
    Finding,
    Layout,
    Outputs,
    Tolerance,
    compare,
    is_changed,
)
from lightning_invariance.random_state import isolated_random_state

#: Runs the network on some inputs of a batch, given their positions in it.
Call: TypeAlias = Callable[[Tensor, Tensor], Any]

#: An output of a layer, without values; its channel axis, counted from the end, if known; and the number of inputs.
Output: TypeAlias = tuple[Tensor, int | None, int]

#: Errors of a model that is called in the wrong way, to whose message a hint can be added.
FAILURES = (
    TypeError,
    NotImplementedError,
    RuntimeError,
    IndexError,
    KeyError,
    AttributeError,
    ValueError,
    AssertionError,
)

HINT = (
    "The model was called with x of shape {}. If it is not called as `model(x)`, give `forward=lambda model, x: ...`,"
    " or `forward=lambda model, x, batch: ...` where it needs more of the batch; if x is another part of a batch,"
    " `input_fn=`; if it needs other samples, `data=`."
)


GRADIENTS = (
    "The model needs gradients in forward, but runs without them: write `with torch.enable_grad():` in it and"
    " `x = x.detach().requires_grad_()`, or do so in a function that is given as `forward=`."
)


class Probed(NamedTuple):
    """Results of a probe.

    Attributes:
        findings: layer → its layout, or why it cannot be measured.
        outputs: layer → its output, without values.
    """

    findings: dict[str, Finding]
    outputs: dict[str, Output]


def probe_batch(
    batch: Tensor, catcher: Catcher, call: Call, seed: int, takes_batch: bool, agree: Callable[[bool], bool]
) -> Probed:
    """Find the layout of every layer by running a network on copies of a few inputs of a batch.

    Two passes are compared. If values of a layer agree less well than rounding explains, a pass with another input
    beside tells whether they depend on it. If they do not agree, a pass over the inputs of the second decides whether
    the layer is random. If values are equal for all inputs, or for other inputs with the rest of the batch unchanged, a
    pass that tracks dependence decides whether they are computed from the input, as in a dead layer, or constant.

    Args:
        batch: the inputs, ``(batch, *input_shape)``.
        catcher: hooks of the layers.
        call: runs the network.
        seed: seed of all randomness.
        takes_batch: whether the network also receives the rest of the batch.
        agree: tells whether any process needs a further pass, given whether this one does: all run equally many.

    Raises:
        TypeError: Like every error in :data:`FAILURES`, if the network fails; the message has a hint.
    """
    inputs, positions = _example_inputs(batch)
    last: dict[str, Output] = {}
    repeats = Repeats()
    refused: dict[str, Finding] = {}

    def outputs_of(numbers: Sequence[int], seed: int, shift: int = 0) -> Outputs:
        outputs: Outputs = {}
        repeats.start()
        chosen = list(numbers)
        shown = inputs.roll(shift, 0)[chosen] if shift else inputs[chosen]

        def consumer(layer: str, output: Tensor | str, axis: int | None) -> None:
            if isinstance(output, str):
                refused[layer] = output
                return
            repeats.look_at(layer, output, outputs, catcher.output)
            outputs[layer] = output.clone()  # later modules may change it in place
            last[layer] = torch.empty_like(output, device="meta"), axis, len(chosen)

        with isolated_random_state(seed, catcher.state.generators), catcher.recording(consumer):
            try:
                call(shown, positions[chosen])
            except FAILURES as error:
                if type(error) in FAILURES:
                    hint = GRADIENTS if "require grad" in str(error) else HINT.format(tuple(shown.shape))
                    raise type(error)(f"{error}\n{hint}") from error
                raise
        return outputs

    first, second = PASSES
    one, other = outputs_of(first, seed), outputs_of(second, seed + 1)
    tolerance = Tolerance.of(one.values())
    found, repeated, doubted = compare(one, other, tolerance)
    found |= refused
    beside = outputs_of(COMPANIONS, seed + 1) if agree(bool(doubted)) else {}
    found |= {layer: MIXED for layer in doubted if is_changed(found[layer], other[layer], beside.get(layer))}
    mixed = [layer for layer, finding in found.items() if finding == MIXED]
    if agree(bool(mixed)):
        again = outputs_of(second, seed + 2)
        found |= {layer: RANDOM for layer in mixed if not tolerance.equal(other[layer], again.get(layer))}
    if takes_batch:
        changed = outputs_of(second, seed + 1, shift=1)
        repeated |= {layer for layer, output in changed.items() if tolerance.equal(output, other.get(layer))}
    if agree(bool(repeated)):
        with isolated_random_state(seed, catcher.state.generators):
            found |= dict.fromkeys(_independent(inputs, positions, catcher, call) & repeated, CONSTANT)
    if catcher.operations is not None:
        # Operations that do not depend on the input, such as masks and positions, are not reported as left out.
        names = {name for name in found if name.partition("[")[0] in catcher.operations.names}
        constant = {name for name in names if found[name] == CONSTANT}
        catcher.operations.returned |= constant
        found = {name: finding for name, finding in found.items() if name not in catcher.operations.returned}
    return Probed(found | repeats.among(found, catcher.selection.asks_for), last)


class Repeats:
    """Finds outputs that are an earlier output of the same forward pass again, or a view of all of it.

    Such as of ``nn.Dropout``, ``nn.Identity`` and ``nn.Flatten`` in eval mode. A view with more axes, such as of
    ``nn.Unflatten``, is no repeat: it has axes that the earlier output lacks.

    Attributes:
        groups: first layer → the layers that return its output, in their order.
    """

    def __init__(self) -> None:
        self.groups: dict[str, list[str]] = {}
        # By memory, which belongs to the output as long as one of its aliases lives.
        self._seen: dict[tuple[int, int], tuple[str, tuple[weakref.ref[Tensor], ...], int, int]] = {}

    def start(self) -> None:
        """Begin a forward pass."""
        self._seen.clear()

    def look_at(self, layer: str, output: Tensor, earlier_outputs: Outputs, returned: Any) -> None:
        """Compare the output of a layer, one of the tensors that its module returned, with the earlier ones."""
        if type(output) is not Tensor or output.is_inference():
            return
        memory = output.data_ptr(), output.numel()
        # The tensor that lives on: the one at hand may be a copy without gradients or metadata.
        known = (tensor for _, tensor in all_tensors_of(returned) if why_not(tensor) is None)
        own = weakref.ref(next((tensor for tensor in known if tensor.data_ptr() == memory[0]), output))
        version = output._version  # which changes where it is written to
        earlier, aliases, then, axes = self._seen.get(memory, (layer, (), version, 0))
        is_alive = any(alias() is not None for alias in aliases)
        is_repeat = is_alive and earlier != layer and version == then and output.ndim <= axes
        if is_repeat and _same_values(earlier_outputs[earlier], output):
            self._seen[memory] = earlier, (*aliases, own), version, axes
        else:
            earlier = layer
            self._seen[memory] = layer, (own,), version, output.ndim
        group = self.groups.setdefault(earlier, [])
        if layer not in group:
            group.append(layer)

    def among(self, findings: Mapping[str, Finding], asked_for: Callable[[str], bool]) -> dict[str, Finding]:
        """Layer → reason, of layers that repeat another one that can be measured and that nobody asked for."""
        found: dict[str, Finding] = {}
        for group in self.groups.values():
            measured = [layer for layer in group if isinstance(findings.get(layer), Layout)]
            reason = f"{REPEATED}: returns the output of {measured[0]!r} again" if measured else ""
            found |= {layer: reason for layer in measured[1:] if not asked_for(layer)}
        return found


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold equal values, in any order: slices share an address, `tensor.data` changes unseen."""
    return torch.equal(one.flatten().sort().values, other.flatten().sort().values)


def _example_inputs(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Choose inputs of a batch for the passes, and return them with their positions; the first is among them.

    For batches that are too small, it also permutes the values of an input to make further ones.
    """
    number = len(PASSES[0])
    if len(inputs) >= number:
        chosen = torch.linspace(0, len(inputs) - 1, number).round().long()
        return inputs[chosen.to(inputs.device)], chosen
    chosen = torch.arange(number) % len(inputs)
    made = [inputs[i].flatten().roll(k // len(inputs)).view_as(inputs[i]) for k, i in enumerate(chosen.tolist())]
    return torch.stack(made), chosen


def _independent(inputs: Tensor, positions: Tensor, catcher: Catcher, call: Call) -> set[str]:
    """The layers whose outputs are not computed from the inputs."""
    constant: set[str] = set()
    dependence = Dependence(inputs)

    def consumer(layer: str, output: Tensor | str, axis: int | None) -> None:
        if isinstance(output, Tensor) and not dependence.holds(output):
            constant.add(layer)

    with catcher.recording(consumer), dependence:
        call(inputs, positions)
    return constant
