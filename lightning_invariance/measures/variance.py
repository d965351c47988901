"""Variance measures of invariance (paper, section 2.4), online: one pass over complete rows of the ST matrix."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.functional.variance import normalize
from lightning_invariance.measures.base import Measure, States
from lightning_invariance.measures.spread import exact_sums, plain_sums

#: Updates before which the references move to the means: often enough for the digits, rare enough for the time.
MOVE_REFERENCES = frozenset(4**power for power in range(1, 16))


class VarianceMeasure(Measure):
    r"""Shared update of the variance measures: squared deviations within the rows and columns of the ST matrix.

    For k activations and m transformations the states are ``n_samples``, ``row_spread`` (k,): the sum over rows of
    their squared deviations from the row mean, and two sets of sums that give the means and the spread of the columns:

    - of blocks whose sums float32 holds without losing digits, which is the rule: ``centres`` (k,), ``plain_squares``
      (k,), ``plain_firsts`` (k,), ``plain_sums`` (m, k) and their number of rows ``plain_samples``; see ``PlainSums``.
    - of the other blocks, such as those of float64 activations or with columns that are constant: ``references``
      (m, k), ``squares`` (1, k) and ``sums`` (m, k); see ``ExactSums``. They keep an invariant unit (TV = 0) and a
      division by zero (SV = 0) apart from small numbers.

    A set is empty as long as it is not needed: most layers hold (m + 4) k numbers. Where ``squared`` is false,
    ``row_spread`` is the sum of the rows' standard deviations, ``squares`` (m, k) is kept for each column, and the
    first set is not used.
    """

    row_spread: Tensor
    centres: Tensor
    plain_samples: Tensor
    plain_squares: Tensor
    plain_firsts: Tensor
    plain_sums: Tensor
    references: Tensor
    squares: Tensor
    sums: Tensor

    def __init__(self, squared: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(squared, bool):
            raise ValueError(f"Expected argument `squared` to be a bool, but got {squared!r}.")
        self.squared = squared
        vector, matrix = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        self._add_states(row_spread=vector, plain_samples=torch.tensor(0))
        self._add_states(references=matrix, squares=matrix, sums=matrix)
        if squared:
            # The names of states also tell collections of metrics which measures may share them.
            self._add_states(centres=vector, plain_squares=vector, plain_firsts=vector, plain_sums=matrix)

    @property
    def update_rule(self) -> Hashable:
        """The family shares its states; those of standard deviations are others."""
        return (VarianceMeasure, self.squared)

    @property
    def n_transformations(self) -> int:
        """Number of transformations m of the blocks so far; 0 before the first."""
        return max(len(self.plain_sums) if self.squared else 0, len(self.references))

    def dead(self) -> Tensor:
        """Which activations never changed, over all samples and transformations: bool of ``activation_shape``."""
        return self._shaped((self.row_spread == 0) & (self._column_spread() == 0).all(0))

    def _add(self, x: Tensor) -> None:
        row_spread = self._add_plain(x) if self.squared and self.row_spread.dtype == torch.float64 else None
        if row_spread is None:
            row_spread = self._add_exact(x)
        self.row_spread = self.row_spread + row_spread if self.row_spread.numel() else row_spread

    def _add_plain(self, x: Tensor) -> Tensor | None:
        centres = self.centres if self.centres.numel() else x[0, 0].to(self.row_spread.dtype)
        block = plain_sums(x, centres)
        if block is None:
            return None
        if not self.centres.numel():
            self.centres, self.plain_squares, self.plain_firsts = centres, block.squares, block.firsts
            self.plain_sums = block.sums.to(centres.dtype)
        else:
            self.plain_squares = self.plain_squares + block.squares
            self.plain_firsts = self.plain_firsts + block.firsts
            self.plain_sums = self.plain_sums + block.sums
        self.plain_samples = self.plain_samples + len(x)
        return block.row_spread

    def _add_exact(self, x: Tensor) -> Tensor:
        if not self.references.numel():
            self.references = x[0].to(self.row_spread.dtype, copy=True)
            block = exact_sums(x, self.references, self.squared)
            self.squares, self.sums = block.squares, block.sums
            return block.row_spread
        if self._update_count in MOVE_REFERENCES:
            # Squares about a reference far from the mean would cancel.
            n = self.n_samples - self.plain_samples
            moved = torch.add(self.references, self.sums / n).to(x.dtype).to(self.sums.dtype)  # as precise as x
            self.squares, self.sums = self._about(self.squares, self.sums, self.references - moved, n)
            self.references = moved
        block = exact_sums(x, self.references, self.squared)
        self.squares, self.sums = self.squares + block.squares, self.sums + block.sums
        return block.row_spread

    def _about(self, squares: Tensor, sums: Tensor, shift: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Squares and sums of n deviations that all grow by ``shift``."""
        grown = sums + n * shift
        return squares + self._over_columns(shift * (sums + grown)), grown

    def _over_columns(self, values: Tensor) -> Tensor:
        """Sum (transformations, activations) to the shape of ``squares``."""
        return values.sum(0, keepdim=True) if self.squared else values

    def _column_spread(self) -> Tensor:
        """Squared deviations from the column means: (1, k), or (m, k) where ``squared`` is false."""
        n_plain, n_exact = self.plain_samples, self.n_samples - self.plain_samples
        spread, means = [], []
        if self.squared and self.centres.numel():
            sums = self.plain_sums + self.plain_firsts
            spread.append((self.plain_squares - sums.square().sum(0) / n_plain).clamp_min_(0)[None])
            means.append(self.centres + sums / n_plain)
        if self.references.numel():
            spread.append((self.squares - self._over_columns(self.sums.square()) / n_exact).clamp_min_(0))
            means.append(self.references + self.sums / n_exact)
        if len(means) == 2:
            # Two sets of rows with different means (Chan, Golub and LeVeque 1983, the paper's reference 20).
            between = self._over_columns((means[0] - means[1]).square())
            return spread[0] + spread[1] + between * (n_plain * n_exact / self.n_samples.to(between.dtype))
        return spread[0]

    def _merge(self, a: States, b: States) -> States:
        plain = self._merge_plain(a, b) if self.squared else {}
        samples = {"plain_samples": a["plain_samples"] + b["plain_samples"]}
        return {"row_spread": a["row_spread"] + b["row_spread"], **samples, **plain, **self._merge_exact(a, b)}

    def _merge_plain(self, a: States, b: States) -> States:
        names = ("centres", "plain_squares", "plain_firsts", "plain_sums")
        if not a["centres"].numel() or not b["centres"].numel():
            return {name: (a if a["centres"].numel() else b)[name] for name in names}
        m, n, shift = len(b["plain_sums"]), b["plain_samples"], b["centres"] - a["centres"]
        total = b["plain_sums"].sum(0) + m * b["plain_firsts"]
        return {
            "centres": a["centres"],
            "plain_squares": a["plain_squares"] + b["plain_squares"] + shift * (2 * total + n * m * shift),
            "plain_firsts": a["plain_firsts"] + b["plain_firsts"] + n * shift,
            "plain_sums": a["plain_sums"] + b["plain_sums"],
        }

    def _merge_exact(self, a: States, b: States) -> States:
        names = ("references", "squares", "sums")
        if not a["references"].numel() or not b["references"].numel():
            return {name: (a if a["references"].numel() else b)[name] for name in names}
        shift = b["references"] - a["references"]
        squares, sums = self._about(b["squares"], b["sums"], shift, b["n_samples"] - b["plain_samples"])
        return {"references": a["references"], "squares": a["squares"] + squares, "sums": a["sums"] + sums}

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
