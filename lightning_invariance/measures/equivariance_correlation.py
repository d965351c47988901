"""Correlation of the maps of transformed inputs with transformed maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators import Correlations
from lightning_invariance.accumulators.direct import COMOMENTS
from lightning_invariance.accumulators.mapped_back import BackMapping, check_inverses, identity_of, rounding_of
from lightning_invariance.accumulators.rows import Context
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.base import Measure
from lightning_invariance.messages import check_int
from lightning_invariance.transforms import TransformationSet


class EquivarianceCorrelation(Measure):
    r"""Correlation of f(t x) with t(f(x)), for each channel (Bruintjes, Motyka and van Gemert 2023).

    Pearson's correlation of the feature map of the transformed input and the transformed feature map of the input, over
    samples and over the pixels that the transformation leaves inside the frame:

    .. math:: r_{jc} = \mathrm{corr}\left(t_j(f_c(x)), f_c(t_j x)\right)

    The value of a channel is the mean over the transformations other than the identity. It is in ``[-1, 1]`` and has no
    unit. Higher is more same-equivariant; 1 is same-equivariant up to scale and offset. The distance of maps of unit
    length takes any two positive maps for alike; correlation does not.

    The value is ``(channels,)``, NaN for channels that do not vary. A layer keeps 5 m numbers for each channel.

    Args:
        transformations: the columns, with the identity; an evaluation provides its own.
        mask: exclude pixels that a transformation moves out of the frame; a number larger than 1 also excludes pixels
            closer than this to an excluded one.
        input_size: height and width of the network's input, where the maps have another size.

    Raises:
        ValueError: If the transformations have no identity or no inverses, or ``mask`` is negative.

    Example:
        >>> import torch
        >>> from lightning_invariance import quarter_turns
        >>> from lightning_invariance.measures import EquivarianceCorrelation
        >>> t = quarter_turns()
        >>> measure = EquivarianceCorrelation(t)
        >>> measure.update(t(torch.rand(4, 2, 8, 8)))  # the identity network
        >>> measure.compute()
        tensor([1., 1.], dtype=torch.float64)
    """

    any_channel_axis = True
    higher_is_better = True
    has_floor = True
    has_intervals = True
    least_samples = 1

    def __init__(
        self,
        transformations: TransformationSet | None = None,
        mask: bool | int = True,
        input_size: tuple[int, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        check_int("mask", mask, 0)
        if transformations is not None:
            check_inverses(transformations)
            identity_of(transformations)
        super().__init__([Correlations(BackMapping(transformations, False, int(mask), input_size))], **kwargs)
        self.mask, self.input_size = mask, input_size

    @property
    def transformations(self) -> TransformationSet | None:
        """The columns, if they are known."""
        return self.needs[0].mapping.transformations  # type: ignore[attr-defined, no-any-return]

    def prepare_for(self, context: Context) -> None:
        """Also raises where the transformations have no identity."""
        identity_of(self.transformations or context.transformations)
        super().prepare_for(context)

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """``(channels,)``."""
        return (sums.n_channels,)

    def value(self, sums: Sums) -> Tensor:
        """The mean correlation over the transformations other than the identity."""
        expected, found, products = (sums[name] for name in COMOMENTS)
        floors = [
            rounding_of(sums[mean], sums.n_samples * sums["pixels"][:, None])
            for mean in ("expected_mean", "found_mean")
        ]
        varies = (expected > floors[0]) & (found > floors[1])
        scale = torch.where(varies, expected, 1.0).sqrt() * torch.where(varies, found, 1.0).sqrt()
        correlations = torch.where(varies, (products / scale).clamp(-1, 1), torch.nan)
        identity = None if self.transformations is None else self.transformations.identity
        return correlations[[j for j in range(len(correlations)) if j != identity]].nanmean(0)
