"""Rotations of volumes and of point clouds."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from itertools import permutations, product

import torch
from torch import Tensor

from lightning_invariance.messages import check_int
from lightning_invariance.transforms.affine import AffineSet, cos_sin, products_of, turned_by
from lightning_invariance.transforms.base import TransformationSet

#: Number of rotations that map a cube onto itself.
CUBE = 24


class PointRotations(TransformationSet):
    """Rotations of points; see :func:`volume_rotations`.

    Feature maps ``(points, channels)`` stay as they are: points keep their places in a batch. What turns are vectors,
    as the argument ``vectors`` of an evaluation says.

    Args:
        matrices: ``(m, 3, 3)``: ``p_after = matrix @ p_before``.
        labels, parameters: see :class:`TransformationSet`.
    """

    input_vectors = (-1,)

    def __init__(self, matrices: Tensor, labels: Sequence[str], parameters: dict[str, list[float]] | None) -> None:
        super().__init__(labels, parameters)
        self.matrices = matrices
        identities = (matrices == torch.eye(3, dtype=torch.float64)).flatten(1).all(1).nonzero()
        self.identity = int(identities[0]) if len(identities) else None

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """The labels and the matrices."""
        return (*self.labels, *self.matrices.flatten().tolist())

    def products(self) -> Tensor:
        """See :meth:`TransformationSet.products`."""
        return products_of(self.matrices)

    def turned(self, vectors: Tensor, axis: int, inverse: bool = False) -> Tensor:
        """See :meth:`TransformationSet.turned`."""
        return turned_by(self.matrices, vectors, axis, inverse)

    def _apply(self, x: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        columns = x[:, None].expand(-1, len(self), *x.shape[1:])
        if input_size is not None:
            return columns
        if x.ndim < 2 or x.shape[-1] != 3 or not x.is_floating_point():
            raise ValueError(f"Expected points (batch, points, 3), but got {tuple(x.shape)} of {x.dtype}.")
        return turned_by(self.matrices, columns, -1, inverse=False)

    def _invert(self, st: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        return st if input_size is not None else turned_by(self.matrices, st, -1, inverse=True)

    def _select(self, columns: list[int]) -> PointRotations:
        labels = [self.labels[j] for j in columns]
        return PointRotations(self.matrices[columns], labels, self._selected_parameters(columns))


def volume_rotations(
    n: int | None = None, *, angles: Sequence[float] | None = None, axis: str = "z", points: bool = False
) -> AffineSet | PointRotations:
    """Rotations of volumes ``(batch, channels, depth, height, width)`` or of points ``(batch, points, 3)``.

    Volumes have x along the width, y along the height and z along the depth; points are (x, y, z). Quarter turns of
    cubes are exact permutations of voxels; other rotations interpolate, and fill with zeros.

    Args:
        n: 24 for all rotations that map a cube onto itself (the default); another number for as many angles about
            ``axis``, evenly spaced over the full turn.
        angles: angles about ``axis`` in degrees. About z they turn the slices of a volume as
            :func:`~lightning_invariance.rotations` turn images; points turn counter-clockwise, seen against the axis.
        axis: ``"x"``, ``"y"`` or ``"z"``.
        points: whether inputs are points.

    Raises:
        ValueError: If both ``n`` and ``angles`` are given, there is no angle, one is not finite, or ``axis`` is another
            one. Where the set is used, if volumes are no cubes for n=24, or inputs are neither.

    Example:
        >>> import torch
        >>> t = volume_rotations(24)
        >>> len(t), t.labels[:3]
        (24, ['(x,y,z)', '(x,-y,-z)', '(-x,y,-z)'])
        >>> t(torch.rand(2, 1, 4, 4, 4)).shape
        torch.Size([2, 24, 1, 4, 4, 4])
    """
    if n is not None and angles is not None:
        raise ValueError(f"Expected one of the arguments `n` and `angles`, but got n={n} and angles={angles}.")
    if axis not in ("x", "y", "z"):
        raise ValueError(f'Expected argument `axis` to be "x", "y" or "z", but got {axis!r}.')
    parameters: dict[str, list[float]] | None = None
    if angles is None and n in (None, CUBE):
        matrices, labels = _turns_of_a_cube()
    else:
        n = None if n is None else check_int("n", n)
        known = list(angles) if angles is not None else [360 * j / n for j in range(n or 0)] if n else []
        if not known or not all(map(math.isfinite, known)):
            raise ValueError(f"Expected argument `angles` to hold finite numbers, but got {angles}.")
        matrices = torch.stack([_about(axis, angle if points else -angle) for angle in known])
        labels, parameters = [f"{angle:g}°" for angle in known], {"angle": known}
    if points:
        return PointRotations(matrices, labels, parameters)
    homogeneous = torch.eye(4, dtype=torch.float64).repeat(len(matrices), 1, 1)
    homogeneous[:, :3, :3] = matrices
    return AffineSet(homogeneous, labels, parameters, square=parameters is None)


def _about(axis: str, degrees: float) -> Tensor:
    """The right-handed rotation matrix about an axis."""
    c, s = cos_sin(degrees)
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[first, first], matrix[second, second] = c, c
    matrix[first, second], matrix[second, first] = -s, s
    return matrix


def _turns_of_a_cube() -> tuple[Tensor, list[str]]:
    """The signed permutation matrices with determinant 1, and where the coordinates go."""
    matrices, labels = [], []
    for order, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        matrix = torch.zeros(3, 3, dtype=torch.float64)
        for row, (column, sign) in enumerate(zip(order, signs, strict=True)):
            matrix[row, column] = sign
        if torch.linalg.det(matrix) > 0:
            matrices.append(matrix)
            named = zip(order, signs, strict=True)
            labels.append("(" + ",".join(f"{'-' if sign < 0 else ''}{'xyz'[column]}" for column, sign in named) + ")")
    return torch.stack(matrices), labels
