"""Moments of the channels of f(x) and of f(t x), from which a map between them is found and scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.mapped_back import constant_channels
from lightning_invariance.accumulators.rows import N_SAMPLES, Context, Rows, States
from lightning_invariance.accumulators.subsample import mixed

#: The states that hold the moments of both folds.
MOMENTS = ("fold_counts", "channel_means", "channel_squares", "channel_products")


class Moments(NamedTuple):
    """Moments of the N values of each channel, over samples and positions; b stands for f(t x) and a for f(x).

    Attributes:
        number: N.
        means: of b under each transformation, ``(m, channels)``.
        squares: Σ (b − mean b)², ``(m, channels)``.
        products: Σ (b − mean b)(a − mean a), ``(m, channels of b, channels of a)``, or ``(m, channels)`` of equal ones.
    """

    number: Tensor
    means: Tensor
    squares: Tensor
    products: Tensor


@dataclass(frozen=True)
class ChannelMoments(Accumulator):
    r"""Moments of channels in two folds of the samples, and mean images.

    With a = f(x) and b = f(t_j x), mapped back, and sums over the samples of a fold and over positions p:

    - ``fold_counts`` ``(2,)`` in int64, on the CPU: the number of values of a channel in each fold.
    - ``channel_means`` ``(2, m, channels)``: :math:`\bar b_{jc}`.
    - ``channel_squares`` ``(2, m, channels)``: :math:`\sum (b_{jc} - \bar b_{jc})^2`.
    - ``channel_products`` ``(2, m, channels, channels)``: :math:`\sum (b_{jc} - \bar b_{jc})(a_k - \bar a_k)`; without
      ``mixed`` ``(2, m, channels, 1)``, of k = c alone.
    - ``images`` ``(m, channels, positions)``: the mean of b over all samples.

    Of two samples with neighbouring ``indices`` a random one is in fold 0, the other in fold 1; without indices, of two
    that follow each other.

    Attributes:
        mixed: whether products of different channels are needed.
        reference: the column of the identity, f(x).
    """

    mixed: bool = True
    reference: int = 0

    cpu_states = ("fold_counts",)
    any_channel_axis = True

    def empty(self) -> States:
        """The states before the first row."""
        states = {
            name: torch.zeros([0] * axes, dtype=torch.float64)
            for name, axes in zip(MOMENTS[1:], (3, 3, 4), strict=True)
        }
        return {"fold_counts": torch.zeros(2, dtype=torch.long), "images": states["channel_means"].clone(), **states}

    def add(self, states: States, rows: Rows) -> None:
        """Add the moments of rows to their folds."""
        maps = rows.maps
        m, channels, positions = maps.shape[1:]
        if not states["channel_means"].numel():
            like = maps.new_zeros(2, m, channels, dtype=torch.float64)
            states.update(channel_means=like, channel_squares=like.clone(), images=like.new_zeros(maps.shape[1:]))
            states["channel_products"] = like.new_zeros(2, m, channels, channels if self.mixed else 1)
        for fold, some in enumerate(_folds(maps, rows)):
            if some.numel():
                sums = some.sum(0, dtype=torch.float64)
                self._add(states, fold, some, sums.mean(2) / len(some))
                before = int(states["fold_counts"].sum()) // positions
                states["fold_counts"][fold] += len(some) * positions
                states["images"] += (sums - len(some) * states["images"]) / (before + len(some))

    def _add(self, states: States, fold: int, maps: Tensor, mean: Tensor) -> None:
        """Add ``(samples, m, channels, positions)`` with the mean ``(m, channels)`` to a fold.

        What the shift of the mean adds to the moments is one more column of the deviations.
        """
        m, channels = mean.shape
        count, added = int(states["fold_counts"][fold]), len(maps) * maps.shape[3]
        deviations = maps.new_empty(m, channels, added + 1, dtype=torch.float64)
        view = deviations[..., :-1].view(m, channels, len(maps), -1)
        torch.sub(maps.permute(1, 2, 0, 3), mean[..., None, None], out=view)
        shift = mean - states["channel_means"][fold]
        deviations[..., -1] = (count * added / (count + added)) ** 0.5 * shift
        products = states["channel_products"][fold]
        if self.mixed:
            flat = products.view(m * channels, channels)
            flat.addmm_(deviations.view(m * channels, -1), deviations[self.reference].mT)
        else:
            products += (deviations[..., None, :] @ deviations[self.reference, ..., None])[..., 0]
        states["channel_squares"][fold] += torch.linalg.vector_norm(deviations, dim=2).square_()
        states["channel_means"][fold] += added / (count + added) * shift

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both (Chan, Golub and LeVeque 1983)."""
        counts, added = a["fold_counts"], b["fold_counts"]
        part = (added.double() / (counts + added).clamp_min(1)).to(a["channel_means"])[:, None, None]
        weight = counts.to(part)[:, None, None] * part
        apart = b["channel_means"] - a["channel_means"]
        of_reference = apart[:, self.reference, None, None] if self.mixed else apart[:, self.reference, None, :, None]
        products = weight[..., None] * apart[..., None] * of_reference
        share = int(b[N_SAMPLES]) / int(a[N_SAMPLES] + b[N_SAMPLES])
        return {
            "fold_counts": counts + added,
            "channel_means": a["channel_means"] + part * apart,
            "channel_squares": a["channel_squares"] + b["channel_squares"] + weight * apart.square(),
            "channel_products": a["channel_products"] + b["channel_products"] + products,
            "images": a["images"] + share * (b["images"] - a["images"]),
        }

    def prepared(self, context: Context) -> Accumulator:
        """With the column of the identity."""
        return replace(self, reference=context.transformations.identity or 0)

    def shares(self, rows: Rows, totals: States) -> States:
        r"""Squared deviations of each sample from the mean image, and from the channel that explains it.

        ``totals`` ``(samples, m, channels)``: :math:`\sum_p (b_{jc} - \mu_{jc})^2`; ``residuals``, in this shape:
        :math:`\sum_p (b_{jc} - a_{\pi(c)})^2`, with the channels π that the other fold found, which are in a state
        ``sources`` ``(2 or more, m, channels)``.
        """
        maps = rows.maps
        residuals = maps.new_zeros(maps.shape[:3], dtype=torch.float64)
        for numbers, sources in zip(_places(maps, rows), totals["sources"], strict=False):
            places = numbers.to(maps.device)
            some = maps[places].double()
            for j, source in enumerate(sources):
                residuals[places, j] = (some[:, j] - some[:, self.reference, source]).square_().sum(2)
        return {"totals": (maps - totals["images"]).square_().sum(3), "residuals": residuals}

    def dead(self, states: States) -> Tensor:
        """Which channels had one value everywhere."""
        some = [fold for fold, count in enumerate(states["fold_counts"].tolist()) if count]
        means, squares = (states[name][some].flatten(0, 1) for name in ("channel_means", "channel_squares"))
        return constant_channels(means, squares, states["fold_counts"].max().to(means.device))

    @staticmethod
    def moments(states: Mapping[str, Tensor], fold: int) -> Moments:
        """The moments of one fold."""
        return Moments(*(states[name][fold] for name in MOMENTS))


def _places(maps: Tensor, rows: Rows) -> list[Tensor]:
    """The positions of the rows of each fold, on the CPU."""
    numbers = torch.arange(rows.before, rows.before + len(maps)) if rows.indices is None else rows.indices
    folds = fold_of(numbers)
    return [(folds == fold).nonzero().flatten() for fold in (0, 1)]


def fold_of(numbers: Tensor) -> Tensor:
    """The fold of samples, 0 or 1: random, since classes may alternate, and balanced."""
    return (numbers + mixed(numbers // 2)) % 2


def _folds(maps: Tensor, rows: Rows) -> list[Tensor]:
    """The rows of each fold."""
    return [maps[places.to(maps.device)] for places in _places(maps, rows)]
