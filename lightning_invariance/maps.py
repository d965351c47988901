"""Feature maps: one value for each channel."""

from __future__ import annotations

from torch import Tensor

#: How the values of a feature map can be made one.
AGGREGATES = (None, "mean", "max", "sum")


def aggregate_maps(values: Tensor, aggregate: str | None) -> Tensor:
    """One value for each channel, ``(channels,)``: over all axes but the first.

    Args:
        values: of ``activation_shape``; without axes it is one channel.
        aggregate: ``"mean"``, ``"max"`` or ``"sum"``; None returns the values as they are.
    """
    if aggregate is None:
        return values
    maps = values.reshape(values.shape[0] if values.ndim else 1, -1)
    if aggregate == "max":
        return maps.amax(1)
    return maps.mean(1) if aggregate == "mean" else maps.sum(1)
