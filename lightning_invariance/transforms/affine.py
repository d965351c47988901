"""Affine transformations of images: rotations, scales, translations and their products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import product
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.messages import level_of_user
from lightning_invariance.transforms.base import TransformationSet, combined_parameters
from lightning_invariance.transforms.resampling import Resampling

#: The factors of the paper's scale set (section 3.1.2).
PAPER_FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25)

#: A set remembers where pixels come from for so many sizes of images: a network has few.
KNOWN_SIZES = 16

#: Sets of more transformations × pixels than this remember nothing: it would take much memory and save little time.
LARGEST_KNOWN = 2**20


class AffineSet(TransformationSet):
    """Affine maps of images about their centre, applied with one bilinear resampling.

    A map that sends every pixel centre to a pixel centre (a quarter turn of a square, a flip, a shift by whole pixels)
    moves pixels without touching their values; all others are interpolated. Inputs are ``(batch, channels, height,
    width)``, or anything with ``(height, width)`` last. Whole-number inputs are rounded back to their type.

    Args:
        matrices: ``(m, 3, 3)``, homogeneous maps of positions in pixels: origin in the image's centre, x to the
            right, y down. They say where content goes: ``p_after = matrix @ p_before``.
        labels: a short text for each map.
        parameters: numbers for the axes of plots.
        square: whether the maps need a square image (quarter turns that must not lose pixels).
        fill: what pixels are that come from outside of an image, one number or one for each channel. Feature maps
            are filled with zeros where same-equivariances map them back or transform them.
    """

    def __init__(
        self,
        matrices: Tensor,
        labels: Sequence[str],
        parameters: Mapping[str, Sequence[float]] | None = None,
        square: bool = False,
        fill: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__(labels, parameters)
        if matrices.shape != (len(self), 3, 3):
            raise ValueError(f"Expected matrices of shape ({len(self)}, 3, 3), but got {tuple(matrices.shape)}.")
        self.matrices = matrices.to(torch.float64)
        self.square = square
        self.fill = _checked_fill(fill)
        same = (self.matrices == torch.eye(3, dtype=torch.float64)).flatten(1).all(1).nonzero()
        self.identity = int(same[0]) if len(same) else None
        self._known_resamplings: dict[Hashable, Resampling] = {}

    @property
    def signature(self) -> tuple[Hashable, ...]:
        """The labels, the maps and what is outside of images."""
        return (*self.labels, self.square, self.fill, *self.matrices.flatten().tolist())

    def _apply(self, x: Tensor, input_size: tuple[int, int] | None) -> Tensor:
        if x.ndim < 3:
            raise ValueError(f"Expected a batch of images (batch, channels, height, width), but got {tuple(x.shape)}.")
        _warn_of_no_images(x, input_size)
        self._check_square(x)
        # Every column reads the same images: they are not copied.
        columns = x.reshape(1, 1, -1, *x.shape[-2:]).expand(-1, len(self), -1, -1, -1)
        # Resampling asks where the content of each pixel comes from: the inverse of where content goes.
        fill = self._fill_of_planes(x) if input_size is None else None
        moved = self._resampling(x, input_size, forward=True)(columns, fill)
        return moved.view(len(self), *x.shape).transpose(0, 1).contiguous()

    def _invert(self, st: Tensor, input_size: tuple[int, int] | None) -> Tensor:
        if st.ndim < 4:
            raise ValueError(f"Expected feature maps (batch, {len(self)}, ..., height, width), got {tuple(st.shape)}.")
        self._check_square(st)
        columns = st.reshape(len(st), len(self), -1, *st.shape[-2:])
        return self._resampling(st, input_size, forward=False)(columns).view(st.shape)

    def _fill_of_planes(self, x: Tensor) -> Tensor | None:
        """What is outside of each plane ``(height, width)`` of images; None for zeros."""
        if not any(self.fill):
            return None
        channels = x.shape[-3]
        if len(self.fill) not in (1, channels):
            raise ValueError(
                f"Expected argument `fill` to be one number, or one for each of {channels} channels of images"
                f" {tuple(x.shape)}, but got {len(self.fill)} numbers."
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        fill = torch.tensor(self.fill, dtype=dtype, device=x.device)
        return fill.expand(x.shape[:-2].numel() // max(1, channels), channels).flatten()

    def _resampling(self, maps: Tensor, input_size: tuple[int, int] | None, forward: bool) -> Resampling:
        """Where each output pixel reads the input, computed once for each size of maps."""
        key = (tuple(maps.shape[-2:]), input_size, forward, maps.device, maps.dtype == torch.float64)
        if key in self._known_resamplings:
            return self._known_resamplings[key]
        matrices = self._scaled(maps, input_size)
        with torch.inference_mode(False):  # an inference tensor could be used in that mode only
            found = Resampling(torch.linalg.inv(matrices) if forward else matrices, maps)
        if len(self) * maps.shape[-1] * maps.shape[-2] <= LARGEST_KNOWN:
            self._known_resamplings = dict([*self._known_resamplings.items()][1 - KNOWN_SIZES :])
            self._known_resamplings[key] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known_resamplings": {}}

    def _scaled(self, maps: Tensor, input_size: tuple[int, int] | None) -> Tensor:
        """The matrices in pixels of the maps, whose pixels may be larger than those of the input."""
        if input_size is None:
            return self.matrices
        ratio = torch.tensor([maps.shape[-1] / input_size[1], maps.shape[-2] / input_size[0]], dtype=torch.float64)
        matrices = self.matrices.clone()
        matrices[:, :2, 2] *= ratio
        return matrices

    def _select(self, columns: list[int]) -> AffineSet:
        labels = [self.labels[j] for j in columns]
        return AffineSet(self.matrices[columns], labels, self._selected_parameters(columns), self.square, self.fill)

    def _check_square(self, x: Tensor) -> None:
        if self.square and x.shape[-1] != x.shape[-2]:
            raise ValueError(
                f"Expected square images, which quarter turns map onto themselves, but got {tuple(x.shape[-2:])};"
                " `rotations(4)` turns images of any shape inside their frame."
            )


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
        angles: the angles themselves, in degrees, counter-clockwise, as in torchvision's ``rotate``.
        fill: what the corners are that come from outside of the image: a number, or one for each channel. Black images
            have zeros there, as in the paper, unless they were normalised: then black is ``-mean / std``.

    Raises:
        ValueError: If not exactly one of ``n`` and ``angles`` is given, there is no angle, or one is not finite.

    Example:
        >>> rotations(4).labels
        ['0°', '90°', '180°', '270°']
    """
    if (n is None) == (angles is None):
        raise ValueError(f"Expected one of the arguments `n` and `angles`, but got n={n} and angles={angles}.")
    if angles is None:
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"Expected argument `n` to be an int larger than 0, but got {n!r}.")
        angles = [360 * j / n for j in range(n)]
    if not all(map(math.isfinite, angles)):
        raise ValueError(f"Expected argument `angles` to hold finite numbers, but got {angles}.")
    linear = [[[c, s], [-s, c]] for c, s in map(_cos_sin, angles)]
    shift = torch.zeros(len(angles), 2, dtype=torch.float64)
    matrices = _matrices(torch.tensor(linear, dtype=torch.float64).view(-1, 2, 2), shift)
    return AffineSet(matrices, [f"{angle:g}°" for angle in angles], {"angle": angles}, fill=fill)


def _cos_sin(degrees: float) -> tuple[float, float]:
    """Cosine and sine that are whole numbers at quarter turns."""
    quarter = degrees / 90
    if quarter == round(quarter):
        return ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[round(quarter) % 4]
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def scales(factors: Sequence[float] = PAPER_FACTORS, *, fill: float | Sequence[float] = 0.0) -> AffineSet:
    """Scalings about the centre, the same in both directions; the image keeps its size.

    Args:
        factors: how much larger the content becomes; below 1 it shrinks and leaves a border. By default the paper's 11
            factors from 0.5 to 1.25 (section 3.1.2).
        fill: what the border is, as for :func:`rotations`.

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
        fill: what is shifted in, as for :func:`rotations`.

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
    """The numbers of ``fill``.

    Raises:
        ValueError: If one is no finite number, or there is none.
    """
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


def combine_affine(sets: Sequence[AffineSet]) -> AffineSet:
    """All products of the members of affine sets: one map, and so one resampling, each."""
    fills = {s.fill for s in sets if any(s.fill)}
    if len(fills) > 1:
        raise ValueError(f"Expected sets with one `fill`, since images are resampled once, but got {sorted(fills)}.")
    columns = list(product(*(range(len(s)) for s in sets)))
    matrices = torch.eye(3, dtype=torch.float64).repeat(len(columns), 1, 1)
    for position, transformations in enumerate(sets):
        matrices = transformations.matrices[[column[position] for column in columns]] @ matrices
    return AffineSet(
        matrices,
        [" ".join(s.labels[j] for s, j in zip(sets, column, strict=True)) for column in columns],
        combined_parameters(sets, columns),
        square=any(s.square for s in sets),
        fill=fills.pop() if fills else 0.0,
    )


def _warn_of_no_images(x: Tensor, input_size: tuple[int, int] | None) -> None:
    """Warn where inputs look like ``(batch, height, width, channels)`` or signals; feature maps of some input may."""
    if input_size is not None:
        return
    told = ""
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4) and min(x.shape[1:3]) > 4:
        told = "channels last: give `x.permute(0, 3, 1, 2)`"
    elif min(x.shape[-2:]) == 1 < max(x.shape[-2:]):
        told = "signals along one axis: make a set for these with `TransformationSet.from_callables`"
    if told:
        warnings.warn(
            f"Expected images (batch, channels, height, width), but got {tuple(x.shape)}, which looks like {told}.",
            UserWarning,
            stacklevel=level_of_user(),
        )
