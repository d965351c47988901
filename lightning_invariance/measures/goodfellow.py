"""The invariance measure of Goodfellow et al. (2009): local over global firing rate (paper, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators import Accumulator, Deviations, Extremes, Firing, Peaks, States, means_of
from lightning_invariance.accumulators.peaks import rounded_down
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.base import Measure
from lightning_invariance.messages import check_int


class Goodfellow(Measure):
    r"""Goodfellow's measure: does an activation that fires for a sample also fire for its transformations?

    Goodfellow, Lee, Le, Saxe and Ng, *Measuring invariances in deep networks* (2009), with the threshold of the paper
    (section 3.2). An activation fires where its value (times the sign) is above a threshold that a fraction ``alpha``
    of all values should exceed. The global rate G is the fraction of all n·m values that fire. The local rate L is the
    fraction that fire within the firing rows: the rows of the ST matrix with at least one value that fires.

    .. math:: S = L / G

    S is in ``[1, n]``: about 1 / alpha for a perfectly invariant activation, and close to 1 / (m·alpha) (at least 1)
    for noise. Higher is more invariant; with ``direction="lower_is_invariant"`` the value is G / L in ``(0, 1]``, as
    the paper plots it. The value has ``activation_shape``. It is NaN for activations that never fire.

    Since S = n / (number of firing rows), the highest value of each row is enough for one pass. It is kept for up to
    ``capacity`` samples, or fewer in large layers, where these values would need more than 32 MiB. More samples need a
    second pass, with the threshold of the first, which :func:`~lightning_invariance.evaluate` makes. In updates by
    hand, if :attr:`complete` is false after all blocks, call :meth:`end_pass` and update with all blocks again.

    Args:
        alpha: fraction of the values that should fire, in (0, 1).
        threshold: ``"normal"``: mean + z·std, with z from the normal distribution. ``"quantile"``: the value that a
            fraction ``alpha`` of all values exceeds, exactly.
        sign: 1 for activations that fire at high values, -1 at low values, ``"best"`` for the more invariant of both.
        direction: ``"higher_is_invariant"`` (S) or ``"lower_is_invariant"`` (1 / S).
        capacity: number of rows whose highest value is kept, and for ``threshold="quantile"`` number of highest values
            kept of each activation, which must be larger than alpha·n·m.

    Raises:
        ValueError: If an argument is out of its range or, after the first pass, ``alpha`` or ``capacity`` is too small
            for the quantile.
        RuntimeError: If ``compute`` is called and a second pass is missing.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import Goodfellow
        >>> measure = Goodfellow(alpha=0.25, threshold="quantile")
        >>> st = torch.tensor([[9.0, 8.0], [1.0, 2.0], [0.0, 3.0], [4.0, 1.0]])
        >>> measure.update(st)  # 2 of 8 values fire, both in one row: L = 1, G = 1/4
        >>> measure.compute()
        tensor(4., dtype=torch.float64)
    """

    any_channel_axis = True

    def __init__(
        self,
        alpha: float = 0.01,
        threshold: str = "normal",
        sign: int | str = 1,
        direction: str = "higher_is_invariant",
        capacity: int = 256,
        **kwargs: Any,
    ) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"Expected argument `alpha` to be in (0, 1), but got {alpha}.")
        if threshold not in ("normal", "quantile"):
            raise ValueError(f'Expected argument `threshold` to be "normal" or "quantile", but got {threshold!r}.')
        if sign not in (1, -1, "best"):
            raise ValueError(f'Expected argument `sign` to be 1, -1 or "best", but got {sign!r}.')
        if direction not in ("higher_is_invariant", "lower_is_invariant"):
            raise ValueError(
                'Expected argument `direction` to be "higher_is_invariant" or "lower_is_invariant",'
                f" but got {direction!r}."
            )
        check_int("capacity", capacity)
        signs = (1, -1) if sign == "best" else (int(sign),)
        of_all: Accumulator = Deviations() if threshold == "normal" else Extremes(signs, capacity)
        super().__init__([of_all, Peaks(signs, capacity)], [Firing(signs, alpha, threshold)], **kwargs)
        self.alpha, self.threshold, self.sign = alpha, threshold, sign
        self.direction, self.capacity, self.signs = direction, capacity, signs

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """True for S, false for 1 / S."""
        return self.direction == "higher_is_invariant"

    def needs_second_pass(self, sums: Sums) -> bool:
        """Whether there were too many samples to keep the highest value of each row."""
        return not sums["peaks"].numel()

    def second_pass(self, sums: Sums) -> States:
        """The thresholds of the first pass, and counts of 0."""
        thresholds = self._thresholds(sums)
        return {"thresholds": thresholds, "firing_rows": torch.zeros_like(thresholds, dtype=torch.long)}

    def value(self, sums: Sums) -> Tensor:
        """S = n / (number of firing rows), or 1 / S, of every activation."""
        if "firing_rows" in sums and sums["firing_rows"].numel():
            rows = sums["firing_rows"]
        else:
            peaks = sums["peaks"][:, : sums.n_samples]
            levels = rounded_down(self._thresholds(sums), peaks.dtype)
            rows = torch.stack([(own > level).sum(0) for own, level in zip(peaks, levels, strict=True)])
        # L / G = (fires / (m · rows)) / (fires / (n · m))
        s = torch.where(rows > 0, sums.n_samples / rows.double(), torch.nan)
        best = s[0] if len(s) == 1 else torch.fmax(s[0], s[1])
        return best if self.direction == "higher_is_invariant" else 1 / best

    def _thresholds(self, sums: Sums) -> Tensor:
        if self.threshold == "quantile":
            return self._quantiles(sums)
        n, m = sums.n_samples, sums.n_transformations
        means = means_of(sums)
        mean = means.mean(0)
        squares = sums["column_spread"][0].clamp_min(0) + n * (means - mean).square().sum(0)
        std = (squares / (n * m - 1)).sqrt()
        z = torch.special.ndtri(torch.tensor(1 - self.alpha, dtype=std.dtype, device=std.device))
        return torch.stack([sign * mean + z * std for sign in self.signs])

    def _quantiles(self, sums: Sums) -> Tensor:
        count = sums.n_samples * sums.n_transformations
        rank = int(round(self.alpha * count, 9))  # 0.29 · 100 is 28.999999999999996
        if rank == 0:
            raise ValueError(
                f"Expected argument `alpha` to be at least 1 / {count}, one value of all, but got {self.alpha}."
            )
        if rank >= self.capacity:
            raise ValueError(
                f"Expected argument `capacity` to be larger than alpha·n·m = {rank}, but got {self.capacity}."
            )
        highest = sums["extremes"][:, 0]  # NaN where a value is NaN, wherever it stands
        return torch.where(highest.isnan(), highest, sums["extremes"][:, rank])
