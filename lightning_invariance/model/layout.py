"""Which part of the output of each layer belongs to which input: found by two small forward passes, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_invariance.precision import summed_on

#: Inputs of the two passes, as positions in a batch. The first is the same in both, for models that look at it. The
#: second pass is shorter, so that axes that are as long as the batch show; one input comes twice, so that what differs
#: between equal inputs of a batch shows; the others come in another order, so that the order of slices shows.
PASSES = ((0, 1, 2, 3, 4), (0, 3, 1, 3))

#: Kernels for batches of different sizes may round differently, by so much relative to the value, and to the largest.
RELATIVE, ABSOLUTE = 1e-3, 1e-4

#: They differ by so many units in the last place of the largest value, where these are more.
LAST_PLACES = 8

#: Unit in the last place of what kernels for float32 multiply: GPUs may round factors to TF32.
TF32 = 2.0**-10

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
RAGGED = "ragged: output size varies between samples"
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
    tolerance = Tolerance.of(one.values())
    found: dict[str, Finding] = dict.fromkeys([*one, *other], RAGGED)  # where only one pass reaches the layer
    doubtful: Outputs = {}
    usual = _with_batch_first(one, other, tolerance)
    repeated = {layer for layer, is_repeated in usual.items() if is_repeated}
    found |= dict.fromkeys(usual, Layout())
    for layer in (one.keys() & other.keys()) - usual.keys():
        output = one.pop(layer)
        found[layer] = layout = _finding_of(output, other[layer], tolerance)
        if isinstance(layout, Layout) and _is_repeated(layout, output, len(first)):
            repeated.add(layer)
        elif layout == MIXED:
            doubtful[layer] = other[layer]
    if doubtful:
        again = outputs_of(second, 2)
        found |= {name: RANDOM for name, output in doubtful.items() if not tolerance.equal(output, again.get(name))}
    if of_other_inputs is not None:
        same = of_other_inputs(second, 1)
        repeated |= {layer for layer, output in same.items() if tolerance.equal(output, other.get(layer))}
    if repeated:
        found |= dict.fromkeys(independent() & repeated, CONSTANT)
    return found


@dataclass(frozen=True)
class Tolerance:
    """How far apart two outputs may be that kernels for batches of different lengths have rounded differently.

    Attributes:
        relative: to the value.
        absolute: as a fraction of the largest value.
    """

    relative: float
    absolute: float

    @classmethod
    def of(cls, outputs: Iterable[Tensor]) -> Tolerance:
        """That of a network with these outputs, each of which may be computed from any of the others."""
        rounding = max((_unit_of(output) for output in outputs), default=0.0)
        return cls(max(RELATIVE, LAST_PLACES * rounding), max(ABSOLUTE, LAST_PLACES * rounding))

    def equal(self, a: Tensor, b: Tensor | None) -> bool:
        """Whether both are there, of one shape, and :meth:`close`."""
        return b is not None and a.shape == b.shape and self.close(a, b)

    def close(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors of one shape are equal up to rounding; NaN are equal to NaN."""
        a, b = _wide(a), _wide(b)
        size = float(torch.cat([a.flatten(), b.flatten()]).nan_to_num(0, 0, 0).abs().amax()) if a.numel() else 0.0
        return torch.allclose(a, b, rtol=self.relative, atol=self.absolute * size, equal_nan=True)

    def each_close(self, a: Tensor, b: Tensor) -> bool:
        """Whether each slice along the first axis is close to that of the other."""
        return (a.numel() > 0 and bool(self.slices_close(_wide(a), _wide(b)))) or all(map(self.close, a, b))

    def slices_close(self, a: Tensor, b: Tensor) -> Tensor:
        """:meth:`each_close` without NaN, of float64 that is not empty, as a scalar where the tensors are."""
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        of_each = b.abs()
        sizes = of_each.amax(1, keepdim=True)
        most = of_each.mul_(self.relative).add_(sizes, alpha=self.absolute)
        return ((a - b).abs_().sub_(most) <= 0).all()  # false where a slice holds infinity: its difference is NaN


def _unit_of(output: Tensor) -> float:
    """The unit in the last place of what the kernels for an output's type multiply, relative to the value."""
    if not output.is_floating_point():
        return 0.0
    return TF32 if output.dtype == torch.float32 and not output.is_cpu else torch.finfo(output.dtype).eps


def _wide(output: Tensor) -> Tensor:
    """An output in float64, where that is there."""
    return output.detach().to(summed_on(output.device)).double()


def _with_batch_first(one: Outputs, other: Outputs, tolerance: Tolerance) -> dict[str, bool]:
    """The layers whose outputs have the batch first and one slice for each input, and whether it is always the same.

    What is found of all of them is read together: to read each from a GPU would make the CPU wait as often.
    """
    first, second = PASSES
    flags: dict[torch.device, dict[str, Tensor]] = {}
    places: dict[torch.device, Tensor] = {}
    for layer in one.keys() & other.keys():
        a, b = one[layer], other[layer]
        if a.is_complex() or not a.numel() or (len(first), *a.shape[1:]) != a.shape or a.shape[1:] != b.shape[1:]:
            continue
        if len(b) == len(second):
            a, b = _wide(a), _wide(b)
            if a.device not in places:
                places[a.device] = torch.tensor([first.index(which) for which in second], device=a.device)
            agree = tolerance.slices_close(a.index_select(0, places[a.device]), b)
            flags.setdefault(a.device, {})[layer] = torch.stack([agree, _repeated(a, one[layer].dtype)])
    found: dict[str, bool] = {}
    for of_device in flags.values():
        for layer, (agree, repeated) in zip(of_device, torch.stack([*of_device.values()]).tolist(), strict=True):
            if agree:
                found[layer] = repeated
    return found


def _finding_of(one: Tensor, other: Tensor, tolerance: Tolerance) -> Finding:
    """Compare what a layer made of the two batches of :data:`PASSES`."""
    first, second = PASSES
    if one.ndim != other.ndim:
        return RAGGED
    differing = [axis for axis in range(one.ndim) if one.shape[axis] != other.shape[axis]]
    if not differing:
        return CONSTANT if tolerance.close(one, other) else MIXED
    axis = differing[0]
    slices, rest = divmod(one.shape[axis], len(first))
    if len(differing) > 1 or rest or other.shape[axis] != slices * len(second):
        return RAGGED
    places = [first.index(which) for which in second]
    for layout in _layouts(axis, slices):
        a, b = layout.batch_first(one, len(first)), layout.batch_first(other, len(second))
        if a is None or b is None:
            continue
        if tolerance.each_close(a[places], b):
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
    return values is not None and bool(_repeated(values, values.dtype))


def _repeated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether values, computed in some type, are the same in all slices along the first axis, up to rounding."""
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return (values - values[:1]).abs().amax() <= ROUNDING * eps * values.abs().amax()
