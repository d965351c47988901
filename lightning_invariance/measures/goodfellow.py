"""The invariance measure of Goodfellow et al. (2009), online in one pass, or in two for many samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators import Accumulator, Deviations, Extremes, Firing, Peaks, States, means_of
from lightning_invariance.accumulators.peaks import rounded_down
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.base import Measure

#: The paper's share of values that fire.
PAPER_ALPHA = 0.01


class Goodfellow(Measure):
    r"""Goodfellow's measure: do the transformations of what fires a unit fire it too?

    Goodfellow, Lee, Le, Saxe and Ng, *Measuring invariances in deep networks* (2009), with the threshold of the paper
    (section 3.2). A unit fires where its activation (times the sign) lies above a threshold that a share ``alpha`` of
    all values should exceed. The global rate G is the share of all n·m values that fire; the local rate L is the share
    of values that fire in the trajectories (rows of the ST matrix) of the samples that fire the unit somewhere:

    .. math:: S = L / G

    S lies in ``[1, n]``: about 1 / alpha for a perfectly invariant unit, and close to 1 / (m·alpha) (at least 1) for
    noise. Higher is more invariant; with ``direction="lower_is_invariant"`` the value is G / L in ``(0, 1]``, as the
    paper plots it. NaN for units that never fire.

    The threshold needs all values, the rates need the threshold. Since S = n / (number of samples that fire the unit
    somewhere), the highest value of each row is all that the rates need: of up to ``capacity`` samples (fewer in layers
    so large that these would take more than 32 MiB) it is kept. For more samples there is a second pass, which
    :func:`~lightning_invariance.evaluate` makes. By hand, where :attr:`complete` is false after all blocks, call
    :meth:`end_pass` and update with all of them again.

    As output of ``forward`` and ``compute`` the metric returns

    - ``goodfellow`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``.

    Args:
        alpha: share of the values that should fire, in (0, 1).
        threshold: ``"normal"``: mean + z·std, with z from the normal distribution. ``"quantile"``: the value that a
            share ``alpha`` of all exceeds, exactly; it keeps the ``capacity`` highest values of each activation.
        sign: 1 for units that fire when they are high, -1 when they are low, ``"best"`` for the more invariant of both.
        direction: ``"higher_is_invariant"`` (S) or ``"lower_is_invariant"`` (1 / S).
        capacity: how many samples' highest values, and for ``threshold="quantile"`` how many of the highest values of
            all, are kept of each activation; the latter takes more than alpha·n·m.

    Raises:
        ValueError: If an argument is out of its range, blocks do not fit together, or (after the first pass) no value
            reaches the quantile or ``capacity`` is too small for it.
        TypeError: If a block is not of a real floating-point type.
        RuntimeError: If ``compute`` is called before a second pass that is needed.

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
        alpha: float = PAPER_ALPHA,
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
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"Expected argument `capacity` to be an int larger than 0, but got {capacity}.")
        signs = (1, -1) if sign == "best" else (int(sign),)
        of_all: Accumulator = Deviations() if threshold == "normal" else Extremes(signs, capacity)
        super().__init__([of_all, Peaks(signs, capacity)], [Firing(signs, alpha, threshold)], **kwargs)
        self.alpha, self.threshold, self.sign = alpha, threshold, sign
        self.direction, self.capacity, self.signs = direction, capacity, signs

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether higher values are more invariant."""
        return self.direction == "higher_is_invariant"

    def needs_second_pass(self, sums: Sums) -> bool:
        """Whether there are more samples than highest values of rows could be kept for."""
        return not sums["peaks"].numel()

    def second_pass(self, sums: Sums) -> States:
        """The thresholds, by what the first pass has seen.

        Raises:
            ValueError: If no value reaches the quantile, or ``capacity`` is too small for it.
        """
        thresholds = self._thresholds(sums)
        return {"thresholds": thresholds, "firing_rows": torch.zeros_like(thresholds, dtype=torch.long)}

    def value(self, sums: Sums) -> Tensor:
        """S of every activation: n / (number of rows that fire)."""
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
        return self._by_rank(sums) if self.threshold == "quantile" else self._by_normal(sums)

    def _by_normal(self, sums: Sums) -> Tensor:
        """Mean + z · standard deviation of all n·m values of each activation."""
        n, m = sums.n_samples, sums.n_transformations
        means = means_of(sums)
        mean = means.mean(0)
        squares = sums["column_spread"][0].clamp_min(0) + n * (means - mean).square().sum(0)
        std = (squares / (n * m - 1)).sqrt()
        z = torch.special.ndtri(torch.tensor(1 - self.alpha, dtype=std.dtype, device=std.device))
        return torch.stack([sign * mean + z * std for sign in self.signs])

    def _by_rank(self, sums: Sums) -> Tensor:
        """The value that a share alpha of all n·m values exceeds."""
        count = sums.n_samples * sums.n_transformations
        rank = int(round(self.alpha * count, 9))  # 0.29 · 100 is 28.999999999999996
        if rank == 0:
            raise ValueError(
                f"Expected argument `alpha` to be at least 1 / {count}, the share of one value, but got {self.alpha}."
            )
        if rank >= self.capacity:
            raise ValueError(
                f"Expected argument `capacity` to be larger than alpha·n·m = {rank}, but got {self.capacity}."
            )
        return sums["extremes"][:, rank].clone()
