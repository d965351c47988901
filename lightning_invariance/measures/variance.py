"""Variance measures of invariance (paper, section 2.4), online: one pass over complete rows of the ST matrix."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.functional.variance import normalize
from lightning_invariance.measures.base import Measure, States

#: Values that are processed at once, so that the intermediate results stay in the processor's cache.
CHUNK = 2**21

#: Longer sums than this are taken in float64.
LONGEST_FLOAT32_SUM = 256

#: Sums of squares below this lose digits in float32, whose smallest normal number is about 1e-38.
SMALLEST_FLOAT32_SQUARE = 1e-30


class VarianceMeasure(Measure):
    r"""Shared update of the variance measures: squared deviations within the rows and columns of the ST matrix.

    The states, for k activations and m transformations, are ``n_samples``; ``row_spread`` (k,), the sum over rows of
    their squared deviations from the row mean; ``column_spread`` (1, k), the squared deviations from the column means,
    summed over the columns; and ``column_means`` (m, k): (m + 2) k numbers. Where ``squared`` is false,
    ``row_spread`` is the sum of the rows' standard deviations, and ``column_spread`` (m, k) is kept for each column.

    In a block each row and each column is centred on its first value, and blocks are merged by their means. So the
    sums stay exact when the mean is large against the spread, and are exactly zero where a row or a column is constant,
    which keeps an invariant unit (TV = 0) and a division by zero (SV = 0) apart from small numbers.
    """

    row_spread: Tensor
    column_spread: Tensor
    column_means: Tensor

    def __init__(self, squared: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(squared, bool):
            raise ValueError(f"Expected argument `squared` to be a bool, but got {squared!r}.")
        self.squared = squared
        self._add_states(
            row_spread=torch.zeros(0, dtype=torch.float64),
            column_spread=torch.zeros(0, 0, dtype=torch.float64),
            column_means=torch.zeros(0, 0, dtype=torch.float64),
        )

    @property
    def update_rule(self) -> Hashable:
        """The family shares its states; those of standard deviations are others."""
        return (VarianceMeasure, self.squared)

    @property
    def n_transformations(self) -> int:
        """Number of transformations m of the blocks so far; 0 before the first."""
        return len(self.column_means)

    def dead(self) -> Tensor:
        """Which activations never changed, over all samples and transformations: bool of ``activation_shape``."""
        return self._shaped((self.row_spread == 0) & (self.column_spread == 0).all(0))

    def _states_of(self, x: Tensor) -> States:
        step = max(1, CHUNK // (x.shape[0] * x.shape[1]))
        parts = [self._spreads(part) for part in torch.split(x, step, dim=2)]
        row, column, means = parts[0] if len(parts) == 1 else (torch.cat(p, -1) for p in zip(*parts, strict=True))
        return {"row_spread": row, "column_spread": column, "column_means": means}

    def _spreads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spread of the rows and of the columns of ``x``, and the column means."""
        if x.dtype == torch.float32 and max(x.shape[:2]) > LONGEST_FLOAT32_SUM:
            x = x.double()
        n, m, _ = x.shape
        dtype = self.column_means.dtype

        deviation = x - x[:, :1]
        row_sums = deviation.sum(1)
        row_squares = deviation.square_().sum(1)
        row = (row_squares.to(dtype) - row_sums.to(dtype).square_().div_(m)).clamp_min_(0)

        torch.sub(x, x[:1], out=deviation)
        column_sums = deviation.sum(0).to(dtype)
        column_squares = self._over_columns(deviation.square_())
        means = torch.add(x[0].to(dtype), column_sums, alpha=1 / n)
        excess = self._over_columns(column_sums.square_()[None])
        column = torch.sub(column_squares.to(dtype), excess, alpha=1 / n).clamp_min_(0)

        if _lost_in_float32(row_squares, row_sums) or _lost_in_float32(column_squares, excess):
            return self._spreads(x.double())
        return (row if self.squared else row.div_(m - 1).sqrt_()).sum(0), column, means

    def _over_columns(self, squares: Tensor) -> Tensor:
        """Sum squares (samples, transformations, activations) to the shape of ``column_spread``."""
        return squares.flatten(0, 1).sum(0, keepdim=True) if self.squared else squares.sum(0)

    def _merge(self, a: States, b: States) -> States:
        # Chan, Golub and LeVeque 1983 (the paper's reference 20): only positive numbers are added.
        n_a, n_b = a["n_samples"].to(a["row_spread"].dtype), b["n_samples"].to(a["row_spread"].dtype)
        delta = b["column_means"] - a["column_means"]
        means = a["column_means"] + delta * (n_b / (n_a + n_b))
        between = self._over_columns(delta.square_()[None]) * (n_a * n_b / (n_a + n_b))
        return {
            "row_spread": a["row_spread"] + b["row_spread"],
            "column_spread": a["column_spread"] + b["column_spread"] + between,
            "column_means": means,
        }

    def _transformation_variance(self) -> Tensor:
        m = self.n_transformations
        mean = self.row_spread / self.n_samples
        return self._shaped(mean / (m - 1) if self.squared else mean)

    def _sample_variance(self) -> Tensor:
        variance = self.column_spread / (self.n_samples - 1)
        if self.squared:
            return self._shaped(variance[0] / self.n_transformations)
        return self._shaped(variance.sqrt().mean(0))

    def _undefined(self) -> Tensor:
        return self._shaped(torch.full_like(self.row_spread, torch.nan))


def _lost_in_float32(squares: Tensor, sums: Tensor) -> bool:
    """Whether squares left the range of float32: too large, or too small although the sums are not zero."""
    if squares.dtype != torch.float32:
        return False
    lost = ~squares.isfinite() | ((squares < SMALLEST_FLOAT32_SQUARE) & (sums != 0))
    return bool(lost.any())


class TransformationVariance(VarianceMeasure):
    r"""Transformation Variance (TV): how much an activation varies when a sample is transformed.

    The mean over samples of the variance over transformations (paper, section 2.4.1, eq. 2):

    .. math:: TV = \frac{1}{n} \sum_{i=1}^{n} \mathrm{Var}(\mathbf{ST}[i, :])

    where Var is the sample variance, with m − 1 in the denominator. It lies in ``[0, inf)``, in units of the activation
    squared. Lower is more invariant; 0 is invariant. Activations of different layers have different units: compare
    them with :class:`NormalizedVariance`.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``tv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``. NaN, with a warning, for fewer than two
      transformations.

    Args:
        squared: if false, the mean of the standard deviations instead of the variances, in units of the activation.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``squared`` is no bool, or blocks do not fit together.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import TransformationVariance
        >>> tv = TransformationVariance()
        >>> tv.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # 2 samples, 2 transformations, a scalar activation
        >>> tv.compute()
        tensor(1., dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The value of every activation."""
        return self._transformation_variance() if self._enough() else self._undefined()


class SampleVariance(VarianceMeasure):
    r"""Sample Variance (SV): how much an activation varies from sample to sample.

    The mean over transformations of the variance over samples (paper, section 2.4.2, eq. 3):

    .. math:: SV = \frac{1}{m} \sum_{j=1}^{m} \mathrm{Var}(\mathbf{ST}[:, j])

    where Var is the sample variance, with n − 1 in the denominator. It lies in ``[0, inf)``, in units of the activation
    squared. It says nothing of invariance by itself: it is the scale that :class:`NormalizedVariance` divides by.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``sv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``. NaN, with a warning, for fewer than two
      samples.

    Args:
        squared: if false, the mean of the standard deviations instead of the variances, in units of the activation.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``squared`` is no bool, or blocks do not fit together.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import SampleVariance
        >>> sv = SampleVariance()
        >>> sv.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # columns (1, 5) and (3, 5)
        >>> sv.compute()
        tensor(5., dtype=torch.float64)
    """

    higher_is_better = None

    def compute(self) -> Tensor:
        """The value of every activation."""
        return self._sample_variance() if self._enough(samples=2, transformations=1) else self._undefined()


class NormalizedVariance(VarianceMeasure):
    r"""Normalized Variance (NV): how much transformations matter against samples.

    Transformation variance over sample variance (paper, section 2.4.3, eq. 4):

    .. math:: NV = \frac{TV}{SV}, \qquad \frac{0}{0} = 1, \quad \frac{x}{0} = \infty

    It lies in ``[0, inf]`` and has no unit. Lower is more invariant: 0 is invariant; below 1, transformations change
    the activation less than samples do; 1 also marks dead activations, which never change; infinite are those that
    change with the transformation alone.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``nv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``. NaN, with a warning, for fewer than two
      samples or transformations.

    Args:
        squared: if false, the quotient of mean standard deviations instead of mean variances.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``squared`` is no bool, or blocks do not fit together.
        TypeError: If a block is not of a real floating-point type.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import NormalizedVariance
        >>> nv = NormalizedVariance()
        >>> nv.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))  # TV = 1, SV = 5
        >>> nv.compute()
        tensor(0.2000, dtype=torch.float64)
    """

    def compute(self) -> Tensor:
        """The value of every activation."""
        if not self._enough(samples=2):
            return self._undefined()
        return normalize(self._transformation_variance(), self._sample_variance())
