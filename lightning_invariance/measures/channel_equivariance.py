"""Equivariance beyond "the same": channels that transformations permute or mix (paper, sections 2.6 and 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lightning_invariance.accumulators import MappedBack
from lightning_invariance.accumulators.channel_moments import ChannelMoments, Moments
from lightning_invariance.accumulators.mapped_back import BackMapping, check_inverses, identity_of
from lightning_invariance.accumulators.rows import Context
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.base import Measure
from lightning_invariance.messages import check_int
from lightning_invariance.transforms import TransformationSet

CHANNELS = ("identity", "permutation", "linear")

#: States that :meth:`ChannelEquivariance.completed` adds: squared deviations from the mean images, squared residuals,
#: and the channels that explain.
TOTALS, RESIDUALS, SOURCES = "totals", "residuals", "sources"


class ChannelEquivariance(Measure):
    r"""Channel equivariance: how well does f(x) explain f(t x), with its channels permuted or mixed?

    Feature maps of the transformed input are mapped back in space, :math:`b_j = t_j^{-1} f(t_j x)`, and compared with
    the maps of the input itself, :math:`a = f(x)`, after a map :math:`P_j` from channels to channels. For channel c and
    transformation j, with sums over samples and over the pixels inside the mask,

    .. math:: R^2_{jc} = 1 - \frac{\sum (b_{jc} - (P_j a)_c)^2}{\sum (b_{jc} - \bar b_{jc})^2}

    where :math:`\bar b_{jc}` is the mean image of the channel. The value of a channel is the mean over the
    transformations other than the identity. It is in ``(-inf, 1]`` and has no unit. Higher is more equivariant; 1 is
    equivariant; at 0, f(x) explains no more than the mean image does. An unrelated sample in the place of x explains
    about -1: ``result.details["ChannelEquivariance"][layer]["shuffled"]`` is that control.

    :math:`P_j` is found on one half of the samples and scored on the other, and the reverse:

    - ``"identity"``: channels stay where they are, as for :class:`VarianceSameEquivariance`.
    - ``"permutation"``: the one-to-one assignment of channels with the largest sum of :math:`R^2`.
      ``result.channel_maps`` has the assignments, ``result.orbits`` the groups of channels that they permute.
    - ``"linear"``: ridge regression with an intercept. High values are no evidence of a learned symmetry by themselves:
      a wide layer with random weights explains its rotations linearly. Compare with the untrained network, and with
      ``"permutation"``.

    Layers without positions, such as ``(channels,)`` after pooling, are measured as they are. The value is
    ``(channels,)``, NaN for channels that do not vary over samples and where the mask leaves no pixel; for
    ``"permutation"`` and ``"linear"`` also for all channels where one is NaN; and, with a warning, for fewer than four
    samples (two for ``"identity"``). A layer keeps 2 m channels² numbers in float64 (none for ``"identity"``) and m
    numbers for each activation.

    Args:
        transformations: the columns, with inverses and the identity; an evaluation provides its own.
        channels: ``"identity"``, ``"permutation"`` or ``"linear"``.
        mask: exclude pixels that a transformation moves out of the frame; see :class:`VarianceSameEquivariance`.
        max_channels: layers with more channels are left out, for ``"permutation"`` and ``"linear"``.
        ridge: penalty of ``"linear"``, as a fraction of the mean variance of the channels.
        input_size: height and width of the network's input, where the maps have another size.

    Raises:
        ValueError: If an argument is out of its range, or the transformations have no inverses or no identity.

    Example:
        >>> import torch
        >>> from lightning_invariance import flips
        >>> from lightning_invariance.measures import ChannelEquivariance
        >>> t = flips()
        >>> x = torch.rand(8, 1, 6, 6)
        >>> measure = ChannelEquivariance(t)
        >>> measure.update(torch.cat([t(x), t(x.flip(-1)).flip(1)], 2))
        >>> measure.compute().shape
        torch.Size([2])
    """

    any_channel_axis = True
    higher_is_better = True
    has_floor = True

    def __init__(
        self,
        transformations: TransformationSet | None = None,
        channels: str = "permutation",
        mask: bool | int = True,
        max_channels: int = 512,
        ridge: float = 1e-3,
        input_size: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        if channels not in CHANNELS:
            raise ValueError(f"Expected argument `channels` to be one of {CHANNELS}, but got {channels!r}.")
        if not isinstance(ridge, int | float) or not 0 < ridge < math.inf:
            raise ValueError(f"Expected argument `ridge` to be above 0, but got {ridge}.")
        check_int("mask", mask, 0)
        check_int("max_channels", max_channels)
        if transformations is not None:
            check_inverses(transformations)
        of_identity = 0 if transformations is None else identity_of(transformations)
        mapping = BackMapping(transformations, False, int(mask), input_size, flat=True)
        super().__init__([MappedBack((ChannelMoments(channels != "identity", of_identity),), mapping)], **kwargs)
        self.channels, self.mask, self.max_channels, self.ridge = channels, mask, max_channels, ridge
        self.least_samples = 2 if channels == "identity" else 4

    @property
    def has_intervals(self) -> bool:  # type: ignore[override]
        """Whether :math:`P_j` does not change with the weight of a sample."""
        return self.channels != "linear"

    def prepare_for(self, context: Context) -> None:
        """Also raises where the transformations have no identity."""
        identity_of(self._mapped.mapping.transformations or context.transformations)
        super().prepare_for(context)

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """``(channels,)``."""
        return (sums.n_channels,)

    def why_not(self, activation_shape: tuple[int, ...], channel_axis: int) -> str:
        """Too many channels."""
        count = activation_shape[channel_axis] if activation_shape else 1
        if self.channels == "identity" or count <= self.max_channels:
            return super().why_not(activation_shape, channel_axis)
        return f"{count:,} channels are more than `max_channels={self.max_channels}`"

    def value(self, sums: Sums) -> Tensor:
        """The mean of R² over the transformations other than the identity, ``(channels,)``."""
        scores = self.scores(sums)
        return scores[[j for j in range(len(scores)) if j != self._reference]].nanmean(0)

    def scores(self, sums: Sums) -> Tensor:
        """R² for each transformation and channel, ``(m, channels)``."""
        sums = self.completed(sums)
        varies = sums[TOTALS] > 0
        return torch.where(varies, 1 - sums[RESIDUALS] / torch.where(varies, sums[TOTALS], 1.0), torch.nan)

    def response_of(self, sums: Sums) -> Tensor | None:
        """What each transformation leaves unexplained, ``(m,)``: the mean of 1 − R² over channels, 0 for the identity.

        None for fewer than :attr:`least_samples` samples.
        """
        return 1 - self.scores(sums).nanmean(1) if sums.n_samples >= self.least_samples else None

    def details(self, sums: Sums) -> dict[str, Tensor]:
        """``scores`` ``(m, channels)``; the control ``shuffled`` ``()``; and for ``"permutation"`` what it found.

        ``channel_map`` ``(m, channels)``: where each channel goes under each transformation, from all samples.
        ``closure`` ``()``: for which share of channels and pairs of transformations the map of their product is the
        product of their maps; NaN where the set does not know its products.
        """
        if sums.n_samples < self.least_samples:
            return {}
        sums = self.completed(sums)
        found = {"scores": self.scores(sums)}
        if self.channels == "permutation":
            found["channel_map"] = goes = sums[SOURCES][2].argsort(1).cpu()
            found["closure"] = closure(goes, self._transformations.products(), self._reference)
        if self.channels != "linear":
            found["shuffled"] = shuffled(sums, self._reference)
        return found

    def completed(self, sums: Sums) -> Sums:
        """The sums with totals, with residuals of both folds, and with assignments, which no single sample changes."""
        if RESIDUALS in sums:
            return sums
        folds = ChannelMoments.moments(sums.states, 0), ChannelMoments.moments(sums.states, 1)
        totals, reference = totals_of(folds, sums["images"], sums.n_samples), self._reference
        if self.channels != "identity" and min(int(fold.number) for fold in folds) <= sums["images"].shape[2]:
            totals = torch.zeros_like(totals)  # less than two samples in one half, as of a layer that few samples reach
        found = {TOTALS: totals}
        if self.channels == "linear":
            of_folds = [of_regression(*pair, self.ridge, reference) for pair in (folds, folds[::-1])]
            found[RESIDUALS] = of_folds[0] + of_folds[1]
        elif self.channels == "permutation":
            found[RESIDUALS], found[SOURCES] = of_assignments(folds, totals, reference)
        else:
            found[RESIDUALS] = sum((squared_residuals(fold, reference)[..., 0] for fold in folds), torch.zeros(()))
            found[SOURCES] = torch.arange(sums.n_channels, device=totals.device).expand(3, *totals.shape)
        found[RESIDUALS][reference] = 0  # f(x) explains itself
        return replace(sums, states={**sums.states, **found})

    @property
    def _mapped(self) -> MappedBack:
        found = self.needs[0]
        assert isinstance(found, MappedBack)  # noqa: S101 - see `__init__`
        return found

    @property
    def _transformations(self) -> TransformationSet:
        found = self._mapped.mapping.transformations
        assert found is not None  # noqa: S101 - there are rows
        return found

    @property
    def _reference(self) -> int:
        """The column of the identity."""
        return identity_of(self._transformations)


def of_assignments(folds: Sequence[Moments], totals: Tensor, reference: int) -> tuple[Tensor, Tensor]:
    """Find for each channel of b = f(t x) the channel of a = f(x) that explains it, one to one.

    Returns:
        The squared residuals of each fold with the assignment of the other, summed, ``(m, channels)``; and the
        assignments: for fold 0, for fold 1, and of all samples, ``(3, m, channels)``.
    """
    m, channels = totals.shape
    residuals, sources = torch.zeros_like(totals), torch.zeros(3, m, channels, dtype=torch.long, device=totals.device)
    every = torch.arange(channels, device=totals.device)
    for j, total in enumerate(totals):
        if j == reference or not bool((total > 0).any()):
            sources[:, j] = every
            continue
        parts = [squared_residuals(fold, reference, j)[0] for fold in folds]
        scale = torch.where(total > 0, total, 1.0)[:, None]
        if not bool((parts[0] + parts[1]).isfinite().all()):  # the channel that explains another one may be NaN
            residuals[j], sources[:, j] = torch.nan, every
            continue
        first, second, both = (assigned(part / scale) for part in (*parts, parts[0] + parts[1]))
        sources[:, j] = torch.stack([second, first, both]).to(totals.device)
        residuals[j] = parts[0][every, sources[0, j]] + parts[1][every, sources[1, j]]
    return residuals, sources


def totals_of(folds: Sequence[Moments], images: Tensor, n_samples: int) -> Tensor:
    """Squared deviations of the samples from the mean images, ``(m, channels)``.

    Deviations from the mean of a channel are the sum of these and of the deviations of its mean image.

    Args:
        folds: moments of both halves of the samples.
        images: ``(m, channels, positions)``.
        n_samples: in both.
    """
    means = images.mean(2)
    total = torch.zeros_like(means)
    for fold in folds:
        total += fold.squares + fold.number.to(means) * (fold.means - means).square()
    of_images = n_samples * (images - means[..., None]).square().sum(2)
    eps = 64 * torch.finfo(total.dtype).eps  # a channel with one image for all samples has nothing but rounding
    rounding = eps * total + eps**2 * n_samples * images.square().sum(2)
    return torch.where(total - of_images > rounding, total - of_images, 0.0)


def squared_residuals(moments: Moments, reference: int, j: int | None = None) -> Tensor:
    """Σ (b_c − a_k)² for all pairs of channels, or all c = k, ``(m, channels of b, channels of a or 1)``.

    Args:
        moments: of one half of the samples.
        reference: the column of a.
        j: one transformation instead of all, with m = 1.
    """
    columns = slice(None) if j is None else slice(j, j + 1)
    means, squares, products = (each[columns] for each in moments[1:])
    of_a = moments.means[reference], moments.squares[reference]
    mean, square = (each if products.shape[2] > 1 else each[:, None] for each in of_a)
    found = (means[..., None] - mean).square_().mul_(moments.number.to(means)).sub_(products, alpha=2)
    return found.add_(squares[..., None]).add_(square).clamp_min_(0)


def assigned(costs: Tensor) -> Tensor:
    """The column assigned to each row, one to one, with the least sum of costs ``(channels, channels)``."""
    found: Tensor = torch.from_numpy(linear_sum_assignment(costs.cpu().numpy())[1])
    return found


def of_regression(train: Moments, test: Moments, ridge: float, reference: int) -> Tensor:
    """Σ (b − W a − w)² over one half, ``(m, channels)``, with the ridge regression of b on a of the other half."""
    m, channels = train.means.shape
    gram = train.products[reference]
    penalty = (ridge * gram.diagonal().mean()).clamp_min(torch.finfo(gram.dtype).tiny)
    penalised = gram + penalty * torch.eye(channels, dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(penalised, train.products.view(m * channels, channels).mT).mT.view_as(train.products)
    explained = (weights @ test.products[reference] * weights).sum(2) - 2 * (weights * test.products).sum(2)
    shift = test.means[reference] - train.means[reference]
    apart = test.means - train.means - (weights @ shift[:, None])[..., 0]
    residuals: Tensor = test.squares + explained + test.number.to(apart) * apart.square()
    return residuals.clamp_min(0)


def closure(goes: Tensor, products: Tensor, reference: int) -> Tensor:
    """The share of channels and pairs of transformations for which maps of channels compose as the transformations do.

    Args:
        goes: where each channel goes, ``(m, channels)``.
        products: position of "transformation j, then transformation i", ``(m, m)``; −1 where the set has none.
        reference: the identity, whose products say nothing.
    """
    known = products >= 0
    known[reference] = known[:, reference] = False
    then, first = known.nonzero(as_tuple=True)
    composed = goes[then].gather(1, goes[first])
    return (composed == goes[products[then, first]]).double().mean() if len(then) else torch.tensor(torch.nan)


def shuffled(sums: Sums, reference: int) -> Tensor:
    """The mean of R² where another sample takes the place of x, over all ordered pairs of samples; a number.

    With the mean images of b and a, Σ over pairs of (b − a')² is n (S_b + S_a) + n² (mean b − mean a)², less the pairs
    of a sample with itself.
    """
    n, totals, images, scores = sums.n_samples, sums[TOTALS], sums["images"], []
    for j, source in enumerate(sums[SOURCES][2]):
        apart = (images[j] - images[reference, source]).square().sum(1)
        others = (n * (totals[j] + totals[reference, source]) + n**2 * apart - sums[RESIDUALS][j]) / (n - 1)
        if j != reference:
            scores.append(torch.where(totals[j] > 0, 1 - others / totals[j], torch.nan))
    return torch.stack(scores).nanmean()
