"""The sums of each class by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_invariance.accumulators.base import N_SAMPLES, Accumulator, Context, Rows, States, merged


@dataclass(frozen=True)
class ByClass(Accumulator):
    """The states of other accumulators once for each class, and ``class_samples`` ``(num_classes,)``.

    The state ``name`` of class 3 is called ``class_3_name``.

    Attributes:
        inner: the other accumulators, whose states have different names.
        num_classes: how many classes there are.
    """

    inner: tuple[Accumulator, ...]
    num_classes: int

    any_channel_axis = True

    @property
    def cpu_states(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of all classes, and the numbers of samples."""
        inner = [state for accumulator in self.inner for state in accumulator.cpu_states]
        return ("class_samples", *(_name(c, state) for c in range(self.num_classes) for state in inner))

    def empty(self) -> States:
        """The states before the first row."""
        inner = [item for accumulator in self.inner for item in accumulator.empty().items()]
        empty = {_name(c, state): value for c in range(self.num_classes) for state, value in inner}
        return {"class_samples": torch.zeros(self.num_classes, dtype=torch.long), **empty}

    def add(self, states: States, rows: Rows) -> None:
        """Add rows to the states of their classes."""
        for label, accumulator, some in self._parts(states, rows):
            own = _own(states, label, accumulator)
            accumulator.add(own, some)
            _set(states, label, accumulator, own)
        states["class_samples"] = states["class_samples"] + self._counts(rows)

    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both."""
        states: States = {"class_samples": a["class_samples"] + b["class_samples"]}
        for label in range(self.num_classes):
            for accumulator in self.inner:
                parts = (_own(each, label, accumulator) for each in (a, b))
                _set(states, label, accumulator, merged(accumulator, *parts))
        return states

    def prepared(self, context: Context) -> Accumulator:
        """With the inner ones prepared; how many samples a class will have, and in which order, is not known."""
        context = replace(context, n_samples=None, run=0)
        return replace(self, inner=tuple(accumulator.prepared(context) for accumulator in self.inner))

    def includes(self, other: Accumulator) -> bool:
        """Whether its inner ones include all of the other's."""
        return (
            isinstance(other, ByClass)
            and self.num_classes == other.num_classes
            and all(any(own.includes(inner) for own in self.inner) for inner in other.inner)
        )

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Whether all inner ones do."""
        return all(accumulator.applies_to(activation_shape) for accumulator in self.inner)

    def of_class(self, states: Mapping[str, Tensor], label: int) -> States:
        """The states of the inner accumulators for one class."""
        inner = [state for accumulator in self.inner for state in accumulator.empty()]
        return {N_SAMPLES: states["class_samples"][label], **{name: states[_name(label, name)] for name in inner}}

    def _parts(self, states: States, rows: Rows) -> Iterator[tuple[int, Accumulator, Rows]]:
        """Each class that occurs, with each accumulator and the rows of the class."""
        labels = self._checked(rows)
        for label in sorted(set(labels.tolist())):
            some = rows.some((labels == label).nonzero().flatten(), int(states["class_samples"][label]))
            yield from ((label, accumulator, some) for accumulator in self.inner)

    def _counts(self, rows: Rows) -> Tensor:
        return self._checked(rows).bincount(minlength=self.num_classes)

    def _checked(self, rows: Rows) -> Tensor:
        """The labels, on the CPU.

        Raises:
            ValueError: If labels are missing, of another number than the rows, or out of range.
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


def _own(states: States, label: int, accumulator: Accumulator) -> States:
    """The states of an accumulator for one class."""
    own = {name: states[_name(label, name)] for name in accumulator.empty()}
    return {**own, N_SAMPLES: states["class_samples"][label]}


def _set(states: States, label: int, accumulator: Accumulator, own: States) -> None:
    states.update({_name(label, name): own[name] for name in accumulator.empty()})


def _name(label: int, state: str) -> str:
    """The name of a state of one class."""
    return f"class_{label}_{state}"
