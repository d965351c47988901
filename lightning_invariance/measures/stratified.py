"""Stratified measures (paper, section 3): a measure of each class, and the mean over classes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_invariance.accumulators import ByClass, Context
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.base import Measure
from lightning_invariance.messages import check_int, given


class Stratified(Measure):
    """A measure of each class, and the mean over classes: invariance without the differences between classes.

    The stratified measure of the paper (section 3), with the ``labels`` of the samples, in one pass. The value is the
    mean over the classes for which the measure is defined, in the shape, range and direction of the measure;
    :meth:`per_class` returns the value of each class, as ``result.by_class`` of an evaluation does. A class with fewer
    than two samples is NaN, left out of the mean, and named in a warning.

    Args:
        measure: a :class:`Measure` of one pass, such as ``NormalizedVariance()``. It is copied.
        num_classes: number of classes.
        weighted: weight each class by its number of samples; by default all classes have equal weight.

    Raises:
        TypeError: If ``measure`` is no :class:`Measure`, or labels are not integers.
        ValueError: If ``num_classes`` is less than 1, the measure needs two passes, or labels are missing, out of range
            or not as many as samples.

    Example:
        >>> import torch
        >>> from lightning_invariance.measures import NormalizedVariance, Stratified
        >>> measure = Stratified(NormalizedVariance(), num_classes=2)
        >>> st = torch.tensor([[1.0, 3.0], [5.0, 5.0], [2.0, 2.0], [7.0, 7.0]])
        >>> measure.update(st, labels=torch.tensor([0, 0, 1, 1]))
        >>> measure.per_class()
        tensor([0.2000, 0.0000], dtype=torch.float64)
        >>> measure.compute()
        tensor(0.1000, dtype=torch.float64)
    """

    any_channel_axis = True
    least_samples, least_transformations = 2, 1

    _measure: tuple[Measure]

    def __init__(self, measure: Measure, num_classes: int, weighted: bool = False, **kwargs: Any) -> None:
        if not isinstance(measure, Measure):
            raise TypeError(f"Expected argument `measure` to be a measure of this package, but got {given(measure)}.")
        if measure.needs_again:
            raise ValueError(f"Expected argument `measure` to need one pass, but got {measure!r}.")
        check_int("num_classes", num_classes)
        super().__init__([ByClass(measure.needs, num_classes)], **kwargs)
        self.num_classes, self.weighted = num_classes, weighted
        self.is_ratio, self.unit = measure.is_ratio, measure.unit
        self._measure = (deepcopy(measure),)  # in a tuple, since states of a submodule would be saved and moved

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """Delegates to the wrapped measure."""
        return self._measure[0].higher_is_better

    @property
    def takes_any_channel_axis(self) -> bool:
        """Delegates to the wrapped measure."""
        return self._measure[0].takes_any_channel_axis and super().takes_any_channel_axis

    def update(  # type: ignore[override]  # labels are second: this measure always needs them
        self, st_block: Tensor, labels: Tensor | None = None, indices: Tensor | None = None
    ) -> None:
        """Add complete rows of the ST matrix; see :meth:`Measure.update`.

        Args:
            st_block: floating-point tensor ``(samples, transformations, *activation_shape)``.
            labels: ``(samples,)``, integers in ``[0, num_classes)``.
            indices: ``(samples,)``, integers that identify the samples.
        """
        super().update(st_block, indices=indices, labels=labels)

    def why_not(self, activation_shape: tuple[int, ...], channel_axis: int) -> str:
        """Delegates to the wrapped measure."""
        return self._measure[0].why_not(activation_shape, channel_axis)

    def prepare_for(self, context: Context) -> None:
        """Prepare the wrapped measure, too, as for the samples of one class."""
        super().prepare_for(context)
        self._measure[0].prepare_for(replace(context, n_samples=None, run=0))

    def per_class(self) -> Tensor:
        """The value of each class, ``(num_classes, *shape)``; NaN, with a warning, for fewer than two samples."""
        return self.by_class(self.sums())

    def value(self, sums: Sums) -> Tensor:
        """The mean over the classes whose value is not NaN."""
        values = self.by_class(sums)
        counts = sums["class_samples"].double()
        weight = counts if self.weighted else torch.ones_like(counts)
        weights = weight.view(-1, *[1] * (values.ndim - 1)).to(values.device) * ~values.isnan()
        weighted = torch.where(weights > 0, values * weights, 0.0)  # 0 · inf would be NaN
        return weighted.sum(0) / weights.sum(0)

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """Delegates to the wrapped measure."""
        return self._measure[0].value_shape(sums)

    def details(self, sums: Sums) -> dict[str, Tensor]:
        """The values of the classes."""
        return {"by_class": self.by_class(sums)}

    def by_class(self, sums: Sums) -> Tensor:
        """The value of each class; NaN, with a warning, for fewer than two samples."""
        measure, by_class = self._measure[0], ByClass(self._measure[0].needs, self.num_classes)
        nan = torch.full(measure.value_shape(sums), torch.nan, dtype=torch.float64)
        values, few = [], []
        for label, count in enumerate(sums["class_samples"].tolist()):
            if count < 2:
                few.append(f"{label} ({count})")
                values.append(nan)
                continue
            own = Sums(
                by_class.of_class(sums, label), count, sums.n_transformations, sums.activation_shape, sums.channel_axis
            )
            values.append(measure.evaluated(own).double())
        if few:
            rank_zero_warn(f"Stratified: classes with fewer than two samples are NaN: {', '.join(few)}.", UserWarning)
        device = next((value.device for value in values if value is not nan), nan.device)
        return torch.stack([value.to(device) for value in values])
