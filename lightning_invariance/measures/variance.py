"""Variance measures of invariance (paper, section 2.4), online: one pass over complete rows of the ST matrix."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.functional.variance import normalize
from lightning_invariance.measures.base import Measure, States

#: Values that are processed at once, so that the intermediate results stay in the processor's cache.
CHUNK = 2**20

#: Longer sums than this are taken in float64.
LONGEST_FLOAT32_SUM = 256

#: Sums of squares below this lose digits in float32, whose smallest normal number is about 1e-38.
SMALLEST_FLOAT32_SQUARE = 1e-30


class VarianceMeasure(Measure):
    r"""Shared update of the variance measures: squared deviations within the rows and columns of the ST matrix.

    The states, for k activations and m transformations, are ``n_samples``; ``row_spread`` (k,), the sum over rows of
    their squared deviations from the row mean; and for the columns their deviations from a reference, which is the
    first row at first: ``references`` (m, k), ``column_sums`` (m, k), and ``column_squares`` (1, k), summed over the
    columns. The two of shape (m, k) have the type of the activations, the others are float64. Where ``squared`` is
    false, ``row_spread`` is the sum of the rows' standard deviations, and ``column_squares`` (m, k) has a row for each
    column.

    Rows are centred on their first value, columns on the reference, which moves to the mean now and then. So the sums
    stay exact when the mean is large against the spread, and are exactly zero where a row or a column is constant,
    which keeps an invariant unit (TV = 0) and a division by zero (SV = 0) apart from small numbers.
    """

    row_spread: Tensor
    column_squares: Tensor
    column_sums: Tensor
    references: Tensor

    def __init__(self, squared: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(squared, bool):
            raise ValueError(f"Expected argument `squared` to be a bool, but got {squared!r}.")
        self.squared = squared
        self._add_states(
            row_spread=torch.zeros(0, dtype=torch.float64),
            column_squares=torch.zeros(0, 0, dtype=torch.float64),
            column_sums=torch.zeros(0, 0, dtype=torch.float64),
            references=torch.zeros(0, 0, dtype=torch.float64),
        )

    @property
    def update_rule(self) -> Hashable:
        """The family shares its states; those of standard deviations are others."""
        return (VarianceMeasure, self.squared)

    @property
    def n_transformations(self) -> int:
        """Number of transformations m of the blocks so far; 0 before the first."""
        return len(self.references)

    def dead(self) -> Tensor:
        """Which activations never changed, over all samples and transformations: bool of ``activation_shape``."""
        return self._shaped((self.row_spread == 0) & (self._column_spread() == 0).all(0))

    def _add(self, x: Tensor) -> None:
        m, k = x.shape[1:]
        if self.n_transformations == 0:
            self.row_spread = x.new_zeros(k, dtype=self.row_spread.dtype)
            self.column_squares = x.new_zeros(1 if self.squared else m, k, dtype=self.column_squares.dtype)
            self.column_sums = x.new_zeros(m, k)
            self.references = x[0].clone()
        elif self._update_count & (self._update_count - 1) == 0:  # at every doubling: often enough, and cheap
            self._move_references()
        x = x.to(torch.promote_types(x.dtype, self.references.dtype))
        if x.dtype == torch.float32 and max(x.shape[:2]) > LONGEST_FLOAT32_SUM:
            x = x.double()
        row_sums, row_squares, column_sums, column_squares = sums = self._sums(x)
        if x.dtype == torch.float32 and _lost_in_float32(*sums):
            row_sums, row_squares, column_sums, column_squares = self._sums(x.double())
        row = torch.sub(row_squares, row_sums.to(self.row_spread.dtype).square_(), alpha=1 / m).clamp_min_(0)
        if not self.squared:
            row = row.div_(m - 1).sqrt_()
        self.row_spread = self.row_spread + row.sum(0)
        self.column_squares = self.column_squares + column_squares
        self.column_sums = torch.add(self.column_sums, column_sums).to(self.references.dtype)

    def _sums(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums and squares of the deviations of rows (n, k) and of columns (m, k) from their references."""
        n, m, k = x.shape
        row_sums, row_squares = x.new_empty(n, k), x.new_empty(n, k)
        column_sums, column_squares = x.new_empty(m, k), x.new_empty(1 if self.squared else m, k)
        step = max(1, CHUNK // (n * m))
        for start in range(0, k, step):
            part = slice(start, start + step)
            values = x[:, :, part]
            deviation = torch.sub(values, values[:, :1], out=scratch(values))
            torch.sum(deviation, 1, out=row_sums[:, part])
            torch.sum(torch.mul(deviation, deviation, out=deviation), 1, out=row_squares[:, part])
            torch.sub(values, self.references[:, part].to(x.dtype), out=deviation)
            torch.sum(deviation, 0, out=column_sums[:, part])
            torch.mul(deviation, deviation, out=deviation)
            if self.squared:
                torch.sum(deviation.view(n * m, -1), 0, out=column_squares[0, part])
            else:
                torch.sum(deviation, 0, out=column_squares[:, part])
        return row_sums, row_squares, column_sums, column_squares

    def _move_references(self) -> None:
        """Centre the columns on their means so far: squares about a far reference would cancel."""
        n, dtype = self.n_samples, self.row_spread.dtype
        moved = torch.add(self.references, self.column_sums / n)
        shift = moved.to(dtype) - self.references
        self.column_squares, self.column_sums = self._about(
            self.column_squares, self.column_sums, shift.neg_(), n, self.references.dtype
        )
        self.references = moved

    def _about(
        self, squares: Tensor, sums: Tensor, shift: Tensor, n: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Squares and sums of n deviations that all grow by ``shift``."""
        grown = torch.add(sums, n * shift)
        return squares + self._over_columns(shift * (sums + grown)), grown.to(dtype)

    def _over_columns(self, values: Tensor) -> Tensor:
        """Sum (transformations, activations) to the shape of ``column_squares``."""
        return values.sum(0, keepdim=True) if self.squared else values

    def _column_spread(self) -> Tensor:
        """Squared deviations from the column means."""
        excess = self.column_sums.to(self.column_squares.dtype).square_()
        return (self.column_squares - self._over_columns(excess) / self.n_samples).clamp_min_(0)

    def _merge(self, a: States, b: States) -> States:
        dtype = torch.promote_types(a["references"].dtype, b["references"].dtype)
        shift = b["references"].to(a["row_spread"].dtype) - a["references"]
        squares, sums = self._about(b["column_squares"], b["column_sums"], shift, b["n_samples"], dtype)
        return {
            "row_spread": a["row_spread"] + b["row_spread"],
            "column_squares": a["column_squares"] + squares,
            "column_sums": a["column_sums"] + sums,
            "references": a["references"].to(dtype),
        }

    def _transformation_variance(self) -> Tensor:
        m = self.n_transformations
        mean = self.row_spread / self.n_samples
        return self._shaped(mean / (m - 1) if self.squared else mean)

    def _sample_variance(self) -> Tensor:
        variance = self._column_spread() / (self.n_samples - 1)
        if self.squared:
            return self._shaped(variance[0] / self.n_transformations)
        return self._shaped(variance.sqrt().mean(0))

    def _undefined(self) -> Tensor:
        return self._shaped(torch.full_like(self.row_spread, torch.nan))


def _lost_in_float32(row_sums: Tensor, row_squares: Tensor, column_sums: Tensor, column_squares: Tensor) -> bool:
    """Whether squares left the range of float32: too large, or too small although the sums are not zero."""
    for sums, squares in ((row_sums, row_squares), (column_sums, column_squares)):
        if not math.isfinite(squares.sum()):
            return True
        if squares.min() < SMALLEST_FLOAT32_SQUARE:
            small = squares.amax(0) < SMALLEST_FLOAT32_SQUARE
            if bool((small & (sums != 0).any(0)).any()):
                return True
    return False


_scratch = threading.local()


def scratch(like: Tensor) -> Tensor:
    """A buffer for intermediate results, the same memory at every call: fresh pages cost more than the arithmetic."""
    if like.device.type != "cpu":  # whose allocator keeps its memory
        return torch.empty_like(like)
    buffers: dict[torch.dtype, Tensor] = _scratch.__dict__.setdefault("buffers", {})
    if like.dtype not in buffers or buffers[like.dtype].numel() < like.numel():
        buffers[like.dtype] = torch.empty(max(CHUNK, like.numel()), dtype=like.dtype)
    return buffers[like.dtype][: like.numel()].view(like.shape)


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
