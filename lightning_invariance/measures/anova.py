"""The ANOVA measure of invariance (paper, section 2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators import Deviations, PairedDeviations
from lightning_invariance.accumulators.column_means import differences_of
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.base import Measure
from lightning_invariance.measures.significance import CORRECTIONS, f_survival, rejected

STATISTICS = ("f", "p", "reject", "effect", "epsilon")


class Anova(Measure):
    r"""ANOVA measure: do the means of an activation differ between transformations? (paper, section 2.3).

    The analysis of variance of the ST matrix with the transformations as groups; invariance is the null hypothesis.

    .. math::
        F = \frac{SS_B / (m - 1)}{SS_W / (m (n - 1))}, \qquad
        F_{paired} = \frac{SS_B / (m - 1)}{SS_E / ((m - 1)(n - 1))}

    where :math:`SS_B = n \sum_j (\bar x_{\cdot j} - \bar x)^2`, :math:`SS_W` is the sum of squared deviations from the
    column means and :math:`SS_E` is :math:`SS_W` without the differences between samples. Only column means count:
    invariance is not rejected for an activation that each transformation changes differently for each sample, and with
    many samples it is rejected for the smallest difference of means.

    The paired F assumes that all differences of two columns have one variance (sphericity), which is false for
    neighbouring angles. Both degrees of freedom are therefore multiplied by Greenhouse and Geisser's
    :math:`\epsilon = (\operatorname{tr} S)^2 / ((m - 1) \operatorname{tr} S^2)` in :math:`[1 / (m - 1), 1]`, where S is
    the covariance of the columns of centred rows, summed over the activations of the layer.

    The value has ``activation_shape``. It is NaN, with a warning, for fewer than two samples or transformations. A
    constant activation has F = 0, p = 1 and effect 0, and is not rejected.

    Args:
        statistic: ``"reject"``: 1 where invariance is rejected, else 0 (the paper's measure; lower is more invariant).
            ``"f"``: F in ``[0, inf]``; lower is more invariant. ``"p"``: the p-value in ``[0, 1]``, not corrected;
            higher is more invariant. ``"effect"``: partial η² in ``[0, 1]``, the fraction of the squares that the
            transformations explain; lower is more invariant. ``"epsilon"``: ε of the layer, repeated for each
            activation; 1 for the one-way test.
        alpha: error rate of the rejection, in (0, 1).
        correction: correction of ``"reject"`` for many activations: ``"bonferroni"`` (the paper's), ``"holm"``,
            ``"fdr_bh"``, or None.
        paired: repeated-measures F, with the samples as subjects. The paper's one-way F treats the columns as
            independent samples, and rejects less often.
        family: the activations that are corrected together: of one ``"layer"``, or of all layers of the
            ``"network"``, as in the paper, which only an evaluation does.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import Anova
        >>> anova = Anova(statistic="f")
        >>> anova.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # column means 3 and 4: SS_B = 1, SS_W = 10
        >>> anova.compute()
        tensor(0.2000, dtype=torch.float64)
    """

    any_channel_axis = True
    needs = (Deviations(),)
    least_samples = 2

    def __init__(
        self,
        statistic: str = "reject",
        alpha: float = 0.05,
        correction: str | None = "bonferroni",
        paired: bool = False,
        family: str = "layer",
        **kwargs: Any,
    ) -> None:
        super().__init__([PairedDeviations() if paired else Deviations()], **kwargs)
        if statistic not in STATISTICS:
            raise ValueError(f"Expected argument `statistic` to be one of {STATISTICS}, but got {statistic!r}.")
        if not 0 < alpha < 1:
            raise ValueError(f"Expected argument `alpha` to be in (0, 1), but got {alpha}.")
        if correction is not None and correction not in CORRECTIONS:
            raise ValueError(
                f"Expected argument `correction` to be one of {CORRECTIONS} or None, but got {correction!r}."
            )
        if family not in ("layer", "network"):
            raise ValueError(f'Expected argument `family` to be "layer" or "network", but got {family!r}.')
        self.statistic, self.alpha, self.correction, self.paired = statistic, alpha, correction, paired
        self.family = family
        self._rejects_in_network = statistic == "reject" and family == "network"

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """True for p-values, which are higher for more invariant activations; None for ε."""
        return None if self.statistic == "epsilon" else self.statistic == "p"

    def value(self, sums: Sums) -> Tensor:
        """The statistic of every activation."""
        return self._statistic(sums, self.statistic)

    def _statistic(self, sums: Sums, statistic: str) -> Tensor:
        n, m = sums.n_samples, sums.n_transformations
        means = sums["paired_means"] if self.paired else differences_of(sums)
        means = means - means[0]  # so that `between` is exactly 0 for equal columns
        between = n * (means - means.mean(0)).square_().sum(0)
        if not self.paired:  # sums of equal columns may differ by rounding
            between = torch.where(sums["row_spread"] == 0, 0.0, between)
        within = (sums["paired_error"] if self.paired else sums["column_spread"][0]).clamp_min(0)
        epsilon = _sphericity(sums["paired_products"]) if self.paired else 1.0
        d1, d2 = m - 1, (m - 1) * (n - 1) if self.paired else m * (n - 1)
        constant = (between == 0) & (within == 0)
        if statistic == "epsilon":
            return torch.full_like(between, epsilon)
        if statistic == "effect":
            return torch.where(constant, 0.0, between / (between + within))
        f = torch.where(constant, 0.0, (between / d1) / (within / d2))
        if statistic == "f":
            return f
        if statistic == "p":
            return f_survival(f, epsilon * d1, epsilon * d2)
        return self._rejections(f_survival(f, epsilon * d1, epsilon * d2))

    def _rejections(self, p: Tensor) -> Tensor:
        return torch.where(p.isnan(), torch.nan, rejected(p, self.alpha, self.correction).double())

    def of_layer(self, sums: Sums) -> Tensor:
        """The value, or the p-values for rejections in the whole network."""
        return self._statistic(sums, "p" if self._rejects_in_network else self.statistic)

    def of_network(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The rejections of all activations of a network."""
        if not self._rejects_in_network or not values:
            return values
        p = torch.cat([value.flatten() for value in values.values()])
        parts = torch.split(self._rejections(p), [value.numel() for value in values.values()])
        return {name: part.view(values[name].shape) for name, part in zip(values, parts, strict=True)}


def _sphericity(products: Tensor) -> float:
    """Greenhouse and Geisser's ε, given the products of columns of centred rows, (m, m); 1 if all are 0."""
    total = float(products.trace())
    if not total > 0:
        return 1.0
    scaled = products / total
    least = 1 / (len(products) - 1)
    return min(1.0, max(least, least / float(scaled.square().sum())))
