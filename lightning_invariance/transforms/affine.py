"""Affine transformations of images and volumes: rotations, scales and translations."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.messages import check_int
from lightning_invariance.transforms.base import TransformationSet
from lightning_invariance.transforms.resampling import Resampling

#: Names of the axes of images and volumes.
AXES = ("depth", "height", "width")

#: Scale factors of the paper (section 3.1.2).
PAPER_FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25)

#: Maximal number of cached resamplings of a set, one for each size of images and feature maps; networks have few sizes.
MAX_CACHED = 16

#: Products of larger sets are not looked for.
MAX_PRODUCTS = 256

#: Resamplings of more transformations × pixels are not cached, since they need much memory and save little time.
MAX_CACHED_PIXELS = 2**20


class AffineSet(TransformationSet):
    """Affine maps of images or volumes about their centre, applied with one linear resampling.

    Maps from pixel centres to pixel centres (a quarter turn of a square, a flip, a shift by whole pixels) only move
    pixels and are exact; other maps interpolate. Inputs are ``(batch, channels, height, width)``, or have more axes
    before ``(height, width)``; volumes are ``(batch, channels, depth, height, width)``. Results for integer inputs are
    rounded to the input's type.

    Args:
        matrices: ``(m, 3, 3)``, homogeneous maps of positions in pixels: ``p_after = matrix @ p_before``, with the
            origin in the image's centre, x to the right and y down; ``(m, 4, 4)`` for volumes, with z along the depth.
        labels: a short text for each map.
        parameters: numbers for the axes of plots.
        square: whether only square images, or cubes, are accepted (quarter turns that must not lose pixels).
        fill: value of pixels from outside the image, one number or one for each channel. Feature maps are always
            filled with zeros.
    """

    def __init__(
        self,
        matrices: Tensor,
        labels: Sequence[str],
        parameters: Mapping[str, Sequence[float]] | None = None,
        square: bool = False,
        fill: float | Sequence[float] = 0.0,
    ) -> None:
        self.fill = _checked_fill(fill)
        numbers = range(1, len(self.fill) + 1) if any(self.fill) else []
        fills = {f"fill {k}" if k > 1 else "fill": [self.fill[k - 1]] * len(labels) for k in numbers}
        super().__init__(labels, {**(parameters or {}), **fills})
        if matrices.shape not in ((len(self), 3, 3), (len(self), 4, 4)):
            raise ValueError(f"Expected matrices of shape ({len(self)}, 3, 3), but got {tuple(matrices.shape)}.")
        self.matrices = matrices.to(torch.float64)
        self.map_axes = matrices.shape[1] - 1
        self.square = square
        identities = (self.matrices == torch.eye(matrices.shape[1]).double()).flatten(1).all(1).nonzero()
        self.identity = int(identities[0]) if len(identities) else None
        self._cached_resamplings: dict[Hashable, Resampling] = {}

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """The labels, the maps and the fill."""
        return (*self.labels, self.square, self.fill, *self.matrices.flatten().tolist())

    def _apply(self, x: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        if input_size is None:  # feature maps may have any shape
            _check_images(x, self.map_axes)
        self._check_square(x)
        # A view: all columns read one copy of the images.
        columns = x.reshape(1, 1, -1, *x.shape[-self.map_axes :])
        columns = columns.expand(1, len(self), *columns.shape[2:])
        fill = self._fill_of_planes(x) if input_size is None else None
        moved = self._resampling(x, input_size, forward=True)(columns, fill)
        return moved.view(len(self), *x.shape).transpose(0, 1).contiguous()

    def _invert(self, st: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        if st.ndim < 2 + self.map_axes:
            axes = ", ".join(AXES[-self.map_axes :])
            raise ValueError(f"Expected feature maps (batch, {len(self)}, ..., {axes}), got {tuple(st.shape)}.")
        self._check_square(st)
        columns = st.reshape(len(st), len(self), -1, *st.shape[-self.map_axes :])
        return self._resampling(st, input_size, forward=False)(columns).view(st.shape)

    def points(self, xy: Tensor, size: tuple[int, ...]) -> Tensor:
        """See :meth:`TransformationSet.points`."""
        if xy.shape[-1:] != (self.map_axes,) or len(size) != self.map_axes:
            raise ValueError(
                f"Expected positions (..., {self.map_axes}) and a size of as many numbers, but got {tuple(xy.shape)}"
                f" and {size}."
            )
        centre = (torch.tensor(size[::-1], dtype=torch.float64, device=xy.device) - 1) / 2
        matrices = self.matrices.to(xy.device)
        moved = torch.einsum("jkl,...l->j...k", matrices[:, :-1, :-1], xy.double() - centre) + centre
        moved = moved + matrices[:, :-1, -1].view(len(self), *[1] * (xy.ndim - 1), -1)
        return moved.to(xy.dtype if xy.is_floating_point() else torch.float64)

    def turned(self, vectors: Tensor, axis: int, inverse: bool = False) -> Tensor:
        """See :meth:`TransformationSet.turned`."""
        return turned_by(self.matrices[:, :-1, :-1], vectors, axis, inverse)

    def products(self) -> Tensor:
        """See :meth:`TransformationSet.products`."""
        return products_of(self.matrices) if len(self) <= MAX_PRODUCTS else super().products()

    def _fill_of_planes(self, x: Tensor) -> Tensor | None:
        """The fill of each plane ``(height, width)`` of images; None for zeros."""
        if not any(self.fill):
            return None
        channels = x.shape[-self.map_axes - 1]
        if len(self.fill) not in (1, channels):
            raise ValueError(
                f"Expected argument `fill` to be one number, or one for each of {channels} channels of images"
                f" {tuple(x.shape)}, but got {len(self.fill)} numbers."
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        fill = torch.tensor(self.fill, dtype=dtype, device=x.device)
        return fill.expand(x.shape[: -self.map_axes].numel() // max(1, channels), channels).flatten()

    def _resampling(self, maps: Tensor, input_size: tuple[int, ...] | None, forward: bool) -> Resampling:
        """The cached resampling by the maps, or by their inverses, for one size of images."""
        key = (tuple(maps.shape[-self.map_axes :]), input_size, forward, maps.device, maps.dtype == torch.float64)
        if key in self._cached_resamplings:
            return self._cached_resamplings[key]
        matrices, size = self.matrices.clone(), maps.shape[-self.map_axes :]
        if input_size is not None:  # shifts are in pixels of the input, which may be smaller than pixels of the maps
            ratios = [own / of_input for own, of_input in zip(size, input_size[-self.map_axes :], strict=True)]
            matrices[:, :-1, -1] *= torch.tensor(ratios[::-1], dtype=torch.float64)
        with torch.inference_mode(False):  # inference tensors cannot be used outside of that mode
            # Resampling maps positions in the output to positions in the input: the inverse of the transformation.
            resampling = Resampling(torch.linalg.inv(matrices) if forward else matrices, maps)
        if len(self) * size.numel() <= MAX_CACHED_PIXELS:
            self._cached_resamplings = dict([*self._cached_resamplings.items()][1 - MAX_CACHED :])
            self._cached_resamplings[key] = resampling
        return resampling

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached_resamplings": {}}

    def _select(self, columns: list[int]) -> AffineSet:
        labels = [self.labels[j] for j in columns]
        return AffineSet(self.matrices[columns], labels, self._selected_parameters(columns), self.square, self.fill)

    def _check_square(self, x: Tensor) -> None:
        if self.square and len({*(size := x.shape[-self.map_axes :])}) > 1:
            what = "square images" if self.map_axes == 2 else "cubes"
            raise ValueError(
                f"Expected {what}, which quarter turns map onto themselves, but got {tuple(size)}; `rotations(4)` turns"
                " images of any shape inside their frame."
            )


def turned_by(linear: Tensor, vectors: Tensor, axis: int, inverse: bool) -> Tensor:
    """Apply linear maps ``(m, d, d)``, or their inverses, to vectors along an axis of ``(batch, m, ...)``."""
    size = linear.shape[1]
    if vectors.shape[axis] != size:
        raise ValueError(
            f"Expected argument `vectors` to name axes of length {size}, whose entries turn with the input, but got one"
            f" of length {vectors.shape[axis]}."
        )
    chosen = (torch.linalg.inv(linear) if inverse else linear).to(vectors)
    return torch.einsum("jkl,bj...l->bj...k", chosen, vectors.movedim(axis, -1)).movedim(-1, axis)


def products_of(matrices: Tensor) -> Tensor:
    """The position of ``matrices[i] @ matrices[j]`` among ``(m, k, k)`` matrices, ``(m, m)``; −1 where it is none."""
    products = (matrices[:, None] @ matrices[None]).flatten(2)
    nearest = torch.cdist(products, matrices.flatten(1).expand(len(matrices), -1, -1), p=math.inf).min(2)
    return torch.where(nearest.values < 1e-6, nearest.indices, -1)


def _matrices(linear: Tensor, shift: Tensor) -> Tensor:
    matrices = torch.eye(3, dtype=torch.float64).repeat(len(linear), 1, 1)
    matrices[:, :2, :2] = linear
    matrices[:, :2, 2] = shift
    return matrices


def rotations(
    n: int | None = None, *, angles: Sequence[float] | None = None, fill: float | Sequence[float] = 0.0
) -> AffineSet:
    """Rotations about the centre of the image.

    Args:
        n: number of angles, evenly spaced over the full turn; the first, 0°, is the identity. The paper uses 16.
        angles: angles in degrees, counter-clockwise, as in torchvision's ``rotate``.
        fill: value of the corners, which come from outside the image: a number, or one for each channel. By default 0,
            which is black, as in the paper, unless images are normalised: black is then ``-mean / std``.

    Raises:
        ValueError: If not exactly one of ``n`` and ``angles`` is given, there is no angle, or one is not finite.

    Example:
        >>> rotations(4).labels
        ['0°', '90°', '180°', '270°']
    """
    if (n is None) == (angles is None):
        raise ValueError(f"Expected one of the arguments `n` and `angles`, but got n={n} and angles={angles}.")
    if isinstance(n, list | tuple):
        raise ValueError(f"Expected argument `n` to be a number of angles, but got {n}: write `rotations(angles={n})`.")
    if angles is None:
        n = check_int("n", n)
        angles = [360 * j / n for j in range(n)]
    if not all(map(math.isfinite, angles)):
        raise ValueError(f"Expected argument `angles` to hold finite numbers, but got {angles}.")
    linear = [[[c, s], [-s, c]] for c, s in map(cos_sin, angles)]
    shift = torch.zeros(len(angles), 2, dtype=torch.float64)
    matrices = _matrices(torch.tensor(linear, dtype=torch.float64).view(-1, 2, 2), shift)
    return AffineSet(matrices, [f"{angle:g}°" for angle in angles], {"angle": angles}, fill=fill)


def cos_sin(degrees: float) -> tuple[float, float]:
    """Cosine and sine that are whole numbers at quarter turns."""
    quarter = degrees / 90
    if quarter == round(quarter):
        return ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[round(quarter) % 4]
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def scales(factors: Sequence[float] = PAPER_FACTORS, *, fill: float | Sequence[float] = 0.0) -> AffineSet:
    """Isotropic scalings about the centre; the image keeps its size.

    Args:
        factors: the scale of the content; below 1 it shrinks and leaves a border. By default the paper's 11 factors
            from 0.5 to 1.25 (section 3.1.2).
        fill: value of the border, as for :func:`rotations`.

    Raises:
        ValueError: If there is no factor, or a factor is not above 0.

    Example:
        >>> scales(factors=[0.5, 1]).labels
        ['×0.5', '×1']
    """
    _check_sizes("factors", factors)
    size = torch.tensor(list(factors), dtype=torch.float64)
    matrices = _matrices(size[:, None, None] * torch.eye(2, dtype=torch.float64), torch.zeros(len(size), 2))
    return AffineSet(matrices, [f"×{factor:g}" for factor in factors], {"scale": factors}, fill=fill)


def translations(pixels: Sequence[float] = (1, 2, 4), *, fill: float | Sequence[float] = 0.0) -> AffineSet:
    """Translations in the eight directions of the compass, without the identity.

    Args:
        pixels: the distances d, in pixels of the network's input. For each d the shifts (x to the right, y down) are
            (−d,−d), (−d,d), (d,−d), (d,d), (0,d), (d,0), (0,−d), (−d,0). By default the paper's 24 (section 3.1.2).
        fill: value of the pixels that enter the frame, as for :func:`rotations`.

    Raises:
        ValueError: If there is no distance, or a distance is not above 0.

    Example:
        >>> len(translations()), translations(pixels=[2]).labels[:2]
        (24, ['(-2,-2)', '(-2,2)'])
    """
    _check_sizes("pixels", pixels)
    directions = ((-1, -1), (-1, 1), (1, -1), (1, 1), (0, 1), (1, 0), (0, -1), (-1, 0))
    shifts = [(d * x, d * y) for d in pixels for x, y in directions]
    linear = torch.eye(2, dtype=torch.float64).repeat(len(shifts), 1, 1)
    matrices = _matrices(linear, torch.tensor(shifts, dtype=torch.float64).view(-1, 2))
    xs, ys = [float(x) for x, _ in shifts], [float(y) for _, y in shifts]
    return AffineSet(matrices, [f"({x:g},{y:g})" for x, y in shifts], {"x": xs, "y": ys}, fill=fill)


def _checked_fill(fill: float | Sequence[float]) -> tuple[float, ...]:
    values = [*fill] if isinstance(fill, Iterable) else [fill]
    if not values or not all(isinstance(value, Real) and math.isfinite(value) for value in values):
        raise ValueError(f"Expected argument `fill` to hold finite numbers, but got {fill}.")
    return tuple(map(float, values))


def _check_sizes(argument: str, sizes: Sequence[float]) -> None:
    if isinstance(sizes, int | float):
        raise TypeError(f"Expected argument `{argument}` to be a list of numbers, but got {sizes!r}.")
    for size in sizes:
        if not size > 0:
            raise ValueError(f"Expected argument `{argument}` to hold numbers above 0, but got {size}.")


def _check_images(x: Tensor, axes: int) -> None:
    """Raise for points, signals, tokens, and images with the channels last."""
    if axes == 3:
        if x.ndim < 5:
            raise ValueError(
                f"Expected volumes (batch, channels, depth, height, width), but got {tuple(x.shape)}: give points as"
                " (batch, points, 3) with `volume_rotations(..., points=True)`."
            )
        return
    if x.ndim >= 4 and x.shape[-1] in (1, 3, 4) and min(x.shape[-3:-1]) > 4:
        hint = ", which looks like channels last: give `x.movedim(-1, -3)`"
    elif x.ndim < 4 or min(x.shape[-2:]) == 1 < max(x.shape[-2:]):
        hint = ": take `shifts`, `permutations` or `volume_rotations` for signals, tokens or points, or make a set with"
        hint += " `TransformationSet.from_callables`"
        hint += ", and give images without channels as `x.unsqueeze(1)`" if x.ndim == 3 else ""
    else:
        return
    raise ValueError(f"Expected images (batch, channels, height, width), but got {tuple(x.shape)}{hint}.")
