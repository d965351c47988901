"""Which axis of an activation holds the units (channels, neurons), and one value for each of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_invariance.hints import level_of_user

#: How the values of a feature map can be made one.
AGGREGATES = (None, "mean", "max", "sum")

#: Modules whose outputs are (batch, channels, ...), and those whose outputs are (..., features).
CHANNELS_FIRST: tuple[type[nn.Module], ...] = (_ConvNd, _NormBase, nn.GroupNorm, nn.LocalResponseNorm)
CHANNELS_LAST: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.Embedding, nn.RNNBase)


def aggregate_maps(values: Tensor, aggregate: str | None, channel_axis: int = 0) -> Tensor:
    """One value for each channel, ``(channels,)``: over all axes but that of the channels.

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


def channel_axis_of(module: nn.Module | None, output: Tensor, of_input: int | None) -> int | None:
    """The axis of the channels in the output of a module, counted from the end; None where the module does not say.

    Args:
        module: what ran; None for an operation.
        output: what it returned, or a part of it.
        of_input: the axis in its input, if that is known and has the shape of the output.
    """
    if isinstance(module, CHANNELS_FIRST):
        return 1 - output.ndim if output.ndim > 1 else -1
    if isinstance(module, CHANNELS_LAST):
        return -1
    return of_input


def usual_channel_axis(activation_shape: tuple[int, ...]) -> int:
    """The axis of the channels where nothing else is known: the first of (C, H, W), the last of (tokens, C)."""
    return 1 if len(activation_shape) == 2 else 0


def channel_axis_in(layer: str, shape: tuple[int, ...], from_end: int | None, asked: Mapping[str, int]) -> int:
    """The axis of the channels in the activation of a layer: what the user says, or the module, or the usual one.

    Args:
        layer: its name.
        shape: of its activation.
        from_end: what the module says, counted from the end.
        asked: layer or glob pattern → axis of the activation; the last that fits counts.

    Raises:
        ValueError: If the user names an axis that the activation does not have.
    """
    fitting = [axis for pattern, axis in asked.items() if pattern == layer or fnmatchcase(layer, pattern)]
    if fitting and not -len(shape) <= fitting[-1] < len(shape):
        raise ValueError(
            f"Expected argument `channel_axis` to name an axis of the activation of layer {layer!r}, whose shape is"
            f" {shape}, but got {fitting[-1]}."
        )
    found = fitting[-1] if fitting else from_end
    if found is None or not -len(shape) <= found < len(shape):
        found = usual_channel_axis(shape)
    return found % len(shape) if shape else 0


def warn_of_no_images(x: Tensor, input_size: tuple[int, int] | None) -> None:
    """Warn where inputs look like ``(batch, height, width, channels)`` or signals; feature maps of some input may."""
    if input_size is not None:
        return
    told = ""
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4) and min(x.shape[1:3]) > 4:
        told = "channels last: give `x.permute(0, 3, 1, 2)`"
    elif min(x.shape[-2:]) == 1 < max(x.shape[-2:]):
        told = "signals along one axis: make a set for these with `TransformationSet.from_callables`"
    if told:
        warnings.warn(
            f"Expected images (batch, channels, height, width), but got {tuple(x.shape)}, which looks like {told}.",
            UserWarning,
            stacklevel=level_of_user(),
        )
