"""Detection of the batch axis in every layer's output, from two small forward passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_invariance.precision import summed_on

#: Inputs of the two passes, by number. The first is equal in both, for models that treat it specially. The second pass
#: is shorter, to identify the batch axis; it has one input twice, to identify layers that are random or depend on the
#: rest of the batch, and the others in another order, to identify the order of slices.
PASSES = ((0, 1, 2, 3, 4), (0, 3, 1, 3))

#: The second pass with another input in the place of the third. Rounding does not change the other outputs.
COMPANIONS = (0, 3, 4, 3)

#: Layers whose outputs for two batches of different sizes differ by more units in the last place of the largest value
#: may depend on the batch, as the steps of an adaptive solver do, within the tolerance for rounding.
DOUBTFUL_PLACES = 64

#: Rounding differences allowed between batches of different sizes, relative to the value and to the largest value.
RELATIVE, ABSOLUTE = 1e-3, 1e-4

#: The allowed difference in units in the last place, for types in which that is more.
LAST_PLACES = 8

#: Unit in the last place of float32 products on GPUs, which may round factors to TF32.
TF32 = 2.0**-10

#: Values count as equal within a batch if they differ by at most this many units in the last place.
ROUNDING = 8


@dataclass(frozen=True)
class Layout:
    """Positions of the inputs of a batch in the output of a layer.

    Attributes:
        axis: axis of the output with length ``outer · batch · inner``.
        outer: number of slices of each input that precede the next input; 1 unless slices are concatenated.
        inner: number of consecutive slices of each input, such as windows, patches, or tokens.
    """

    axis: int = 0
    outer: int = 1
    inner: int = 1

    def batch_first(self, output: Tensor, batch: int) -> Tensor | None:
        """Reshape an output to ``(batch, *activation_shape)``; None if it has another length.

        Several slices of an input become the first axis of its activation.
        """
        slices = self.outer * self.inner
        if output.ndim <= self.axis or output.shape[self.axis] != batch * slices:
            return None
        moved = output.movedim(self.axis, 0) if self.axis else output
        if slices == 1:
            return moved
        separate = moved.reshape(self.outer, batch, self.inner, *moved.shape[1:])
        return separate.movedim(1, 0).reshape(batch, slices, *moved.shape[1:])


#: The layout of a layer, or why it cannot be measured.
Finding: TypeAlias = Layout | str

CONSTANT = "constant: does not depend on the input"
MIXED = "mixed: depends on other samples of the batch"
RAGGED = "ragged: the length of the output varies between samples"
REPEATED = "repeated"
RANDOM = "random: equal inputs give different values"

Outputs: TypeAlias = dict[str, Tensor]


def ragged(one: tuple[int, ...], other: tuple[int, ...]) -> str:
    """The reason why a layer whose activations have several shapes is left out."""
    axes = [axis for axis, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    if len(one) != len(other) or len(axes) != 1:
        return f"{RAGGED} (shapes {one} and {other})"
    return f"{RAGGED} (axis {axes[0]}: {one[axes[0]]} and {other[axes[0]]})"


def compare(one: Outputs, other: Outputs, tolerance: Tolerance) -> tuple[dict[str, Finding], set[str], set[str]]:
    """Compare the outputs of all layers for the two :data:`PASSES`.

    Returns:
        The finding of each layer; the layers whose values are equal for all inputs; and the layers that agree less well
        than rounding explains.
    """
    found: dict[str, Finding] = dict.fromkeys([*one, *other], RAGGED)  # for layers that run in one pass only
    usual = _with_batch_first(one, other, tolerance)
    found |= dict.fromkeys(usual, Layout())
    repeated = {layer for layer, (is_repeated, _) in usual.items() if is_repeated}
    doubted = {layer for layer, (_, is_exact) in usual.items() if not is_exact}
    for layer in (one.keys() & other.keys()) - usual.keys():
        found[layer] = layout = _finding_of(one[layer], other[layer], tolerance)
        values = layout.batch_first(one[layer], len(PASSES[0])) if isinstance(layout, Layout) else None
        if values is not None and bool(_is_repeated(values, values.dtype)):
            repeated.add(layer)
    return found, repeated, doubted


def is_changed(finding: Finding, output: Tensor, beside: Tensor | None) -> bool:
    """Whether an output for the second pass is another one for :data:`COMPANIONS`, where the inputs are equal."""
    if not isinstance(finding, Layout) or beside is None:
        return False
    a, b = (finding.batch_first(each, len(COMPANIONS)) for each in (output, beside))
    kept = [place for place, which in enumerate(COMPANIONS) if which == PASSES[1][place]]
    rounding = LAST_PLACES * _unit_of(output)
    return a is not None and b is not None and not Tolerance(rounding, rounding).equal(a[kept], b[kept])


@dataclass(frozen=True)
class Tolerance:
    """Rounding differences allowed between outputs for batches of different lengths.

    Attributes:
        relative: as a fraction of the value.
        absolute: as a fraction of the largest value.
    """

    relative: float
    absolute: float

    @classmethod
    def of(cls, outputs: Iterable[Tensor]) -> Tolerance:
        """The tolerance for a network with these outputs, each of which may be computed from any other."""
        rounding = LAST_PLACES * max((_unit_of(output) for output in outputs), default=0.0)
        return cls(max(RELATIVE, rounding), max(ABSOLUTE, rounding))

    def equal(self, a: Tensor, b: Tensor | None) -> bool:
        """Whether both tensors exist, have one shape, and are :meth:`close`."""
        return b is not None and a.shape == b.shape and self.close(a, b)

    def close(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors of one shape are equal up to rounding; NaN equals NaN."""
        a, b = _wide(a), _wide(b)
        size = float(torch.cat([a.flatten(), b.flatten()]).nan_to_num(0, 0, 0).abs().amax()) if a.numel() else 0.0
        return torch.allclose(a, b, rtol=self.relative, atol=self.absolute * size, equal_nan=True)

    def slices_close(self, a: Tensor, b: Tensor) -> Tensor:
        """Whether all slices along the first axis of float64 tensors are close; false for NaN and infinity."""
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
        of_each = b.abs()
        sizes = of_each.amax(1, keepdim=True)
        most = of_each.mul_(self.relative).add_(sizes, alpha=self.absolute)
        return ((a - b).abs_().sub_(most) <= 0).all()


def _unit_of(output: Tensor) -> float:
    """The relative unit in the last place of the products from which an output is computed."""
    if not output.is_floating_point():
        return 0.0
    return TF32 if output.dtype == torch.float32 and not output.is_cpu else torch.finfo(output.dtype).eps


def _wide(output: Tensor) -> Tensor:
    """Convert an output to float64, on the CPU if its device has no float64."""
    return output.detach().to(summed_on(output.device)).double()


def _with_batch_first(one: Outputs, other: Outputs, tolerance: Tolerance) -> dict[str, tuple[bool, bool]]:
    """The layers whose outputs have the batch first and one slice for each input.

    For each whether all slices are equal, and whether the passes agree up to :data:`DOUBTFUL_PLACES`. The results of
    all layers are read together, since each read from a GPU synchronises.
    """
    first, second = PASSES
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for layer in one.keys() & other.keys():
        a, b = one[layer], other[layer]
        usual = a.shape == (len(first), *a.shape[1:]) and b.shape == (len(second), *a.shape[1:])
        if usual and a.numel() and not a.is_complex():
            a, b = _wide(a), _wide(b)
            again = torch.stack([a[first.index(which)] for which in second])
            exact = Tolerance(0.0, DOUBTFUL_PLACES * _unit_of(one[layer])).slices_close(again, b)
            agree, repeated = tolerance.slices_close(again, b), _is_repeated(a, one[layer].dtype)
            flags.setdefault(a.device, {})[layer] = torch.stack([agree, repeated, exact])
    found: dict[str, tuple[bool, bool]] = {}
    for of_device in flags.values():
        for layer, (agree, *about) in zip(of_device, torch.stack([*of_device.values()]).tolist(), strict=True):
            if agree:
                found[layer] = tuple(about)
    return found


def _finding_of(one: Tensor, other: Tensor, tolerance: Tolerance) -> Finding:
    """Compare the outputs of a layer for the two :data:`PASSES`."""
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
    outers = [outer for outer in range(1, slices + 1) if slices % outer == 0]
    for outer in sorted(outers, key=lambda outer: outer not in (1, slices)):  # slices on both sides are least likely
        layout = Layout(axis, outer, slices // outer)
        a, b = layout.batch_first(one, len(first)), layout.batch_first(other, len(second))
        if a is not None and b is not None and all(map(tolerance.close, a[places], b)):
            return layout
    if one.ndim == 1 and slices > 1:  # a list whose lengths happen to be multiples of the batch sizes
        return RAGGED
    return MIXED


def _is_repeated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether values, computed in a type, are equal in all slices along the first axis, up to rounding."""
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return (values - values[:1]).abs().amax() <= ROUNDING * eps * values.abs().amax()
