"""The invariance measure of Goodfellow et al. (2009), online in two passes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.measures.base import States
from lightning_invariance.measures.variance_sums import VarianceMeasure

#: The paper's share of values that fire.
PAPER_ALPHA = 0.01


class Goodfellow(VarianceMeasure):
    r"""Goodfellow's measure: do the transformations of what fires a unit fire it too?

    Goodfellow, Lee, Le, Saxe and Ng, *Measuring invariances in deep networks* (2009), with the threshold of the paper
    (section 3.2). A unit fires where its activation (times the sign) lies above a threshold that a share ``alpha`` of
    all values should exceed. The global rate G is the share of all n·m values that fire; the local rate L is the share
    of values that fire in the trajectories (rows of the ST matrix) of the samples that fire the unit somewhere:

    .. math:: S = L / G

    S lies in ``[1, n]``: about 1 / alpha for a perfectly invariant unit, and close to 1 / (m·alpha) (at least 1) for
    noise. Higher is more invariant; with ``direction="lower_is_invariant"`` the value is G / L in ``(0, 1]``, as the
    paper plots it. NaN for units that never fire.

    The threshold needs all values, the rates need the threshold: two passes. :func:`~lightning_invariance.evaluate`
    makes both. By hand, update with all blocks, call :meth:`end_pass`, and update with all blocks again.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``goodfellow`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``.

    Args:
        alpha: share of the values that should fire, in (0, 1).
        threshold: ``"normal"``: mean + z·std, with z from the normal distribution. ``"quantile"``: the value that a
            share ``alpha`` of all exceeds, exactly; it keeps the ``capacity`` highest values of each activation.
        sign: 1 for units that fire when they are high, -1 when they are low, ``"best"`` for the more invariant of both.
        direction: ``"higher_is_invariant"`` (S) or ``"lower_is_invariant"`` (1 / S).
        capacity: how many values are kept for ``threshold="quantile"``; more than alpha·n·m are needed.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, blocks do not fit together, or (after the first pass) no value
            reaches the quantile or ``capacity`` is too small for it.
        TypeError: If a block is not of a real floating-point type.
        RuntimeError: If ``compute`` is called before the second pass.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import Goodfellow
        >>> measure = Goodfellow(alpha=0.25, threshold="quantile")
        >>> st = torch.tensor([[9.0, 8.0], [1.0, 2.0], [0.0, 3.0], [4.0, 1.0]])
        >>> measure.update(st)
        >>> measure.end_pass()
        >>> measure.update(st)  # 2 of 8 values fire, both in one row: L = 1, G = 1/4
        >>> measure.compute()
        tensor(4., dtype=torch.float64)
    """

    passes = 2

    thresholds: Tensor
    extremes: Tensor
    fires: Tensor
    firing_rows: Tensor

    def __init__(
        self,
        alpha: float = PAPER_ALPHA,
        threshold: str = "normal",
        sign: int | str = 1,
        direction: str = "higher_is_invariant",
        capacity: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(squared=True, aggregate=None, **kwargs)
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
        self.alpha, self.threshold, self.sign = alpha, threshold, sign
        self.direction, self.capacity = direction, capacity
        self.signs = (1, -1) if sign == "best" else (int(sign),)
        matrix = torch.zeros(0, 0, dtype=torch.float64)
        self._add_states(thresholds=matrix, fires=matrix.long(), firing_rows=matrix.long())
        self._add_states(extremes=torch.zeros(0, 0, 0, dtype=torch.float64))

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """Shared by measures of one threshold; the first pass differs from that of the variances."""
        return frozenset([(Goodfellow, self.alpha, self.threshold, self.sign, self.capacity)])

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether higher values are more invariant."""
        return self.direction == "higher_is_invariant"

    def end_pass(self) -> None:
        """Fix the thresholds by what the first pass has seen.

        Raises:
            ValueError: If no value reaches the quantile, or ``capacity`` is too small for it.
        """
        thresholds = self._by_rank() if self.threshold == "quantile" else self._by_normal()
        about = self.columns, self.activation_shape
        self._set_states(
            {name: torch.as_tensor(empty).clone().to(self.device) for name, empty in self._defaults.items()}
        )
        self.columns, self.activation_shape = about
        self.thresholds = thresholds
        self.fires = torch.zeros_like(thresholds, dtype=torch.long)
        self.firing_rows = torch.zeros_like(self.fires)

    def compute(self) -> Tensor:
        """The value of every activation."""
        if not self._enough():
            return self._undefined()
        if not self.thresholds.numel():
            raise RuntimeError("Goodfellow needs two passes: call `end_pass()`, and update with all blocks again.")
        # L / G = (fires / (m · rows)) / (fires / (n · m))
        s = torch.where(self.firing_rows > 0, self.n_samples / self.firing_rows.double(), torch.nan)
        best = s[0] if len(s) == 1 else torch.fmax(s[0], s[1])
        return self._shaped(best if self.direction == "higher_is_invariant" else 1 / best)

    def dead(self) -> None:
        """Not known after the second pass."""

    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        if self.thresholds.numel():
            fires = torch.stack([sign * x > level for sign, level in zip(self.signs, self._levels(x), strict=True)])
            self.fires = self.fires + fires.sum((1, 2))
            self.firing_rows = self.firing_rows + fires.any(2).sum(1)
        elif self.threshold == "normal":
            super()._add(x)
        else:
            values = torch.stack([sign * x.flatten(0, 1) for sign in self.signs]).to(self.extremes.dtype)
            self.extremes = self._highest(torch.cat([self.extremes, values], 1) if self.extremes.numel() else values)

    def _levels(self, x: Tensor) -> Tensor:
        """The thresholds in the type of ``x``, rounded down: a value above the one is above the other."""
        levels = self.thresholds.to(x.dtype)
        return torch.where(
            levels.double() > self.thresholds, levels.nextafter(-torch.full_like(levels, torch.inf)), levels
        )

    def _highest(self, values: Tensor) -> Tensor:
        return values.topk(min(self.capacity, values.shape[1]), dim=1).values

    def _by_normal(self) -> Tensor:
        spread, means = self._columns_joined()
        mean = means.mean(0)
        total = spread[0] + self.n_samples * (means - mean).square().sum(0)
        std = (total / (self.n_samples * self.n_transformations - 1)).sqrt()
        z = torch.special.ndtri(torch.tensor(1 - self.alpha, dtype=std.dtype, device=std.device))
        return torch.stack([sign * mean + z * std for sign in self.signs])

    def _by_rank(self) -> Tensor:
        count = int(self.n_samples) * self.n_transformations
        rank = int(self.alpha * count)
        if rank == 0:
            raise ValueError(
                f"Expected argument `alpha` to be at least 1 / {count}, the share of one value, but got {self.alpha}."
            )
        if rank >= self.capacity:
            raise ValueError(
                f"Expected argument `capacity` to be larger than alpha·n·m = {rank}, but got {self.capacity}."
            )
        return self.extremes[:, rank].clone()

    def _merge(self, a: States, b: States) -> States:
        merged = {name: a[name] for name in self._defaults}
        if a["thresholds"].numel():
            return {**merged, **{name: a[name] + b[name] for name in ("fires", "firing_rows")}}
        if self.threshold == "quantile":
            return {**merged, "extremes": self._highest(torch.cat([a["extremes"], b["extremes"]], 1))}
        return {**merged, **super()._merge(a, b)}
