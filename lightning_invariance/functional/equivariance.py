"""Same-equivariance (paper, section 2.6) on a whole ST tensor of feature maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from lightning_invariance.functional.distance import (
    Distance,
    distance_between,
    sample_distance,
    transformation_distance,
)
from lightning_invariance.functional.variance import normalize as quotient
from lightning_invariance.functional.variance import sample_variance, transformation_variance
from lightning_invariance.transforms import TransformationSet

#: A pixel is seen where at least this part of it comes from inside the frame.
SEEN = 1 - 1e-4


def mapped_back(
    st: Tensor,
    transformations: TransformationSet,
    normalize: bool = True,
    mask: bool | int | Tensor = False,
    input_size: tuple[int, int] | None = None,
) -> Tensor:
    r"""The matrix ST' (paper, eq. 8): column j of feature maps mapped back by the inverse of transformation j.

    .. math:: \mathbf{ST}'[i, j] = t_j^{-1}(A(t_j(x_i)))

    Args:
        st: ST tensor of feature maps, ``(samples, transformations, channels, height, width)``.
        transformations: its columns, with inverses.
        normalize: divide every feature map by its norm; a map of zeros stays one.
        mask: set pixels to zero that some transformation moves out of the frame; a number larger than 1 also those
            that are fewer than so many pixels away from one. See :func:`seen`, whose result can be given as well.
        input_size: of the network's input, where the maps are of another size.
    """
    back = transformations.inverse(st, input_size)
    if isinstance(mask, Tensor):
        back = back * mask
    elif mask:
        back = back * seen(st, transformations, mask, input_size)
    return unit_maps(back)[0] if normalize else back


def unit_maps(st: Tensor) -> tuple[Tensor, Tensor]:
    """Feature maps divided by their norms, and which are zero everywhere, (samples, transformations, channels).

    A map of zeros stays one; so does a map so small that its norm is 0.
    """
    maps = st.flatten(3)
    norm = maps.norm(dim=3)
    zero = norm == 0
    unit = maps / (norm + zero)[..., None]  # NaN stays NaN
    if not st.is_cpu:  # to look whether there are any would be to wait
        zero = zero & ~maps.any(3)
    elif bool(zero.any()):
        zero = zero.masked_scatter(zero, (maps[zero] == 0).all(1))
    return unit.view(st.shape), zero


def direct_distances(
    st: Tensor,
    transformations: TransformationSet,
    distance: Distance,
    normalize: bool,
    over: str,
    mask: bool | int,
    input_size: tuple[int, int] | None = None,
) -> Tensor:
    """The distance of A(t(x)) and t(A(x)) for every sample and transformation, (samples, transformations, ...).

    A(x) is the column of the identity, which the set must hold; see :func:`distance_same_equivariance` for the rest.

    Raises:
        ValueError: If no transformation of the set is the identity.
    """
    probe = torch.rand(1, *st.shape[2:], generator=torch.Generator().manual_seed(0)).to(st.device)
    same = [j for j, moved in enumerate(transformations(probe, input_size)[0]) if torch.equal(moved, probe[0])]
    if not same:
        raise ValueError(f'Expected the identity among the transformations for "direct", but got {transformations!r}.')
    expected, found = transformations(st[:, same[0]], input_size), st
    if mask:
        ones = torch.ones(1, 1, *st.shape[-2:], dtype=torch.float64, device=st.device)
        inside = _widened(transformations(ones, input_size)[0] < SEEN, mask)
        expected, found = expected * inside, found * inside
    if normalize:
        expected, found = unit_maps(expected)[0], unit_maps(found)[0]
    distances = distance_between(found.flatten(3), expected.flatten(3), distance, over)
    return distances if over == "channel" else distances.view(st.shape)


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
    return _widened(least < SEEN, mask)[0, 0].to(st.dtype)


def _widened(out: Tensor, mask: bool | int) -> Tensor:
    """1 where nothing is out of the frame, nor fewer than ``mask`` pixels away: (..., channels, height, width)."""
    far = out.to(torch.float64)
    if int(mask) > 1:
        far = max_pool2d(far, 2 * int(mask) - 1, 1, int(mask) - 1)
    return 1 - far


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
    formulation: str = "pairs",
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
        formulation: ``"direct"`` for the mean distance of A(t(x)) and t(A(x)), the paper's first formulation.

    Returns:
        Tensor of ``(channels, height, width)`` or ``(channels,)``; 0 is same-equivariant.
    """
    if formulation == "direct":
        value = direct_distances(st, transformations, distance, normalize, over, mask, input_size).mean((0, 1))
        zero = (st == 0).transpose(0, 2).flatten(1).all(1) & torch.tensor(normalize)
        return torch.where(zero.view(-1, *[1] * (value.ndim - 1)), torch.nan, value)
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
