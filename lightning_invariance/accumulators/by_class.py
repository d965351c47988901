"""Separate sums for each class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.layer_state import merged
from lightning_invariance.accumulators.rows import N_SAMPLES, Context, Rows, States


@dataclass(frozen=True)
class ByClass(Accumulator):
    """The states of other accumulators once for each class, and ``class_samples`` ``(num_classes,)``.

    The state ``name`` of class 3 is called ``class_3_name``.

    Attributes:
        inner: the other accumulators, whose states have different names.
        num_classes: number of classes.
    """

    inner: tuple[Accumulator, ...]
    num_classes: int

    any_channel_axis = True

    @property
    def cpu_states(self) -> tuple[str, ...]:  # type: ignore[override]
        """The CPU states of all classes, and the numbers of samples."""
        inner = [state for accumulator in self.inner for state in accumulator.cpu_states]
        return ("class_samples", *(_name(c, state) for c in range(self.num_classes) for state in inner))

    def empty(self) -> States:
        """The states before the first row."""
        empty = {"class_samples": torch.zeros(self.num_classes, dtype=torch.long)}
        for label in range(self.num_classes):  # tensors of its own, which `add` may change in place
            for accumulator in self.inner:
                empty.update({_name(label, state): value for state, value in accumulator.empty().items()})
        return empty

    def add(self, states: States, rows: Rows) -> None:
        """Add each row to the states of its class."""
        labels, counts = self._labels_of(rows), states["class_samples"]
        for label in sorted(set(labels.tolist())):
            some = rows.some((labels == label).nonzero().flatten(), int(counts[label]))
            own = self.of_class(states, label)
            for accumulator in self.inner:
                accumulator.add(own, some)
                states.update({_name(label, name): own[name] for name in accumulator.empty()})
        states["class_samples"] = counts + labels.bincount(minlength=self.num_classes)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        states: States = {"class_samples": a["class_samples"] + b["class_samples"]}
        for label in range(self.num_classes):
            own, other = self.of_class(a, label), self.of_class(b, label)
            for accumulator in self.inner:
                found = merged(accumulator, own, other)
                states.update({_name(label, name): found[name] for name in accumulator.empty()})
        return states

    def prepared(self, context: Context) -> Accumulator:
        """Prepare the inner accumulators, without the number and order of samples, unknown for a single class."""
        context = replace(context, n_samples=None, run=0)
        return replace(self, inner=tuple(accumulator.prepared(context) for accumulator in self.inner))

    def includes(self, other: Accumulator) -> bool:
        """Whether its inner accumulators include all inner accumulators of the other."""
        return (
            isinstance(other, ByClass)
            and self.num_classes == other.num_classes
            and all(any(own.includes(inner) for own in self.inner) for inner in other.inner)
        )

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Whether all inner accumulators apply."""
        return all(accumulator.applies_to(activation_shape) for accumulator in self.inner)

    def why_not(self, activation_shape: tuple[int, ...], channel_axis: int) -> str:
        """The reason of the first inner accumulator that has one."""
        return next(filter(None, (each.why_not(activation_shape, channel_axis) for each in self.inner)), "")

    def of_class(self, states: Mapping[str, Tensor], label: int) -> States:
        """The states of the inner accumulators for one class, with its number of samples."""
        inner = [state for accumulator in self.inner for state in accumulator.empty()]
        return {N_SAMPLES: states["class_samples"][label], **{name: states[_name(label, name)] for name in inner}}

    def _labels_of(self, rows: Rows) -> Tensor:
        """The labels, on the CPU.

        Raises:
            ValueError: If labels are missing, out of range, or not one for each row.
            TypeError: If labels are not integers.
        """
        labels = rows.labels
        if labels is None:
            raise ValueError(
                "Expected argument `labels`, the class of each sample, but got None: each sample must come with a whole"
                " number, as (x, y) or in a dict under `label`; one-hot and floating-point labels are none."
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"Expected argument `labels` to hold integers, but got {labels.dtype}.")
        n = len(rows.values)
        if labels.shape != (n,):
            raise ValueError(f"Expected argument `labels` of shape ({n},), but got {tuple(labels.shape)}.")
        if "labels" not in rows.block_memo:
            rows.block_memo["labels"] = labels.cpu()  # synchronises, once for all layers
        classes: Tensor = rows.block_memo["labels"]
        if n and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
            raise ValueError(
                f"Expected argument `labels` to be in [0, {self.num_classes}), but got values from {int(classes.min())}"
                f" to {int(classes.max())}."
            )
        return classes


def _name(label: int, state: str) -> str:
    return f"class_{label}_{state}"
