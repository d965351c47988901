"""Same-equivariance (paper, section 2.6) on a whole ST tensor of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from lightning_invariance.functional.distance import Distance, sample_distance, transformation_distance
from lightning_invariance.functional.variance import normalize as quotient
from lightning_invariance.functional.variance import sample_variance, transformation_variance
from lightning_invariance.transforms import TransformationSet

#: A pixel is seen where at least this part of it comes from inside the frame.
SEEN = 1 - 1e-4


def mapped_back(
    st: Tensor,
    transformations: TransformationSet,
    normalize: bool = True,
    mask: bool | int = False,
    input_size: tuple[int, int] | None = None,
) -> Tensor:
    r"""The matrix ST' (paper, eq. 8): column j of feature maps mapped back by the inverse of transformation j.

    .. math:: \mathbf{ST}'[i, j] = t_j^{-1}(A(t_j(x_i)))

    Args:
        st: ST tensor of feature maps, ``(samples, transformations, channels, height, width)``.
        transformations: its columns, with inverses.
        normalize: divide every feature map by its norm; a map of zeros stays one.
        mask: set pixels to zero that some transformation moves out of the frame; a number larger than 1 also those
            that are fewer than so many pixels away from one. See :func:`seen`.
        input_size: of the network's input, where the maps are of another size.
    """
    back = transformations.inverse(st, input_size)
    if mask:
        back = back * seen(st, transformations, mask, input_size)
    if normalize:
        maps = back.flatten(3)
        norm = maps.norm(dim=3, keepdim=True)
        back = torch.where(norm > 0, maps / norm, 0.0).view(back.shape)
    return back


def seen(
    st: Tensor, transformations: TransformationSet, mask: bool | int = True, input_size: tuple[int, int] | None = None
) -> Tensor:
    """Which pixels of a feature map no transformation of the set moves out of the frame: 1 or 0, (height, width).

    Args:
        st: any tensor ``(..., height, width)``; its last two axes and type count.
        transformations: the set, with inverses.
        mask: a number larger than 1 also leaves out pixels fewer than so many pixels away.
        input_size: of the network's input, where the maps are of another size.
    """
    ones = torch.ones(1, 1, *st.shape[-2:], dtype=torch.float64, device=st.device)
    least = transformations.inverse(transformations(ones, input_size), input_size).amin(1)
    out = (least < SEEN).to(torch.float64)
    if int(mask) > 1:
        out = max_pool2d(out, 2 * int(mask) - 1, 1, int(mask) - 1)
    return (1 - out)[0, 0].to(st.dtype)


def variance_same_equivariance(
    st: Tensor,
    transformations: TransformationSet,
    normalize: bool = True,
    over: str = "channel",
    mask: bool | int = False,
    normalized_by: str | None = None,
    input_size: tuple[int, int] | None = None,
) -> Tensor:
    """Variance-based same-equivariance (paper, section 2.6): the transformation variance of ST'.

    Args:
        st: ST tensor of feature maps, ``(samples, transformations, channels, height, width)``.
        transformations: its columns, with inverses.
        normalize: see :func:`mapped_back`.
        over: ``"activation"``: every pixel. ``"channel"``: the sum over a feature map.
        mask: see :func:`mapped_back`.
        normalized_by: ``"samples"`` divides by the sample variance of ST'.
        input_size: see :func:`mapped_back`.

    Returns:
        Tensor of ``(channels, height, width)`` or ``(channels,)``; 0 is same-equivariant.
    """
    back = mapped_back(st, transformations, normalize, mask, input_size)
    parts = [transformation_variance(back), sample_variance(back)]
    if over == "channel":
        parts = [part.flatten(1).sum(1) for part in parts]
    value = parts[0] if normalized_by is None else quotient(*parts)
    return _undefined_where_zero(value, st, transformations, normalize, over, mask, input_size)


def distance_same_equivariance(
    st: Tensor,
    transformations: TransformationSet,
    distance: Distance = "euclidean",
    normalize: bool = True,
    over: str = "channel",
    mask: bool | int = False,
    normalized_by: str | None = None,
    input_size: tuple[int, int] | None = None,
) -> Tensor:
    """Distance-based same-equivariance (paper, eq. 8): the transformation distance of ST'.

    Args:
        st: ST tensor of feature maps, ``(samples, transformations, channels, height, width)``.
        transformations: its columns, with inverses.
        distance: see :func:`~lightning_invariance.functional.distance.distance_between`.
        normalize: see :func:`mapped_back`.
        over: ``"activation"``: every pixel. ``"channel"``: a feature map is one vector.
        mask: see :func:`mapped_back`.
        normalized_by: ``"samples"`` divides by the sample distance of ST'.
        input_size: see :func:`mapped_back`.

    Returns:
        Tensor of ``(channels, height, width)`` or ``(channels,)``; 0 is same-equivariant.
    """
    back = mapped_back(st, transformations, normalize, mask, input_size)
    value = transformation_distance(back, distance, over)
    if normalized_by is not None:
        value = quotient(value, sample_distance(back, distance, over))
    return _undefined_where_zero(value, st, transformations, normalize, over, mask, input_size)


def _undefined_where_zero(
    value: Tensor,
    st: Tensor,
    transformations: TransformationSet,
    normalize: bool,
    over: str,
    mask: bool | int,
    input_size: tuple[int, int] | None,
) -> Tensor:
    """NaN for channels that are zero everywhere, whose unit vectors are 0/0, and for pixels outside the mask."""
    back = mapped_back(st, transformations, False, mask, input_size)
    channels = (
        (back == 0).transpose(0, 2).flatten(1).all(1) if normalize else torch.zeros(st.shape[2], dtype=torch.bool)
    )
    if over == "channel":
        return torch.where(channels, torch.nan, value)
    outside = seen(st, transformations, mask, input_size) == 0 if mask else torch.zeros(st.shape[-2:], dtype=torch.bool)
    return torch.where(channels[:, None, None] | outside, torch.nan, value)
