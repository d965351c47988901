"""Products of transformation sets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from torch import Tensor

from lightning_invariance.messages import given
from lightning_invariance.transforms.affine import AffineSet, combine_affine
from lightning_invariance.transforms.base import CallableSet, Transformation, TransformationSet, combined_parameters


def combine(*sets: TransformationSet) -> TransformationSet:
    """All products of the members of several sets, the first set applied first, the last set varying fastest.

    Affine sets (rotations, scales, translations, quarter turns, flips) become one affine map for each product, so that
    pixels are interpolated once; ``combine(rotations(16), scales(), translations())`` is the paper's combined set of
    4224 (section 3.1.2). Other sets are applied one after the other. The inverse undoes the whole product.

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
    affine = [s for s in sets if isinstance(s, AffineSet)]
    if len(affine) == len(sets):
        return combine_affine(affine)

    columns = list(product(*(range(len(s)) for s in sets)))
    chosen = [[s[j] for s, j in zip(sets, column, strict=True)] for column in columns]
    members = {" ".join(t.label for t in chain): chain for chain in chosen}
    inverses = None
    if all(s.invertible for s in sets):
        inverses = {label: Chain([*reversed(chain)], inverse=True) for label, chain in members.items()}
    functions = {label: Chain(chain) for label, chain in members.items()}
    return CallableSet(functions, inverses, combined_parameters(sets, columns))


class Chain:
    """Members of sets applied one after the other (a class, so that sets of it can be pickled).

    Args:
        members: in the order in which they are applied.
        inverse: whether each maps back.
    """

    #: It is called with the size of the network's input where it transforms feature maps.
    takes_input_size = True

    def __init__(self, members: Sequence[Transformation], inverse: bool = False) -> None:
        self.members, self.inverse = list(members), inverse

    def __call__(self, x: Tensor, input_size: tuple[int, int] | None = None) -> Tensor:
        """Apply all of them; to feature maps where the size of the network's input is given."""
        for member in self.members:
            if self.inverse:
                x = member.inverse(x, input_size)
            else:
                x = member(x) if input_size is None else member.of_maps(x, input_size)
        return x
