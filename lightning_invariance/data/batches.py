"""Batches of a loader: their inputs and labels, and taking or joining the samples of everything else they hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

#: Keys under which a dict sample may hold its input, and its label.
INPUT_KEYS = ("image", "images", "img", "x", "input", "inputs", "pixel_values", "data")
LABEL_KEYS = ("label", "labels", "y", "target", "targets", "class")


@dataclass(frozen=True)
class Samples:
    """Some samples of a batch.

    Attributes:
        inputs: ``(n, *input_shape)``.
        labels: ``(n,)``, or None where the samples carry no label.
        batch: all entries of the batch for these samples, or None where nobody asked for them.
        keys: ``(n,)``, what tells the samples apart by what they hold, or None where nobody asked for it.
    """

    inputs: Tensor
    labels: Tensor | None
    batch: Any = None
    keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def taken(self, which: slice) -> Samples:
        """Some of them."""
        labels = None if self.labels is None else self.labels[which]
        batch = None if self.batch is None else taken(self.batch, len(self), torch.arange(len(self))[which])
        return Samples(self.inputs[which], labels, batch, None if self.keys is None else self.keys[which])

    def joined(self, other: Samples) -> Samples:
        """These and others."""
        labels, keys = (
            None if a is None or b is None else torch.cat([a, b])
            for a, b in ((self.labels, other.labels), (self.keys, other.keys))
        )
        batch = joined(self.batch, other.batch, len(self), len(other))
        return Samples(torch.cat([self.inputs, other.inputs]), labels, batch, keys)

    def to(self, device: torch.device) -> Samples:
        """The same on a device, labels and keys apart."""
        batch = changed(self.batch, lambda tensor: tensor.to(device, non_blocking=True))
        return replace(self, inputs=self.inputs.to(device, non_blocking=True), batch=batch)


def input_of(batch: Any, input_fn: Callable[..., Tensor] | None) -> Tensor:
    """The inputs of a batch.

    Raises:
        ValueError: If it is not clear which they are.
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
    """The labels of a batch, if it has one whole number for each sample."""
    found = target_of(batch, n)
    return None if found is None or found.ndim > 1 or found.is_floating_point() else found


def target_of(batch: Any, n: int) -> Tensor | None:
    """What a network should return for a batch: a tensor with an entry for each sample; None where there is none."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
    return found if isinstance(found, Tensor) and found.ndim and len(found) == n else None


def takes_batch(forward: Callable[..., Any] | None) -> bool:
    """Whether a ``forward`` is called as ``forward(model, x, batch)``: it takes three arguments without defaults."""
    if forward is None:
        return False
    try:
        parameters = inspect.signature(forward).parameters.values()
    except ValueError:  # of some builtins
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in positional and each.default is each.empty for each in parameters) == 3


def taken(batch: Any, n: int, positions: Tensor) -> Any:
    """A batch of ``n`` samples with those at ``positions`` only, in this order; some may come several times.

    Tensors whose first axis is ``n`` long and lists with something for each sample are indexed, in any nesting of
    mappings, lists, tuples and dataclasses. Everything else is the same for all samples and stays.
    """
    chosen = positions.tolist()

    def of_list(values: Any) -> Any:
        return type(values)(values[i] for i in chosen) if _is_by_sample(values, n) else None

    def of_tensor(tensor: Tensor) -> Tensor:
        return tensor[positions.to(tensor.device)] if tensor.shape[:1] == (n,) else tensor

    return changed(batch, of_tensor, of_list)


def joined(one: Any, other: Any, n_one: int, n_other: int) -> Any:
    """Two batches of the same form, one after the other."""
    if isinstance(one, Tensor):
        return torch.cat([one, other]) if one.shape[:1] == (n_one,) and other.shape[:1] == (n_other,) else one
    if isinstance(one, Mapping):
        return _with_items(one, {key: joined(one[key], other[key], n_one, n_other) for key in one})
    if isinstance(one, list | tuple):
        if _is_by_sample(one, n_one) and _is_by_sample(other, n_other):
            return type(one)([*one, *other])
        return _like(one, [joined(a, b, n_one, n_other) for a, b in zip(one, other, strict=True)])
    if is_dataclass(one) and not isinstance(one, type):
        names = [field.name for field in fields(one) if field.init]
        return replace(one, **{n: joined(getattr(one, n), getattr(other, n), n_one, n_other) for n in names})
    return one


def changed(batch: Any, of_tensor: Callable[[Tensor], Tensor], of_list: Callable[[Any], Any] | None = None) -> Any:
    """A batch with every tensor changed.

    Args:
        batch: any nesting of mappings, lists, tuples and dataclasses.
        of_tensor: changes a tensor.
        of_list: changes a list or tuple as a whole; None where it does not.
    """
    if isinstance(batch, Tensor):
        return of_tensor(batch)
    if isinstance(batch, Mapping):
        return _with_items(batch, {key: changed(value, of_tensor, of_list) for key, value in batch.items()})
    if isinstance(batch, list | tuple):
        whole = None if of_list is None else of_list(batch)
        return _like(batch, [changed(value, of_tensor, of_list) for value in batch]) if whole is None else whole
    if is_dataclass(batch) and not isinstance(batch, type):
        names = [field.name for field in fields(batch) if field.init]
        return replace(batch, **{name: changed(getattr(batch, name), of_tensor, of_list) for name in names})
    return batch


def _is_by_sample(values: Any, n: int) -> bool:
    """Whether a list or tuple holds something for each sample, such as texts or boxes, instead of whole tensors."""
    if len(values) != n or hasattr(values, "_fields"):
        return False
    return not any((isinstance(value, Tensor) and value.shape[:1] == (n,)) or _holds(value, n) for value in values)


def _holds(value: Any, n: int) -> bool:
    """Whether a container holds a tensor with a value for each sample."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(each, Tensor) and each.shape[:1] == (n,) for each in inner)


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same type with other values; a dict where the type does not allow it."""
    if type(mapping) is dict or not isinstance(mapping, MutableMapping):
        return items
    found = copy(mapping)
    for key, value in items.items():
        found[key] = value
    return found


def _like(sequence: Any, values: list[Any]) -> Any:
    """Values in a list, tuple or named tuple of the same type."""
    return type(sequence)(*values) if hasattr(sequence, "_fields") else type(sequence)(values)


def describe(value: Any) -> str:
    """What a batch holds, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "a dict with " + ", ".join(f"{key!r}: {describe(v)}" for key, v in value.items())
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of ({', '.join(describe(v) for v in value[:4])})"
    return f"of type {type(value).__name__}"
