"""Rows of the ST matrix, and the states that accumulators make of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_invariance.transforms import TransformationSet

#: The sums of one accumulator by name.
States: TypeAlias = dict[str, Tensor]

#: Types of networks in half precision, whose values float32 represents exactly; and all types of rows.
HALF = {torch.float16, torch.bfloat16}
TYPES = {torch.float32, torch.float64, *HALF}

#: The state that counts rows; the package adds it to the states of every accumulator.
N_SAMPLES = "n_samples"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Context:
    """Properties of an evaluation that are known before the first row.

    Attributes:
        transformations: the columns of the ST matrix.
        input_shape: shape of a network input without the batch axis; ``()`` if it is not known yet.
        n_samples: number of samples of all processes together, whose ``indices`` are 0 to n − 1; None if unknown.
        run: largest number of consecutive ``indices``, in rising order, that a process adds before another process
            continues, see ``data/rank_shares.py``. The order of samples is then random and ``n_samples`` is known. 0 if
            samples come in any other order.
    """

    transformations: TransformationSet
    input_shape: tuple[int, ...] = ()
    n_samples: int | None = None
    run: int = 0


@dataclass(slots=True)
class Rows:
    """Rows of the ST matrix of every activation of one layer.

    Attributes:
        values: complete rows ``(samples, transformations, *activation_shape)`` in float32 or float64; also in float16
            or bfloat16 for an accumulator with :attr:`~Accumulator.takes_half`.
        indices: ``(samples,)`` in int64, on the CPU: the number of each sample; None for rows without numbers.
        labels: ``(samples,)``, the class of each sample; None for data without labels.
        before: number of rows added earlier.
        memo: results for these rows that the accumulators of this layer reuse; see :meth:`once`.
        block_memo: results for these samples that the accumulators of all layers reuse.
        channel_axis: axis of the activation that holds the channels.
        vector_axes: axes of the activation along which vectors stand that turn with the input.
    """

    values: Tensor
    indices: Tensor | None = None
    labels: Tensor | None = None
    before: int = 0
    memo: dict[Hashable, Any] = field(default_factory=dict)
    block_memo: dict[Hashable, Any] = field(default_factory=dict)
    channel_axis: int = 0
    vector_axes: tuple[int, ...] = ()

    @property
    def flat(self) -> Tensor:
        """``(samples, transformations, activations)``."""
        return self.values.flatten(2) if self.values.ndim > 2 else self.values[..., None]

    @property
    def channels_first(self) -> Tensor:
        """``(samples, transformations, channels, *positions)``."""
        return self.values.movedim(2 + self.channel_axis, 2) if self.channel_axis else self.values

    def turned(self, st: Tensor, transformations: TransformationSet, inverse: bool) -> Tensor:
        """Turn the vectors in :attr:`channels_first`, or in maps of that shape, with the transformations or back."""
        for axis in self.vector_axes:
            place = 0 if axis == self.channel_axis else axis + (axis < self.channel_axis)
            st = transformations.turned(st, 2 + place, inverse)
        return st

    @property
    def maps(self) -> Tensor:
        """``(samples, transformations, channels, positions)``."""
        values = self.channels_first
        return values.flatten(3) if values.ndim > 3 else values.reshape(*values.shape[:2], -1, 1)

    def vectors(self, over: str) -> Tensor:
        """What is compared as one vector, the last axis: ``(samples, transformations, vectors, length)``.

        Single values for ``over="activation"``, feature maps for ``"channel"``, everything for ``"layer"``.
        """
        if over == "channel":
            return self.maps
        return self.flat[:, :, None] if over == "layer" else self.flat[..., None]

    def widen(self) -> None:
        """Convert float16 and bfloat16 values to float32, for all later readers of these rows."""
        if self.values.dtype in HALF:
            self.values = self.values.float()

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Compute a result that several accumulators of a layer need, at the first request only."""
        if key not in self.memo:
            self.memo[key] = make()
        found: Value = self.memo[key]
        return found

    def some(self, samples: Tensor, before: int) -> Rows:
        """Select rows by their positions ``(count,)``, on the CPU; ``before`` counts the rows added earlier."""
        there = samples.to(self.values.device, non_blocking=True)
        indices = None if self.indices is None else self.indices[samples]
        labels = None if self.labels is None else self.labels[samples.to(self.labels.device)]
        return replace(
            self, values=self.values[there], indices=indices, labels=labels, before=before, memo={}, block_memo={}
        )
