"""The axis of an activation that holds the channels (units, neurons)."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _LPPoolNd, _MaxPoolNd

#: Modules whose outputs are (batch, channels, ...), and modules whose outputs are (..., features).
POOLING = (_AvgPoolNd, _MaxPoolNd, _LPPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)
CHANNELS_FIRST: tuple[type[nn.Module], ...] = (_ConvNd, _NormBase, nn.GroupNorm, nn.LocalResponseNorm, *POOLING)
CHANNELS_LAST: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.Embedding, nn.RNNBase)


def channel_axis_of(module: nn.Module | None, output: Tensor, of_input: int | None) -> int | None:
    """The channel axis in the output of a module, counted from the end; None if unknown.

    Args:
        module: the module; None for an operation.
        output: its output, or a part of it.
        of_input: the channel axis of its input, if that is known and has the shape of the output.
    """
    if isinstance(module, CHANNELS_FIRST):
        return 1 - output.ndim if output.ndim > 1 else -1
    if isinstance(module, CHANNELS_LAST):
        return -1
    return of_input


def usual_channel_axis(activation_shape: tuple[int, ...]) -> int:
    """The channel axis of a layer of unknown kind: the first of (C, H, W), the last of (tokens, C)."""
    return 1 if len(activation_shape) == 2 else 0


def channel_axis_in(layer: str, shape: tuple[int, ...], from_end: int | None, asked: Mapping[str, int]) -> int:
    """The channel axis of a layer's activation: requested by the user, known from the module, or the usual one.

    Args:
        layer: its name.
        shape: shape of its activation.
        from_end: the axis known from the module, counted from the end.
        asked: layer or glob pattern → axis of the activation; the last matching entry counts.

    Raises:
        ValueError: If the activation does not have the requested axis.
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
