"""Which part of the output of each layer belongs to which input: found by two small forward passes, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_invariance.precision import summed_on

#: Inputs of the two passes, as positions in a batch. The first is the same in both, for models that look at it. The
#: second pass is shorter, so that axes that are as long as the batch show; one input comes twice, so that what differs
#: between equal inputs of a batch shows; the others come in another order, so that the order of slices shows.
PASSES = ((0, 1, 2, 3, 4), (0, 3, 1, 3))

#: Kernels for batches of different sizes may round differently.
RELATIVE, ABSOLUTE = 1e-3, 1e-4

#: Values that differ by fewer units in the last place than this are the same.
ROUNDING = 8


@dataclass(frozen=True)
class Layout:
    """Where the inputs of a batch stand in the output of a layer.

    Attributes:
        axis: of the output, ``outer · batch · inner`` long.
        outer: how many slices of each input come before the next input's; 1 unless slices are concatenated.
        inner: how many slices of each input follow each other, such as windows, patches, or tokens.
    """

    axis: int = 0
    outer: int = 1
    inner: int = 1

    def batch_first(self, output: Tensor, batch: int) -> Tensor | None:
        """The output as ``(batch, *activation_shape)``; None where it has another length.

        More than one slice of an input become the first axis of its activation.
        """
        slices = self.outer * self.inner
        if output.ndim <= self.axis or output.shape[self.axis] != batch * slices:
            return None
        moved = output.movedim(self.axis, 0) if self.axis else output
        if slices == 1:
            return moved
        apart = moved.reshape(self.outer, batch, self.inner, *moved.shape[1:])
        return apart.movedim(1, 0).reshape(batch, slices, *moved.shape[1:])


#: How the inputs stand in the output of a layer, or why it cannot be measured.
Finding: TypeAlias = Layout | str

CONSTANT = "constant: does not depend on the input"
MIXED = "mixed: depends on other samples of the batch"
RAGGED = "ragged: not as much for every sample"
RANDOM = "random: equal inputs give different values"

Outputs: TypeAlias = dict[str, Tensor]


def few_of(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A few inputs of a batch for the passes, the first among them, and at which positions they stand.

    Where the batch has not as many, further ones are made: the values of an input in another order.
    """
    number = len(PASSES[0])
    if len(inputs) >= number:
        chosen = torch.linspace(0, len(inputs) - 1, number).round().long()
        return inputs[chosen.to(inputs.device)], chosen
    chosen = torch.arange(number) % len(inputs)
    made = [inputs[i].flatten().roll(k // len(inputs)).view_as(inputs[i]) for k, i in enumerate(chosen.tolist())]
    return torch.stack(made), chosen


def probe(
    outputs_of: Callable[[Sequence[int], int], Outputs],
    independent: Callable[[], set[str]],
    of_other_inputs: Callable[[Sequence[int], int], Outputs] | None = None,
) -> dict[str, Finding]:
    """Find the layout of every layer that two forward passes reach.

    Where values of a layer do not agree, a third pass over the inputs of the second tells whether it is random. Where
    they are the same for all inputs, or for other inputs, another one tells whether they are computed from the input:
    those of a layer that is dead are.

    Args:
        outputs_of: runs the model on some of a few inputs, given their numbers, with a number for the seed of all
            randomness, and gives the outputs of its layers.
        independent: runs the model and gives the layers whose outputs are not computed from the input.
        of_other_inputs: as ``outputs_of``, of other inputs with what else of the batch belongs to these: what a layer
            makes of that alone is not computed from the input either. None where the model gets the inputs only.
    """
    first, second = PASSES
    one, other = outputs_of(first, 0), outputs_of(second, 1)
    found: dict[str, Finding] = dict.fromkeys([*one, *other], RAGGED)  # where only one pass reaches the layer
    doubtful: Outputs = {}
    repeated: set[str] = set()
    for layer in one.keys() & other.keys():
        output = one.pop(layer)
        found[layer] = layout = finding_of(output, other[layer], first, second)
        if isinstance(layout, Layout) and _is_repeated(layout, output, len(first)):
            repeated.add(layer)
        elif layout == MIXED:
            doubtful[layer] = other[layer]
    if doubtful:
        again = outputs_of(second, 2)
        found |= {layer: RANDOM for layer, output in doubtful.items() if not _equal(output, again.get(layer))}
    if of_other_inputs is not None:
        same = of_other_inputs(second, 1)
        repeated |= {layer for layer, output in same.items() if _equal(output, other.get(layer))}
    if repeated:
        found |= dict.fromkeys(independent() & repeated, CONSTANT)
    return found


def finding_of(one: Tensor, other: Tensor, first: Sequence[int], second: Sequence[int]) -> Finding:
    """Compare what a layer made of two batches of different lengths, whose inputs are ``first`` and ``second``."""
    if one.ndim != other.ndim:
        return RAGGED
    differing = [axis for axis in range(one.ndim) if one.shape[axis] != other.shape[axis]]
    if not differing:
        return CONSTANT if _close(one, other) else MIXED
    axis = differing[0]
    slices, rest = divmod(one.shape[axis], len(first))
    if len(differing) > 1 or rest or other.shape[axis] != slices * len(second):
        return RAGGED
    places = [first.index(which) for which in second]
    for layout in _layouts(axis, slices):
        a, b = layout.batch_first(one, len(first)), layout.batch_first(other, len(second))
        if a is None or b is None:
            continue
        if _each_close(a[places], b):
            return layout
    if one.ndim == 1 and slices > 1:  # a list whose lengths happen to be multiples of those of the batches
        return RAGGED
    return MIXED


def _layouts(axis: int, slices: int) -> Iterator[Layout]:
    """Sample-major, slice-major, and slices on both sides of the samples."""
    outers = [outer for outer in range(1, slices + 1) if slices % outer == 0]
    for outer in sorted(outers, key=lambda outer: outer not in (1, slices)):
        yield Layout(axis, outer, slices // outer)


def _is_repeated(layout: Layout, output: Tensor, batch: int) -> bool:
    """Whether an output is the same for all inputs, up to rounding."""
    values = layout.batch_first(output, batch)
    if values is None:
        return False
    apart = (values - values[:1]).abs().amax()
    return bool(apart <= ROUNDING * torch.finfo(values.dtype).eps * values.abs().amax())


def _equal(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and _close(a, b)


def _each_close(a: Tensor, b: Tensor) -> bool:
    """Whether each slice along the first axis is close to that of the other."""
    if a.numel():
        values, others = (each.detach().to(summed_on(each.device)).double().reshape(len(a), -1) for each in (a, b))
        apart, size = (values - others).abs().amax(1), others.abs().amax(1)
        if bool((apart <= ABSOLUTE * size).all()):  # most are, and this takes fewer operations
            return True
    return all(map(_close, a, b))


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of different kernels; NaN are equal to NaN."""
    a, b = (each.detach().to(summed_on(each.device)).double() for each in (a, b))
    size = float(torch.cat([a.flatten(), b.flatten()]).nan_to_num(0, 0, 0).abs().amax()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=RELATIVE, atol=ABSOLUTE * size, equal_nan=True)
