"""Resampling of images under affine maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad


class Resampling:
    """Resamples images under m affine maps: by moving pixels where a map is exact, and by interpolation otherwise.

    Args:
        sources: ``(m, 3, 3)``, from positions in the output to positions in the input, in pixels about the centre.
        like: images of the size, device and type of the images to resample.
    """

    def __init__(self, sources: Tensor, like: Tensor) -> None:
        (height, width), device = like.shape[-2:], like.device
        centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
        linear = sources[:, :2, :2]
        # In array indices: index_in = linear @ index_out + offset.
        offset = sources[:, :2, 2] + centre - linear @ centre
        exact = _is_whole(linear).flatten(1).all(1) & _is_whole(offset).all(1)
        self._exact, self._all_exact = exact.nonzero()[:, 0].to(device), bool(exact.all())

        index = _indices(linear[exact].round(), offset[exact].round(), height, width).long()
        inside = ((index >= 0) & (index < torch.tensor([width, height]))).all(-1)
        outside = height * width  # the index of one extra pixel that holds the fill
        self._moves = torch.where(inside, index[..., 1] * width + index[..., 0], outside).flatten(1).to(device)

        size = torch.tensor([width, height], dtype=torch.float64)
        grids = (2 * _indices(linear, offset, height, width) + 1) / size - 1
        self._grids = grids.to(device, torch.float64 if like.dtype == torch.float64 else torch.float32)

    def __call__(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """Resample images.

        Args:
            x: ``(batch, m, planes, height, width)``; map j is applied to ``x[:, j]``.
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
        """Bilinear interpolation, with the fill outside the image."""
        grid = self._grids.expand(len(x), -1, -1, -1, -1).flatten(0, 1)
        # grid_sample fills with zeros: subtract the fill before, and add it after.
        level = None if fill is None else fill.to(grid.dtype)[:, None, None]
        images = x.to(grid.dtype) if level is None else x.to(grid.dtype) - level
        moved = grid_sample(images.flatten(0, 1), grid, padding_mode="zeros", align_corners=False).view(x.shape)
        if level is not None:
            moved = moved + level
        return moved.to(x.dtype) if x.is_floating_point() else moved.round().to(x.dtype)


def _indices(linear: Tensor, offset: Tensor, height: int, width: int) -> Tensor:
    """The array index (x, y) that each output pixel reads, ``(m, height, width, 2)`` in float64."""
    xs = torch.arange(width, dtype=torch.float64)
    ys = torch.arange(height, dtype=torch.float64)
    along_x = xs[None, None, :, None] * linear[:, None, None, :, 0]
    along_y = ys[None, :, None, None] * linear[:, None, None, :, 1]
    return along_x + along_y + offset[:, None, None, :]


def _is_whole(values: Tensor) -> Tensor:
    return (values - values.round()).abs() < 1e-9
