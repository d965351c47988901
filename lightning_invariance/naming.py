"""The names of a model's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_invariance.engine.options import Options
from lightning_invariance.engine.walk import Session
from lightning_invariance.model.preserved import ONE_AT_A_TIME
from lightning_invariance.model.selection import Layers, select_layers, unwrapped


def layer_names(
    model: nn.Module,
    layers: Layers = None,
    example: Tensor | None = None,
    *,
    operations: bool = False,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
) -> list[str]:
    """Names of a model's layers: in the order in which the model holds them, or with an example in which they run.

    Args:
        model: any module.
        layers: what to select, as in :func:`evaluate`:

            - ``None``: every leaf module: one without children, or within which no other module runs, such as an
              ``nn.MultiheadAttention``.
            - names of modules, leaf or not, such as ``["conv1", "layer1"]``; the output of ``"layer1"`` is what the
              whole block returns.
            - glob patterns over the leaf modules, such as ``"layer1.*"`` or ``"*conv?"``; ``*`` also matches dots.
            - module types, such as ``nn.Conv2d`` or your own block class.
            - a predicate ``(name, module) -> bool``, asked for every module but the model itself.
            - a dict from module name to the name for results, curves and pictures.
            - patterns of operations, ``"layer1.0/add"`` or ``"layer*/add"``: what functions and operators compute in
              the forward of a module, see ``operations`` of :func:`evaluate`.
        example: inputs, at least two different ones; the model runs on them twice. Then the names are those of a
            result: without layers that do not run or cannot be measured, with operations, and with the further layers
            of modules that run k times in one forward pass (``name``, ``name#1``, …, ``name#{k-1}``) or return a tuple,
            list or dict (``name[0]``, ``name[key]``, …). Without an example only modules without children are known.
        operations: with an example, whether to name what functions and operators compute, too.
        forward: with an example, ``forward(model, x)`` runs the model where it is not called as ``model(x)``.

    Returns:
        The names.

    Raises:
        ValueError: If a name or pattern is not in the model (the message lists near names), nothing is selected, or
            ``operations`` comes without an ``example`` of two inputs.
        TypeError: If ``layers`` is of another kind.

    Example:
        >>> import torch
        >>> class Net(nn.Sequential):
        ...     def forward(self, x):
        ...         return super().forward(x.relu()) + 1
        >>> model = Net(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        >>> layer_names(model)
        ['0', '1', '2']
        >>> layer_names(model, example=torch.randn(2, 1, 5, 5), operations=True)
        ['Net/relu', '0', '1', '2', 'Net/add']
    """
    if example is None:
        if operations:
            raise ValueError("Expected argument `example` with `operations=True`: they have names only when they run.")
        return list(select_layers(model, layers).modules)
    if not isinstance(example, Tensor) or example.ndim < 2 or len(example) < 2:
        shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"Expected argument `example` to be a tensor of at least two inputs, but got {shape}.")
    session = Session(unwrapped(model), example, Options(layers, forward=forward, operations=operations))
    with ONE_AT_A_TIME:
        return session.names(example)
