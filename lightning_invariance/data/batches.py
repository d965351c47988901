"""Find inputs and labels in batches of any structure; select and concatenate their samples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.model.outputs import all_tensors_of

#: Keys under which a dict may hold the input, and the label.
INPUT_KEYS = ("image", "images", "img", "x", "input", "inputs", "pixel_values", "data", "input_ids")
LABEL_KEYS = ("label", "labels", "y", "target", "targets", "class")


@dataclass(frozen=True)
class Samples:
    """Some samples of a batch.

    Attributes:
        inputs: ``(n, *input_shape)``.
        labels: ``(n,)``, or None where the samples have no label.
        batch: all entries of the batch for these samples, or None if not requested.
        keys: ``(n,)``, a 64-bit hash of the content of each sample, or None if not requested.
    """

    inputs: Tensor
    labels: Tensor | None
    batch: Any = None
    keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, which: slice) -> Samples:
        found: Samples = select_samples(self, len(self), which)
        return found

    def __add__(self, other: Samples) -> Samples:
        labels, keys = (
            None if a is None or b is None else torch.cat([a, b])
            for a, b in ((self.labels, other.labels), (self.keys, other.keys))
        )
        batch = joined(self.batch, other.batch, len(self), len(other))
        return Samples(torch.cat([self.inputs, other.inputs]), labels, batch, keys)

    def fits(self, other: Samples) -> bool:
        """Return whether other samples have inputs and entries of the same sizes."""
        mine, others = ([t.shape[1:] for _, t in all_tensors_of((s.inputs, s.batch))] for s in (self, other))
        return mine == others

    def to(self, device: torch.device) -> Samples:
        """Move the inputs and the batch to a device; labels and keys stay where they are."""
        return replace(self, inputs=on_device(self.inputs, device), batch=on_device(self.batch, device))


def on_device(batch: Any, device: torch.device) -> Any:
    """Move all tensors of a batch to a device."""
    return _mapped(lambda value: value.to(device, non_blocking=True) if isinstance(value, Tensor) else None, batch)


def input_of(batch: Any, input_fn: Callable[..., Tensor] | None) -> Tensor:
    """Return the inputs of a batch.

    Raises:
        ValueError: If the batch has no entry that is clearly the input.
    """
    found: Any = batch
    if input_fn is not None:
        found = input_fn(batch)
    elif isinstance(batch, Mapping):
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        named = [batch[key] for key in INPUT_KEYS if key in batch]
        found = named[0] if named else tensors[0] if len(tensors) == 1 else None
    elif isinstance(batch, list | tuple):
        found = batch[0] if batch else None
    if not isinstance(found, Tensor) or found.ndim < 2:
        raise ValueError(
            "Expected each sample to be a tensor, a pair (x, y), or a dict with the input under one of"
            f" {INPUT_KEYS}, but a batch of the data is {describe(batch)}. Pick the input with `input_fn`."
        )
    return found


def label_of(batch: Any, n: int) -> Tensor | None:
    """Return the labels of a batch, if it has one integer for each sample."""
    found = target_of(batch, n)
    return None if found is None or found.ndim > 1 or found.is_floating_point() else found


def target_of(batch: Any, n: int) -> Tensor | None:
    """Return the targets of a batch, a tensor with an entry for each sample; None where there is none."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
    return found if isinstance(found, Tensor) and found.ndim and len(found) == n else None


def takes_batch(forward: Callable[..., Any] | None) -> bool:
    """Return whether ``forward`` takes three arguments without defaults: ``forward(model, x, batch)``."""
    if forward is None:
        return False
    try:
        parameters = inspect.signature(forward).parameters.values()
    except ValueError:  # of some builtins
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is each.empty for each in parameters) == 3


def select_samples(batch: Any, n: int, positions: Tensor | slice) -> Any:
    """Select samples from a batch of ``n``, in the order of ``positions``, which may repeat some.

    Tensors whose first axis is ``n`` long and lists with one entry for each sample are indexed, in any nesting of
    mappings, lists, tuples and dataclasses. Everything else is common to all samples and stays.
    """

    def selected(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.shape[:1] != (n,):
                return value
            return value[positions if isinstance(positions, slice) else positions.to(value.device)]
        if isinstance(value, list | tuple) and _is_by_sample(value, n):
            indices = range(n)[positions] if isinstance(positions, slice) else positions.tolist()
            return type(value)(value[i] for i in indices)
        return None

    return _mapped(selected, batch)


def joined(one: Any, other: Any, n_one: int, n_other: int) -> Any:
    """Concatenate two batches of one structure, of ``n_one`` and ``n_other`` samples."""

    def concatenated(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor):
            return torch.cat([a, b]) if a.shape[:1] == (n_one,) and b.shape[:1] == (n_other,) else a
        if isinstance(a, list | tuple) and _is_by_sample(a, n_one) and _is_by_sample(b, n_other):
            return type(a)([*a, *b])
        return None

    return _mapped(concatenated, one, other)


def _mapped(function: Callable[..., Any], *batches: Any) -> Any:
    """Apply a function to corresponding entries of batches of one structure; where it returns None, to their parts."""
    first = batches[0]
    if (found := function(*batches)) is not None:
        return found
    if isinstance(first, Mapping):
        return _with_items(first, {key: _mapped(function, *(batch[key] for batch in batches)) for key in first})
    if isinstance(first, list | tuple):
        values = [_mapped(function, *parts) for parts in zip(*batches, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)  # of a named tuple
    if is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in fields(first) if field.init]
        return replace(
            first, **{name: _mapped(function, *(getattr(batch, name) for batch in batches)) for name in names}
        )
    return first


def _is_by_sample(values: Any, n: int) -> bool:
    """Return whether a list or tuple has an entry for each sample, such as a text, instead of whole tensors."""
    if len(values) != n or hasattr(values, "_fields"):
        return False
    return not any(_holds(value, n) for value in values)


def _holds(value: Any, n: int) -> bool:
    """Return whether a value is, or directly contains, a tensor with an entry for each sample."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(each, Tensor) and each.shape[:1] == (n,) for each in inner)


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Copy a mapping with other values; to a dict where its type is read-only."""
    if type(mapping) is dict or not isinstance(mapping, MutableMapping):
        return items
    found = copy(mapping)
    for key, value in items.items():
        found[key] = value
    return found


def describe(value: Any) -> str:
    """Describe a batch, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "a dict with " + ", ".join(f"{key!r}: {describe(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of ({', '.join(describe(v) for v in value[:4])})"
    return f"of type {type(value).__name__}"
