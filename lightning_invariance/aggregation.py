"""One value for each channel of a feature map, or for a layer."""

from __future__ import annotations

from torch import Tensor

#: How the values of a feature map, or of a layer, can be made one.
AGGREGATES = (None, "mean", "max", "sum", "layer")


def aggregate_maps(values: Tensor, aggregate: str | None, channel_axis: int = 0) -> Tensor:
    """One value for each channel, ``(channels,)``: over all axes but the channel axis.

    Args:
        values: of ``activation_shape``; without axes it is one channel.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"``; ``"layer"`` returns the sum of all values, ``()``; None returns
            the values as they are.
        channel_axis: of the activation.
    """
    if aggregate in (None, "layer"):
        return values if aggregate is None else values.sum()
    maps = values.movedim(channel_axis, 0).flatten(1) if values.ndim > 1 else values.reshape(-1, 1)
    if aggregate == "max":
        return maps.amax(1)
    return maps.mean(1) if aggregate == "mean" else maps.sum(1)


def aggregated_shape(activation_shape: tuple[int, ...], aggregate: str | None, channel_axis: int) -> tuple[int, ...]:
    """The shape of :func:`aggregate_maps` of values of ``activation_shape``."""
    if aggregate in (None, "layer"):
        return activation_shape if aggregate is None else ()
    return (activation_shape[channel_axis] if activation_shape else 1,)
