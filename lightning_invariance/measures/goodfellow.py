"""The invariance measure of Goodfellow et al. (2009), online in one pass, or in two for many samples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.measures.base import States
from lightning_invariance.measures.variance_sums import VarianceMeasure
from lightning_invariance.transforms import TransformationSet

#: The paper's share of values that fire.
PAPER_ALPHA = 0.01

#: The highest values of the rows of a layer may take so many bytes.
MOST_PEAKS = 2**25


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

    The threshold needs all values, the rates need the threshold. Since S = n / (number of samples that fire the unit
    somewhere), the highest value of each row is all that the rates need: of up to ``capacity`` samples (fewer in layers
    so large that these would take more than 32 MiB) it is kept. For more samples there is a second pass, which
    :func:`~lightning_invariance.evaluate` makes. By hand, where :attr:`complete` is false after all blocks, call
    :meth:`end_pass` and update with all of them again.

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
        capacity: how many samples' highest values, and for ``threshold="quantile"`` how many of the highest values of
            all, are kept of each activation; the latter takes more than alpha·n·m.
        kwargs: additional arguments of ``torchmetrics.Metric``.

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

    passes = 2

    thresholds: Tensor
    extremes: Tensor
    peaks: Tensor
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
        self._add_states(extremes=torch.zeros(0, 0, 0, dtype=torch.float64), peaks=torch.zeros(0, 0, 0))
        self._expected = 0

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """Measures of one threshold share their states; the normal one is found by the sums of the variances."""
        own: list[Hashable] = [(Goodfellow, self.alpha, self.threshold, self.sign, self.capacity)]
        return frozenset(own) | super().update_rule if self.threshold == "normal" else frozenset(own)

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """Whether higher values are more invariant."""
        return self.direction == "higher_is_invariant"

    def prepare(
        self, transformations: TransformationSet, input_shape: Sequence[int], n_samples: int | None = None
    ) -> None:
        """Learn whether one pass will do."""
        super().prepare(transformations, input_shape)
        self._expected = n_samples or 0

    @property
    def complete(self) -> bool:
        """Whether the passes so far are enough: there are thresholds, or the highest value of every row."""
        return bool(self.thresholds.numel() or self.peaks.numel() or not self.n_samples)

    def end_pass(self) -> None:
        """Fix the thresholds by what the first pass has seen, for a second one.

        Raises:
            ValueError: If no value reaches the quantile, or ``capacity`` is too small for it.
        """
        self.thresholds = self._found_thresholds()
        self.fires = torch.zeros_like(self.thresholds, dtype=torch.long)
        self.firing_rows = torch.zeros_like(self.fires)
        self.extremes, self.peaks = self.extremes[:0], self.peaks[:0]
        self.n_samples = torch.zeros_like(self.n_samples)

    def compute(self) -> Tensor:
        """The value of every activation."""
        if not self._enough():
            return self._undefined()
        if not self.complete:
            raise RuntimeError(
                f"Goodfellow needs two passes for {int(self.n_samples)} samples: call `end_pass()`, and update with all"
                " blocks again."
            )
        rows = self.firing_rows
        if not self.thresholds.numel():
            peaks = self.peaks[:, : int(self.n_samples)]
            levels = _rounded_down(self._found_thresholds(), peaks.dtype)
            rows = torch.stack([(own > level).sum(0) for own, level in zip(peaks, levels, strict=True)])
        # L / G = (fires / (m · rows)) / (fires / (n · m))
        s = torch.where(rows > 0, self.n_samples / rows.double(), torch.nan)
        best = s[0] if len(s) == 1 else torch.fmax(s[0], s[1])
        return self._shaped(best if self.direction == "higher_is_invariant" else 1 / best)

    def dead(self) -> Tensor | None:
        """Which activations never changed; known with ``threshold="normal"``."""
        return super().dead() if self.threshold == "normal" else None

    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        if self.thresholds.numel():
            levels = _rounded_down(self.thresholds, x.dtype)
            fires = torch.stack([sign * x > level for sign, level in zip(self.signs, levels, strict=True)])
            self.fires = self.fires + fires.sum((1, 2))
            self.firing_rows = self.firing_rows + fires.any(2).sum(1)
            return
        if self.threshold == "normal":
            super()._add(x)
        else:
            values = torch.stack([sign * x.flatten(0, 1) for sign in self.signs]).to(self.extremes.dtype)
            self.extremes = self._highest(torch.cat([self.extremes, values], 1) if self.extremes.numel() else values)
        self._keep_peaks(x)

    def _keep_peaks(self, x: Tensor) -> None:
        """Keep the highest values of rows (times the sign), as long as those of all rows have room."""
        before, k = int(self.n_samples), x.shape[2]
        after = before + len(x)
        most = min(self.capacity, MOST_PEAKS // (len(self.signs) * k * x.element_size()))
        if max(after, self._expected) > most or (before and not self.peaks.numel()):
            self.peaks = self.peaks[:0]
            return
        if after > self.peaks.shape[1]:
            with torch.inference_mode(False):  # what is made in inference mode could be changed only there
                places = min(most, max(self._expected, 2 * after))
                peaks = torch.empty(len(self.signs), places, k, dtype=x.dtype, device=x.device)
            if before:
                peaks[:, :before] = self.peaks[:, :before]
            self.peaks = peaks
        for own, sign in zip(self.peaks, self.signs, strict=True):
            # In place, unlike other states: it is large, and nobody else holds it.
            own[before:after] = x.amax(1) if sign > 0 else -x.amin(1)

    def _highest(self, values: Tensor) -> Tensor:
        return values.topk(min(self.capacity, values.shape[1]), dim=1).values

    def _found_thresholds(self) -> Tensor:
        return self._by_rank() if self.threshold == "quantile" else self._by_normal()

    def _by_normal(self) -> Tensor:
        means = self._sums().means()
        mean = means.mean(0)
        total = self.column_spread[0].clamp_min(0) + self.n_samples * (means - mean).square().sum(0)
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
        if a["thresholds"].numel():  # and all else is that of all rows already
            return {**merged, **{name: a[name] + b[name] for name in ("fires", "firing_rows")}}
        if self.threshold == "quantile":
            merged["extremes"] = self._highest(torch.cat([a["extremes"], b["extremes"]], 1))
        else:
            merged.update(super()._merge(a, b))
        rows = [(states["peaks"], int(states["n_samples"])) for states in (a, b)]
        fit = all(peaks.numel() for peaks, _ in rows) and sum(n for _, n in rows) <= self.capacity
        merged["peaks"] = torch.cat([peaks[:, :n] for peaks, n in rows], 1) if fit else a["peaks"][:0]
        return merged


def _rounded_down(thresholds: Tensor, dtype: torch.dtype) -> Tensor:
    """Thresholds in the type of activations: a value above the one is above the other."""
    levels = thresholds.to(dtype)
    return torch.where(levels.double() > thresholds, levels.nextafter(-torch.full_like(levels, torch.inf)), levels)
