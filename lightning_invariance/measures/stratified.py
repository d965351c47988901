"""A measure for each class, in one pass."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_invariance.measures.base import Measure, States
from lightning_invariance.transforms import TransformationSet


class Stratified(Measure):
    r"""A measure of each class by itself, and their mean: invariance without the differences between classes.

    The stratified measure of the paper (section 3), for all classes in one pass, by the labels that come with the
    samples.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      floating point, ``(samples, transformations, *activation_shape)``.
    - ``labels`` (:class:`~torch.Tensor`): the class of each sample, integers in ``[0, num_classes)``, ``(samples,)``.

    As output of ``forward`` and ``compute`` the metric returns

    - ``stratified`` (:class:`~torch.Tensor`): float64 tensor of the shape of the measure: the mean of the classes for
      which the measure is defined. :meth:`per_class` gives the single values.

    A class with too few samples for the measure is NaN, left out of the mean, and named in a warning.

    Args:
        measure: of this package, with one pass, such as ``NormalizedVariance()``. It is copied.
        num_classes: how many classes there are.
        weighted: weigh each class by its number of samples; by default all classes count the same.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        TypeError: If ``measure`` is no :class:`Measure`, or labels are not integers.
        ValueError: If ``num_classes`` is too small, the measure needs two passes, labels are missing, of another number
            than the samples or out of range, or blocks do not fit together.

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

    class_samples: Tensor
    _measure: tuple[Measure]

    def __init__(self, measure: Measure, num_classes: int, weighted: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(measure, Measure):
            raise TypeError(f"Expected argument `measure` to be a measure of this package, but got {measure!r}.")
        if measure.passes > 1:
            raise ValueError(f"Expected argument `measure` to need one pass, but got {measure!r}.")
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"Expected argument `num_classes` to be an int larger than 0, but got {num_classes}.")
        self.num_classes, self.weighted = num_classes, weighted
        # In a tuple, so that it is no submodule: its states are those of one class at a time, lent from here.
        self._measure = (deepcopy(measure),)
        self._add_states(class_samples=torch.zeros(num_classes, dtype=torch.long))
        of_classes = (_name(label, state) for label in range(num_classes) for state in measure.read_states)
        self.read_states = (*self.read_states, "class_samples", *of_classes)
        for label in range(num_classes):
            empty = {_name(label, state): torch.as_tensor(value) for state, value in measure._defaults.items()}
            self._add_states(**empty)

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """Shared by measures that share the states of a class."""
        return frozenset((Stratified, self.num_classes, part) for part in self._measure[0].update_rule)

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """That of the measure."""
        return self._measure[0].higher_is_better

    def prepare(
        self, transformations: TransformationSet, input_shape: Sequence[int], n_samples: int | None = None
    ) -> None:
        """Tell the measure."""
        self._measure[0].prepare(transformations, input_shape)

    def applies_to(self, activation_shape: Sequence[int]) -> bool:
        """Whether the measure does."""
        return self._measure[0].applies_to(activation_shape)

    def update(self, st_block: Tensor, labels: Tensor | None = None, indices: Tensor | None = None) -> None:
        """Add complete rows of the ST matrix.

        Args:
            st_block: floating-point tensor ``(samples, transformations, *activation_shape)``.
            labels: ``(samples,)``, integers in ``[0, num_classes)``.
            indices: ``(samples,)``: whole numbers that name the samples, for measures that use them.

        Raises:
            ValueError: If labels are missing, of another number or out of range, or the block does not fit.
            TypeError: If labels are not integers, or the block is not of a real floating-point type.
        """
        if labels is None:
            raise ValueError("Expected argument `labels`, the class of each sample, but got None.")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"Expected argument `labels` to hold integers, but got {labels.dtype}.")
        if labels.shape != st_block.shape[:1]:
            raise ValueError(f"Expected argument `labels` of shape ({len(st_block)},), but got {tuple(labels.shape)}.")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"Expected argument `labels` to be in [0, {self.num_classes}), but got values from {int(labels.min())}"
                f" to {int(labels.max())}."
            )
        self._update(st_block, labels=labels, **({} if indices is None else {"indices": indices}))

    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        labels = of_rows.pop("labels").cpu()
        shape = self.activation_shape.tolist()
        for label in set(labels.tolist()):
            rows = (labels == label).nonzero().flatten()
            measure = self._lend(label)
            about = measure._filter_kwargs(**{name: values[rows] for name, values in of_rows.items()})
            some = x[rows.to(x.device, non_blocking=True)]
            measure.update(some.reshape(-1, x.shape[1], *shape), **about)
            for state in measure._defaults:
                setattr(self, _name(label, state), getattr(measure, state))
        self.class_samples = self.class_samples + labels.bincount(minlength=self.num_classes)

    def _lend(self, label: int) -> Measure:
        """The measure with the states of one class."""
        measure = self._measure[0]
        for state in measure._defaults:
            setattr(measure, state, getattr(self, _name(label, state)))
        measure._computed = None
        measure._to_sync = False
        return measure

    def per_class(self) -> Tensor:
        """The value of each class: ``(num_classes, *shape)``; NaN, with a warning, for one with too few samples."""
        values: list[Tensor | None] = []
        few = []
        for label in range(self.num_classes):
            if int(self.class_samples[label]) < 2:
                few.append(label)
                values.append(None)
            else:
                measure = self._lend(label)
                measure._update_count = max(1, measure._update_count)
                values.append(measure.compute())
        if few:
            counts = ", ".join(f"{label} ({int(self.class_samples[label])})" for label in few)
            rank_zero_warn(f"Stratified: classes with fewer than two samples are NaN: {counts}.", UserWarning)
        shape = next((value.shape for value in values if value is not None), self._shape_of_all())
        nan = torch.full(shape, torch.nan, dtype=torch.float64, device=self.device)
        return torch.stack([nan if value is None else value.double() for value in values])

    def compute(self) -> Tensor:
        """The mean over the classes for which the measure is defined."""
        values = self.per_class()
        weight = self.class_samples.double() if self.weighted else torch.ones_like(self.class_samples).double()
        weights = weight.view(-1, *[1] * (values.ndim - 1)).to(values.device) * ~values.isnan()
        # A class of weight 0 shall not make 0 · inf.
        weighed = torch.where(weights > 0, values * weights, 0.0)
        return weighed.sum(0) / weights.sum(0)

    def _shape_of_all(self) -> torch.Size:
        return torch.Size(self.activation_shape.tolist())

    def _merge(self, a: States, b: States) -> States:
        merged: States = {"class_samples": a["class_samples"] + b["class_samples"]}
        names = self._measure[0]._defaults
        for label in range(self.num_classes):
            parts = [{state: states[_name(label, state)] for state in names} for states in (a, b)]
            merged.update({_name(label, s): value for s, value in self._measure[0]._merged(*parts).items()})
        return merged


def _name(label: int, state: str) -> str:
    """The name of a state of one class."""
    return f"class_{label}_{state}"
