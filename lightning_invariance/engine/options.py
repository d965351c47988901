"""Arguments that `evaluate` and the callback share, checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.messages import check_int
from lightning_invariance.model.selection import Layers
from lightning_invariance.results.intervals import check_confidence


@dataclass(frozen=True)
class Options:
    """Options of an evaluation, as described at :func:`~lightning_invariance.evaluate`.

    Raises:
        ValueError: If ``batch_size`` or ``max_samples`` is too small, or ``confidence`` is not in (0, 1).
        TypeError: If ``channel_axis`` or ``vectors`` is no mapping.
    """

    layers: Layers = None
    batch_size: int | Literal["auto"] = "auto"
    max_samples: int | None = None
    device: torch.device | str | None = None
    forward: Callable[..., Any] | None = None
    input_fn: Callable[..., Tensor] | None = None
    transform_at: str | None = None
    channel_axis: Mapping[str, int] | None = None
    vectors: Mapping[str, int | Sequence[int]] | None = None
    operations: bool = False
    include_input: bool = False
    state_budget: int | None = None
    confidence: float | None = None
    outputs: Mapping[str, Metric] = field(default_factory=dict)
    outputs_move: bool = False
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size != "auto":
            check_int("batch_size", self.batch_size)
        if self.max_samples is not None:
            check_int("max_samples", self.max_samples)
        if self.confidence is not None:
            check_confidence(self.confidence)
        for name in ("channel_axis", "vectors"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(
                    f"Expected argument `{name}` to be a dict of names or patterns of layers, but got {value!r}: write"
                    f' {{"*": {value!r}}} for all layers.'
                )
