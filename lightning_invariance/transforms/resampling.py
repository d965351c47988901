"""Resampling of images and volumes under affine maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad


class Resampling:
    """Resamples images under m affine maps: by moving pixels where a map is exact, and by interpolation otherwise.

    Args:
        sources: ``(m, d + 1, d + 1)``, from positions in the output to positions in the input, in pixels about the
            centre; d is 2 for images ``(..., height, width)`` and 3 for volumes ``(..., depth, height, width)``.
        like: images of the size, device and type of the images to resample.
    """

    def __init__(self, sources: Tensor, like: Tensor) -> None:
        self._axes, device = sources.shape[1] - 1, like.device
        size = torch.tensor(like.shape[-self._axes :][::-1], dtype=torch.float64)  # along x, y and z
        centre = (size - 1) / 2
        linear = sources[:, :-1, :-1]
        # In array indices: index_in = linear @ index_out + offset.
        offset = sources[:, :-1, -1] + centre - linear @ centre
        exact = _is_whole(linear).flatten(1).all(1) & _is_whole(offset).all(1)
        self._exact, self._all_exact = exact.nonzero()[:, 0].to(device), bool(exact.all())

        index = _indices(linear[exact].round(), offset[exact].round(), size)
        inside = ((index >= 0) & (index < size)).all(-1)
        strides = torch.cat([size.new_ones(1), size.cumprod(0)])
        outside = strides[-1]  # the index of one extra pixel that holds the fill
        self._moves = torch.where(inside, index @ strides[:-1], outside).long().flatten(1).to(device)

        grids = (2 * _indices(linear, offset, size) + 1) / size - 1
        self._grids = grids.to(device, torch.float64 if like.dtype == torch.float64 else torch.float32)

    def __call__(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """Resample images.

        Args:
            x: ``(batch, m, planes, *positions)``; map j is applied to ``x[:, j]``.
            fill: value outside the images, ``(planes,)``; None for zeros.
        """
        if self._all_exact:
            return self._move(x, fill)
        moved = self._interpolate(x, fill)
        if len(self._exact):
            moved[:, self._exact] = self._move(x[:, self._exact], fill)
        return moved

    def _move(self, x: Tensor, fill: Tensor | None) -> Tensor:
        padded = pad(x.flatten(3), (0, 1))
        if fill is not None:
            padded[..., -1] = fill.to(x.dtype)
        return padded.gather(3, self._moves[:, None].expand(*x.shape[:3], -1)).view(x.shape)

    def _interpolate(self, x: Tensor, fill: Tensor | None) -> Tensor:
        """Linear interpolation along every axis, with the fill outside the image."""
        grid = self._grids.expand(len(x), *self._grids.shape).flatten(0, 1)
        # grid_sample fills with zeros: subtract the fill before, and add it after.
        level = None if fill is None else fill.to(grid.dtype).view(-1, *[1] * self._axes)
        images = x.to(grid.dtype) if level is None else x.to(grid.dtype) - level
        moved = grid_sample(images.flatten(0, 1), grid, padding_mode="zeros", align_corners=False).view(x.shape)
        if level is not None:
            moved = moved + level
        return moved.to(x.dtype) if x.is_floating_point() else moved.round().to(x.dtype)


def _indices(linear: Tensor, offset: Tensor, size: Tensor) -> Tensor:
    """The array index (x, y, ...) that each output pixel reads, ``(m, *positions, d)`` in float64."""
    ranges = [torch.arange(int(length), dtype=torch.float64) for length in size.flip(0)]
    own = torch.stack(torch.meshgrid(*ranges, indexing="ij")[::-1], -1)
    each = (slice(None), *[None] * len(size))
    return (own[None, ..., None, :] * linear[each]).sum(-1) + offset[each]


def _is_whole(values: Tensor) -> Tensor:
    return (values - values.round()).abs() < 1e-9
