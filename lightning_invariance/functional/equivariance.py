"""Same-equivariance (paper, section 2.6) of a whole ST tensor of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_invariance.functional.distance import (
    Distance,
    distance_between,
    sample_distance,
    transformation_distance,
)
from lightning_invariance.functional.variance import quotient, sample_variance, transformation_variance
from lightning_invariance.transforms import TransformationSet


def mapped_back(
    st: Tensor,
    transformations: TransformationSet,
    normalize: bool = True,
    mask: bool | int = False,
    input_size: tuple[int, ...] | None = None,
) -> Tensor:
    r"""The matrix ST' (paper, eq. 8): the inverse of transformation j applied to column j of feature maps.

    .. math:: \mathbf{ST}'[i, j] = t_j^{-1}(A(t_j(x_i)))

    Args:
        st: ST tensor of feature maps, ``(samples, transformations, channels, height, width)``.
        transformations: its columns, with inverses.
        normalize: divide every feature map by its euclidean norm.
        mask: set pixels to zero that a transformation moves out of the frame; a number larger than 1 also sets pixels
            closer than this to such a pixel to zero.
        input_size: height and width of the network's input, where the maps have another size.
    """
    columns = [transformations[j].inverse(st[:, j], input_size) for j in range(len(transformations))]
    back = torch.stack(columns, dim=1)
    back = torch.where(inside_mask(st, transformations, mask, input_size), back, 0.0)
    return unit_vectors(back) if normalize else back


def unit_vectors(st: Tensor) -> Tensor:
    """Divide every feature map by its euclidean norm; a map of zeros remains zero."""
    norm = st.square().sum((-2, -1), keepdim=True).sqrt()
    return torch.where(norm == 0, st, st / norm)


def inside_mask(
    st: Tensor, transformations: TransformationSet, mask: bool | int, input_size: tuple[int, ...] | None
) -> Tensor:
    """Which pixels of a feature map no transformation moves out of the frame: bool (height, width).

    They stay white in a white image after each transformation and its inverse. ``mask`` > 1 also excludes pixels at
    most ``mask − 1`` pixels from an excluded one, in each direction. Without ``mask`` all pixels are inside.
    """
    if not mask:
        return torch.ones(st.shape[-2:], dtype=torch.bool, device=st.device)
    white = torch.ones(1, 1, *st.shape[-2:], dtype=torch.float64)
    outside = torch.zeros(st.shape[-2:], dtype=torch.bool)
    for j in range(len(transformations)):
        moved = transformations.of_maps(white, input_size)[:, j]
        outside |= transformations[j].inverse(moved, input_size)[0, 0] < 1 - 1e-4
    return ~_near(outside, int(mask) - 1).to(st.device)


def _near(outside: Tensor, reach: int) -> Tensor:
    """Which pixels have an outside pixel within ``reach`` pixels in each direction."""
    near = torch.zeros_like(outside)
    for y in range(outside.shape[0]):
        for x in range(outside.shape[1]):
            near[y, x] = outside[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].any()
    return near


def variance_same_equivariance(
    st: Tensor,
    transformations: TransformationSet,
    normalize: bool = True,
    over: str = "channel",
    mask: bool | int = False,
    normalized_by: str | None = None,
    input_size: tuple[int, ...] | None = None,
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
    inside = inside_mask(st, transformations, mask, input_size)
    return _nan_where_undefined(value, back, inside, normalize, over)


def distance_same_equivariance(
    st: Tensor,
    transformations: TransformationSet,
    distance: Distance = "euclidean",
    normalize: bool = True,
    over: str = "channel",
    mask: bool | int = False,
    normalized_by: str | None = None,
    input_size: tuple[int, ...] | None = None,
    formulation: str = "pairs",
) -> Tensor:
    """Distance-based same-equivariance (paper, eq. 8): the transformation distance of ST'.

    Args: see :func:`variance_same_equivariance`, and

        distance: see :func:`~lightning_invariance.functional.distance.distance_between`.
        formulation: ``"direct"``: the paper's first formulation, the mean distance of A(t(x)) and t(A(x)).
    """
    if formulation == "direct":
        value = _direct(st, transformations, distance, normalize, over, mask, input_size)
        zero = (st == 0).transpose(0, 2).flatten(1).all(1) & normalize
        return torch.where(zero.view(-1, *[1] * (value.ndim - 1)), torch.nan, value)
    back = mapped_back(st, transformations, normalize, mask, input_size)
    value = transformation_distance(back, distance, over)
    if normalized_by is not None:
        value = quotient(value, sample_distance(back, distance, over))
    inside = inside_mask(st, transformations, mask, input_size)
    return _nan_where_undefined(value, back, inside, normalize, over)


def _direct(
    st: Tensor,
    transformations: TransformationSet,
    distance: Distance,
    normalize: bool,
    over: str,
    mask: bool | int,
    input_size: tuple[int, ...] | None,
) -> Tensor:
    """The mean distance of A(t(x)) and t(A(x)) over samples and transformations; A(x) is the identity's column."""
    if transformations.identity is None:
        raise ValueError(f"Expected transformations that know their identity, but got {transformations!r}.")
    total, columns = torch.zeros(()), torch.zeros(())
    for j in range(len(transformations)):
        actual = st[:, j]
        expected = transformations.of_maps(st[:, transformations.identity], input_size)[:, j]
        if mask:
            white = torch.ones(1, 1, *st.shape[-2:], dtype=torch.float64)
            outside = transformations.of_maps(white, input_size)[0, j, 0] < 1 - 1e-4
            inside = ~_near(outside, int(mask) - 1).to(st.device)
            actual, expected = torch.where(inside, actual, 0.0), torch.where(inside, expected, 0.0)
            columns = columns + inside.to(st.dtype)
        if normalize:
            actual, expected = unit_vectors(actual), unit_vectors(expected)
        total = total + distance_between(actual.flatten(2), expected.flatten(2), distance, over).mean(0)
    total = torch.where(total.isinf(), torch.nan, total)
    if over == "channel":
        return total / len(transformations)
    # Each pixel is averaged over the transformations that leave it unmasked.
    return total.view(st.shape[2:]) / (columns if mask else len(transformations))


def _nan_where_undefined(value: Tensor, back: Tensor, inside: Tensor, normalize: bool, over: str) -> Tensor:
    """Replace values of channels that are always zero (0/0 as unit vectors) and of masked pixels by NaN."""
    zero = (back == 0).transpose(0, 2).flatten(1).all(1) & normalize
    if over == "channel":
        return torch.where(zero, torch.nan, value)
    return torch.where(zero[:, None, None] | ~inside, torch.nan, value)
