"""One value for each channel of a feature map."""

from __future__ import annotations

from torch import Tensor

#: How the values of a feature map can be made one.
AGGREGATES = (None, "mean", "max", "sum")


def aggregate_maps(values: Tensor, aggregate: str | None, channel_axis: int = 0) -> Tensor:
    """One value for each channel, ``(channels,)``: over all axes but the channel axis.

    Args:
        values: of ``activation_shape``; without axes it is one channel.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"``; None returns the values as they are.
        channel_axis: of the activation.
    """
    if aggregate is None:
        return values
    maps = values.movedim(channel_axis, 0).flatten(1) if values.ndim > 1 else values.reshape(-1, 1)
    if aggregate == "max":
        return maps.amax(1)
    return maps.mean(1) if aggregate == "mean" else maps.sum(1)
