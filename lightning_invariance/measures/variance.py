"""Variance measures of invariance (paper, section 2.4), online: one pass over complete rows of the ST matrix."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.functional.variance import aggregate_maps, normalize
from lightning_invariance.measures.base import Measure, States
from lightning_invariance.measures.spread import PlainSums, exact_sums, plain_sums

#: Updates before which the references move to the means: often enough for the digits, rare enough for the time.
MOVE_REFERENCES = frozenset(4**power for power in range(1, 16))

#: How the values of a feature map can be made one.
AGGREGATES = (None, "mean", "max", "sum")

#: The states of the plain set, and those of the exact set.
PLAIN = ("plain_samples", "centres", "plain_moments", "plain_columns")
EXACT = ("exact_samples", "row_spread", "references", "squares", "sums")


class VarianceMeasure(Measure):
    r"""Shared update of the variance measures: squared deviations within the rows and columns of the ST matrix.

    For k activations and m transformations the states are two sets of sums:

    - of blocks whose sums float32 holds without losing digits, which is the rule: ``centres`` (k,), ``plain_moments``
      (3, k), ``plain_columns`` (m, k) in float32; see ``PlainSums``.
    - of the other blocks, such as those of float64 activations or with rows or columns that are constant:
      ``row_spread`` (k,): the sum over rows of their squared deviations from the row mean, ``references`` (m, k),
      ``squares`` (1, k) and ``sums`` (m, k); see ``ExactSums``. They keep an invariant unit (TV = 0) and a division by
      zero (SV = 0) apart from small numbers.

    A set is empty as long as it is not needed: most layers hold (m + 4) k numbers. Where ``squared`` is false,
    ``row_spread`` is the sum of the rows' standard deviations, ``squares`` (m, k) is kept for each column, and the
    first set is not used.
    """

    plain_samples: Tensor
    centres: Tensor
    plain_moments: Tensor
    plain_columns: Tensor
    exact_samples: Tensor
    row_spread: Tensor
    references: Tensor
    squares: Tensor
    sums: Tensor

    def __init__(self, squared: bool = True, aggregate: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(squared, bool):
            raise ValueError(f"Expected argument `squared` to be a bool, but got {squared!r}.")
        if aggregate not in AGGREGATES:
            raise ValueError(f"Expected argument `aggregate` to be one of {AGGREGATES}, but got {aggregate!r}.")
        self.squared, self.aggregate = squared, aggregate
        vector, matrix = torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        self._add_states(exact_samples=torch.tensor(0), row_spread=vector)
        self._add_states(references=matrix, squares=matrix, sums=matrix)
        if squared:
            # The names of states also tell collections of metrics which measures may share them.
            self._add_states(plain_samples=torch.tensor(0), centres=vector, plain_moments=matrix)
            # The column sums, much the largest state, are sums of float32 deviations and stay float32.
            self._add_states(plain_columns=matrix.float())

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """The family shares its states; those of standard deviations are others."""
        return frozenset([(VarianceMeasure, self.squared)])

    def dead(self) -> Tensor | None:
        """Which activations never changed, over all samples and transformations: bool of ``activation_shape``."""
        return self._shaped((self._row_spread() == 0) & (self._column_spread() == 0).all(0))

    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        # A device without float64 has only the exact way.
        if not (self.squared and self.row_spread.dtype == torch.float64 and self._add_plain(x)):
            self._add_exact(x)

    def _plain(self) -> PlainSums:
        return PlainSums(self.plain_moments, self.plain_columns)

    def _add_plain(self, x: Tensor) -> bool:
        """Add rows to the plain set, and say whether it holds them."""
        n, sums, centres = int(self.plain_samples), self._plain(), self.centres if self.plain_samples else x[0, 0]
        block = plain_sums(x, centres.to(x.dtype))
        if block is None:
            return False
        if n:
            sums = sums.plus(block)
        else:
            sums = PlainSums(block.moments.to(self.plain_moments.dtype), block.columns.clone())
            centres = centres.to(sums.moments.dtype)
        n += len(x)
        if n == len(x) or self._update_count in MOVE_REFERENCES:
            # Squares about a centre far from the mean would cancel. A constant activation stays exactly at its centre.
            moved = (centres + sums.moments[2] / (n * x.shape[1])).to(x.dtype).to(centres.dtype)  # as precise as x
            sums, centres = sums.about(centres - moved, n), moved
        if not sums.hold_digits(n):
            return False
        self.centres, self.plain_samples = centres, self.plain_samples + len(x)
        self.plain_moments, self.plain_columns = sums
        return True

    def _add_exact(self, x: Tensor) -> None:
        if not self.references.numel():
            self.references = x[0].to(self.row_spread.dtype, copy=True)
            self.row_spread, self.squares, self.sums = exact_sums(x, self.references, self.squared)
        else:
            if self._update_count in MOVE_REFERENCES:
                n = self.exact_samples
                moved = torch.add(self.references, self.sums / n).to(x.dtype).to(self.sums.dtype)
                self.squares, self.sums = self._about(self.squares, self.sums, self.references - moved, n)
                self.references = moved
            block = exact_sums(x, self.references, self.squared)
            self.row_spread = self.row_spread + block.row_spread
            self.squares, self.sums = self.squares + block.squares, self.sums + block.sums
        self.exact_samples = self.exact_samples + len(x)

    def _about(self, squares: Tensor, sums: Tensor, shift: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Squares and sums of n deviations that all grow by ``shift``."""
        grown = sums + n * shift
        return squares + self._over_columns(shift * (sums + grown)), grown

    def _over_columns(self, values: Tensor) -> Tensor:
        """Sum (transformations, activations) to the shape of ``squares``."""
        return values.sum(0, keepdim=True) if self.squared else values

    def _row_spread(self) -> Tensor:
        """Squared deviations from the row means, or the sum of the rows' standard deviations: (k,)."""
        if not self.squared or not self.centres.numel():
            return self.row_spread
        plain = self._plain().row_spread()
        return plain + self.row_spread if self.references.numel() else plain

    def _column_spread(self) -> Tensor:
        """Squared deviations from the column means: (1, k), or (m, k) where ``squared`` is false."""
        return self._columns_joined()[0]

    def _columns_joined(self) -> tuple[Tensor, Tensor]:
        """Squared deviations from the column means, and the column means (m, k), of both sets of rows."""
        found = []
        if self.squared and self.centres.numel():
            n_plain = self.plain_samples
            spread = self._plain().column_spread(n_plain)[None]
            found.append((n_plain, spread, self.centres + self.plain_columns / n_plain))
        if self.references.numel():
            n_exact = self.exact_samples
            spread = (self.squares - self._over_columns(self.sums.square()) / n_exact).clamp_min_(0)
            found.append((n_exact, spread, self.references + self.sums / n_exact))
        if len(found) == 1:
            return found[0][1:]
        # Two sets of rows with different means (Chan, Golub and LeVeque 1983, the paper's reference 20).
        (n_a, spread_a, means_a), (n_b, spread_b, means_b) = found
        part = n_b / self.n_samples.to(means_b.dtype)
        between = self._over_columns((means_a - means_b).square()) * (n_a * part)
        return spread_a + spread_b + between, means_a + (means_b - means_a) * part

    def _merge(self, a: States, b: States) -> States:
        plain = self._merge_plain(a, b) if self.squared else {}
        return {**plain, **self._merge_exact(a, b)}

    def _merge_plain(self, a: States, b: States) -> States:
        if not a["centres"].numel() or not b["centres"].numel():
            return {name: (a if a["centres"].numel() else b)[name] for name in PLAIN}
        first, second = (PlainSums(*(states[name] for name in PLAIN[2:])) for states in (a, b))
        merged = first.plus(second.about(b["centres"] - a["centres"], b["plain_samples"]))
        samples = a["plain_samples"] + b["plain_samples"]
        return dict(zip(PLAIN, (samples, a["centres"], *merged), strict=True))

    def _merge_exact(self, a: States, b: States) -> States:
        if not a["references"].numel() or not b["references"].numel():
            return {name: (a if a["references"].numel() else b)[name] for name in EXACT}
        shift, n = b["references"] - a["references"], b["exact_samples"]
        squares, sums = self._about(b["squares"], b["sums"], shift, n)
        return {
            "exact_samples": a["exact_samples"] + n,
            "row_spread": a["row_spread"] + b["row_spread"],
            "references": a["references"],
            "squares": a["squares"] + squares,
            "sums": a["sums"] + sums,
        }

    def _transformation_variance(self) -> Tensor:
        m = self.n_transformations
        mean = self._row_spread() / self.n_samples
        return self._shaped(mean / (m - 1) if self.squared else mean)

    def _sample_variance(self) -> Tensor:
        variance = self._column_spread() / (self.n_samples - 1)
        if self.squared:
            return self._shaped(variance[0] / self.n_transformations)
        return self._shaped(variance.sqrt().mean(0))

    def _aggregated(self, values: Tensor) -> Tensor:
        return aggregate_maps(values, self.aggregate)

    def _undefined(self) -> Tensor:
        return torch.full(self.activation_shape.tolist(), torch.nan, dtype=torch.float64, device=self.device)


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

    - ``tv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` with ``aggregate``.
      NaN, with a warning, for fewer than two transformations.

    Args:
        squared: if false, the mean of the standard deviations instead of the variances, in units of the activation.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, or blocks do not fit together.
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
        return self._aggregated(self._transformation_variance() if self._enough() else self._undefined())


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

    - ``sv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` with ``aggregate``.
      NaN, with a warning, for fewer than two samples.

    Args:
        squared: if false, the mean of the standard deviations instead of the variances, in units of the activation.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map gives one value for each channel.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, or blocks do not fit together.
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
        enough = self._enough(samples=2, transformations=1)
        return self._aggregated(self._sample_variance() if enough else self._undefined())


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

    - ``nv`` (:class:`~torch.Tensor`): float64 tensor of ``activation_shape``, or ``(channels,)`` with ``aggregate``.
      NaN, with a warning, for fewer than two samples or transformations.

    Args:
        squared: if false, the quotient of mean standard deviations instead of mean variances.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the feature map, of both variances before the quotient, gives
            one value for each channel. The paper takes the quotient of every activation first, as the default does.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is out of its range, or blocks do not fit together.
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
            return self._aggregated(self._undefined())
        return normalize(self._aggregated(self._transformation_variance()), self._aggregated(self._sample_variance()))
