"""Values of measures by layer, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_invariance.aggregation import aggregate_maps
from lightning_invariance.messages import instead_of
from lightning_invariance.results.table import LayerStatistics, Table


class OfLayers(dict[str, Tensor]):
    """Layer → values, that says which layers there are where another is asked for."""

    def __missing__(self, layer: str) -> Tensor:
        raise KeyError(f"No layer {layer!r} in this result. {instead_of(str(layer), self)}")


class LayerValues(Mapping[str, Mapping[str, Tensor]]):
    """Values of measures for every layer, and their statistics.

    Args:
        values: measure → {layer: tensor of ``activation_shape``}.
        dead: layer → bool tensor, true for activations that never changed.
        channel_axis: layer → which axis of its activation holds the channels; by default the first.
        samples: layer → how many samples reached it, where that is known.
    """

    def __init__(
        self,
        values: Mapping[str, Mapping[str, Tensor]],
        dead: Mapping[str, Tensor] | None = None,
        channel_axis: Mapping[str, int] | None = None,
        samples: Mapping[str, int] | None = None,
    ) -> None:
        self.channel_axis = dict(channel_axis or {})
        self._values = {measure: OfLayers(layers) for measure, layers in values.items()}
        self.dead = dict(dead or {})
        reached = samples or {}
        self._tables = {
            measure: Table(
                LayerStatistics.of(layer, v, self._dead_of(layer, v), reached.get(layer, 0))
                for layer, v in layers.items()
            )
            for measure, layers in self._values.items()
        }

    def __getitem__(self, measure: str) -> Mapping[str, Tensor]:
        if measure not in self._values:
            raise KeyError(f"No measure {measure!r} in this result; it has {', '.join(self._values)}.")
        return self._values[measure]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    # A mapping of tensors cannot be compared by value: `tensor == tensor` is a tensor.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def measures(self) -> list[str]:
        """Names of the measures."""
        return list(self._values)

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order in which they ran; :attr:`skipped` says which a measure leaves out."""
        return max((list(layers) for layers in self._values.values()), key=len, default=[])

    def table(self, measure: str | None = None) -> Table:
        """A row of statistics for each layer: a list of :class:`LayerStatistics` that prints as a table.

        Args:
            measure: its name; by default the first.
        """
        return self._tables[self._known(measure)]

    def per_layer(self, measure: str | None = None) -> dict[str, float]:
        """The mean over the finite values of each layer; NaN where there are none.

        Args:
            measure: its name; by default the first.
        """
        return {row.layer: row.mean for row in self.table(measure)}

    def per_channel(self, measure: str, layer: str, aggregate: str = "mean") -> Tensor:
        """One value for each channel, the mean over the spatial axes as in the paper's figure 8: ``(channels,)``.

        A channel with an infinite or NaN value is infinite or NaN itself. ``channel_axis`` says which axis holds the
        channels; an activation without axes gives one channel.

        Args:
            measure: its name.
            layer: its name.
            aggregate: ``"mean"``, ``"max"`` or ``"sum"`` over the spatial axes.
        """
        if layer not in self[measure]:
            hint = instead_of(layer, self[measure], "It has")
            raise KeyError(f"No layer {layer!r} of {measure} in this result. {hint}")
        if aggregate not in ("mean", "max", "sum"):
            raise ValueError(f'Expected argument `aggregate` to be "mean", "max" or "sum", but got {aggregate!r}.')
        return aggregate_maps(self[measure][layer], aggregate, self.channel_axis.get(layer, 0))

    def dead_channels(self, layer: str) -> Tensor:
        """Which channels hold nothing but dead activations: bool ``(channels,)``."""
        dead = self.dead.get(layer)
        if dead is None:
            measure = next(measure for measure, layers in self._values.items() if layer in layers)
            return torch.zeros_like(self.per_channel(measure, layer), dtype=torch.bool)
        return dead.movedim(self.channel_axis.get(layer, 0), 0).flatten(1).all(1) if dead.ndim > 1 else dead.reshape(-1)

    def mean(self, measure: str | None = None, weighted: bool = False) -> float:
        """The mean over layers of :meth:`per_layer` where it is finite: one number for the network.

        Args:
            measure: its name; by default the first.
            weighted: weigh each layer by its number of finite values; by default all layers count the same.
        """
        rows = [row for row in self.table(measure) if math.isfinite(row.mean)]
        sizes = [math.prod(row.shape) - row.infinite - row.nan if weighted else 1 for row in rows]
        total = sum(sizes)
        return sum(row.mean * size for row, size in zip(rows, sizes, strict=True)) / total if total else math.nan

    def _dead_of(self, layer: str, values: Tensor) -> Tensor | None:
        """Which of the values are of activations that never changed: of channels, or of the layer, where these are."""
        dead = self.dead.get(layer)
        if dead is None or dead.numel() == values.numel():
            return dead
        channels = self.dead_channels(layer)
        return channels if channels.numel() == values.numel() else dead.all().expand(values.shape)

    def _known(self, measure: str | None) -> str:
        if measure is None:
            return next(iter(self._values))
        self[measure]  # raises a KeyError that lists the measures
        return measure
