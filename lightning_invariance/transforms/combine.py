"""Products of transformation sets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from lightning_invariance.messages import given
from lightning_invariance.transforms.affine import AffineSet
from lightning_invariance.transforms.base import CallableSet, Transformation, TransformationSet


def combine(*sets: TransformationSet) -> TransformationSet:
    """All products of several sets; the first set is applied first, the last set varies fastest.

    Affine sets (rotations, scales, translations, quarter turns, flips) become one affine map for each product, so that
    pixels are interpolated once; ``combine(rotations(16), scales(), translations())`` is the paper's combined set of
    4,224 transformations (section 3.1.2). Other sets are applied in sequence. Inverses undo the whole product.

    Args:
        sets: one or more transformation sets.

    Raises:
        ValueError: If no set is given.
        TypeError: If an argument is no :class:`TransformationSet`.

    Example:
        >>> from lightning_invariance import rotations, scales
        >>> combine(rotations(2), scales(factors=[0.5, 1])).labels
        ['0° ×0.5', '0° ×1', '180° ×0.5', '180° ×1']
    """
    if not sets:
        raise ValueError("Expected at least one transformation set, but got none.")
    for transformations in sets:
        if not isinstance(transformations, TransformationSet):
            raise TypeError(f"Expected transformation sets, but got {given(transformations)}.")
    columns = list(product(*(range(len(s)) for s in sets)))
    labels = [" ".join(s.labels[j] for s, j in zip(sets, column, strict=True)) for column in columns]
    parameters = _combined_parameters(sets, columns)
    affine = [s for s in sets if isinstance(s, AffineSet)]
    if len(affine) == len(sets):
        fills = {s.fill for s in affine if any(s.fill)}
        if len(fills) > 1:
            raise ValueError(f"Expected sets with one `fill`, to resample images once, but got {sorted(fills)}.")
        if len({s.map_axes for s in affine}) > 1:
            raise ValueError(f"Expected sets for images or sets for volumes, but got both: {list(sets)}.")
        matrices = torch.eye(affine[0].map_axes + 1, dtype=torch.float64).repeat(len(columns), 1, 1)
        for position, s in enumerate(affine):
            matrices = s.matrices[[column[position] for column in columns]] @ matrices
        return AffineSet(matrices, labels, parameters, any(s.square for s in affine), fills.pop() if fills else 0.0)

    chains = [[s[j] for s, j in zip(sets, column, strict=True)] for column in columns]
    functions = {label: Chain(chain) for label, chain in zip(labels, chains, strict=True)}
    inverses = None
    if all(s.invertible for s in sets):
        inverses = {label: Chain(chain[::-1], inverse=True) for label, chain in zip(labels, chains, strict=True)}
    same = [label for label, column in zip(labels, columns, strict=True) if column == tuple(s.identity for s in sets)]
    found = Product(functions, inverses, parameters, next(iter(same), None))
    found.input_vectors = tuple({axis for s in sets for axis in s.input_vectors})
    return found


def _combined_parameters(sets: Sequence[TransformationSet], columns: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    """The parameters of all products; a name that an earlier set uses gets a number."""
    parameters: dict[str, list[float]] = {}
    for position, transformations in enumerate(sets):
        for name, values in transformations.parameters.items():
            if name in parameters and name.startswith("fill"):  # all affine sets have one
                continue
            unique = name if name not in parameters else f"{name} {position + 1}"
            parameters[unique] = [values[column[position]] for column in columns]
    return parameters


class Product(CallableSet):
    """A set of chains of transformations."""

    def turned(self, vectors: Tensor, axis: int, inverse: bool = False) -> Tensor:
        """See :meth:`TransformationSet.turned`."""
        columns = zip(self._functions, vectors.unbind(1), strict=True)
        return torch.stack([chain.turned(x, axis, inverse) for chain, x in columns], 1)  # type: ignore[attr-defined]


class Chain:
    """A sequence of transformations, or of their inverses; a class instead of a function so that it can be pickled."""

    #: Calls include the size of the network's input.
    takes_input_size = True

    def __init__(self, members: Sequence[Transformation], inverse: bool = False) -> None:
        self.members, self.inverse = list(members), inverse

    def __call__(self, x: Tensor, input_size: tuple[int, ...] | None = None) -> Tensor:
        """Apply all transformations, to feature maps if ``input_size`` is given."""
        for member in self.members:
            if self.inverse:
                x = member.inverse(x, input_size)
            else:
                x = member(x) if input_size is None else member.of_maps(x, input_size)
        return x

    def turned(self, vectors: Tensor, axis: int, inverse: bool) -> Tensor:
        """Turn vectors ``(batch, ...)`` as all members do, or back; the axis is counted with an axis of columns."""
        for member in self.members[::-1] if inverse else self.members:
            vectors = member.turned(vectors, axis, inverse)
        return vectors
