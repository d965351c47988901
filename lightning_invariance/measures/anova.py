"""The ANOVA measure of invariance (paper, section 2.3), from the same sums as the variances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators import Deviations, means_of
from lightning_invariance.measures.base import Measure
from lightning_invariance.measures.f_distribution import CORRECTIONS, f_survival, rejected_f
from lightning_invariance.measures.sums import Sums


class Anova(Measure):
    r"""ANOVA measure: do the means of an activation differ between transformations? (paper, section 2.3).

    The analysis of variance of the ST matrix with the transformations as groups; invariance is the null hypothesis.

    .. math::
        F = \frac{SS_B / (m - 1)}{SS_W / (m (n - 1))}, \qquad
        F_{paired} = \frac{SS_B / (m - 1)}{SS_E / ((m - 1)(n - 1))}

    where :math:`SS_B = n \sum_j (\bar x_{\cdot j} - \bar x)^2`, :math:`SS_W` are the squared deviations from the
    column means and :math:`SS_E` is the part of them that is not due to the samples. Only the column means count: a
    unit that varies with the transformation, but for each sample in another way, is not rejected; with many samples the
    smallest difference of means is.

    As output of ``forward`` and ``compute`` the metric returns

    - ``anova`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``. NaN, with a warning, for fewer than
      two samples or transformations. A constant activation has F = 0, p = 1, effect 0 and is not rejected.

    Args:
        statistic: ``"reject"``: 1 where invariance is rejected, else 0 (the paper's measure; lower is more invariant).
            ``"f"``: F in ``[0, inf]``, lower is more invariant. ``"p"``: its p-value in ``[0, 1]``, not corrected;
            higher is more invariant. ``"effect"``: partial η², the share of the squares that the transformations
            explain, in ``[0, 1]``; lower is more invariant.
        alpha: error rate of the rejection, in (0, 1).
        correction: for the many activations of a layer, with ``statistic="reject"``: ``"bonferroni"`` (the paper's),
            ``"holm"``, ``"fdr_bh"``, or None.
        paired: the repeated-measures F, for which the same sample under every transformation is one subject. The
            paper's test is one-way, as if each transformation had samples of its own; it rejects less.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import Anova
        >>> anova = Anova(statistic="f")
        >>> anova.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # column means 3 and 4: SS_B = 1, SS_W = 10
        >>> anova.compute()
        tensor(0.2000, dtype=torch.float64)
    """

    needs = (Deviations(),)
    least_samples = 2

    def __init__(
        self,
        statistic: str = "reject",
        alpha: float = 0.05,
        correction: str | None = "bonferroni",
        paired: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if statistic not in ("f", "p", "reject", "effect"):
            raise ValueError(
                f'Expected argument `statistic` to be "f", "p", "reject" or "effect", but got {statistic!r}.'
            )
        if not 0 < alpha < 1:
            raise ValueError(f"Expected argument `alpha` to be in (0, 1), but got {alpha}.")
        if correction is not None and correction not in CORRECTIONS:
            raise ValueError(
                f"Expected argument `correction` to be one of {CORRECTIONS} or None, but got {correction!r}."
            )
        self.statistic, self.alpha, self.correction, self.paired = statistic, alpha, correction, paired

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether higher values are more invariant."""
        return self.statistic == "p"

    def value(self, sums: Sums) -> Tensor:
        """The statistic of every activation."""
        n, m = sums.n_samples, sums.n_transformations
        means = means_of(sums)
        between = n * (means - means.mean(0)).square_().sum(0)
        within = sums["column_spread"][0].clamp_min(0)
        if self.paired:
            # No more than the whole, so that it is exactly 0 where columns are constant.
            within = torch.minimum((sums["row_spread"] - between).clamp_min(0), within)
        d1, d2 = m - 1, (m - 1) * (n - 1) if self.paired else m * (n - 1)
        constant = (between == 0) & (within == 0)
        if self.statistic == "effect":
            return torch.where(constant, 0.0, between / (between + within))
        f = torch.where(constant, 0.0, (between / d1) / (within / d2))
        if self.statistic == "f":
            return f
        if self.statistic == "p":
            return f_survival(f, d1, d2)
        rejected = rejected_f(f, d1, d2, self.alpha, self.correction)
        return torch.where(f.isnan(), torch.nan, rejected.to(f.dtype))
