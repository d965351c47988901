"""Which layers a model has, and catching what they compute."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

#: What selects layers: see :func:`layer_names`.
Layers: TypeAlias = (
    str
    | type[nn.Module]
    | Iterable[str | type[nn.Module]]
    | Mapping[str, str]
    | Callable[[str, nn.Module], bool]
    | None
)

NOTHING_RAN = (
    "The hooks of the selected modules never fired: scripted, traced or exported models have none, and neither has"
    " `module.forward(x)`, which must be `module(x)`."
)


class Selection:
    """The modules that were selected, and what each part of the request stands for.

    Args:
        modules: layer name (renamed where a dict asked for it) → module, in the order of the model.
        requests: what the user wrote → the layer names it selected. Empty where all leaf modules were meant.
        operations: patterns of the names of operations, such as ``"layer*/add"``; empty for none.

    Attributes:
        modules: see Args. So are ``requests`` and ``operations``.
        origins: layer → the selected name it comes from, for the layers that ran; filled while the model runs.
    """

    def __init__(
        self, modules: dict[str, nn.Module], requests: dict[str, list[str]], operations: Sequence[str] = ()
    ) -> None:
        self.modules = modules
        self.requests = requests
        self.operations = tuple(operations)
        self.origins: dict[str, str] = {}

    def origin_of(self, layer: str) -> str:
        """The selected name that a layer comes from; by its form where only other processes saw it run."""
        form = layer.partition("[")[0]
        return self.origins.get(layer) or (form.rpartition("#")[0] if "#" in form else form)

    def check_measured(self, measured: Iterable[str], left_out: Mapping[str, str]) -> None:
        """Raise if something that was asked for was not measured.

        Args:
            measured: layers.
            left_out: layer → why it cannot be measured.

        Raises:
            RuntimeError: If nothing was measured; or something that was asked for never ran; or a layer that was asked
                for by name cannot be measured.
        """
        ran = list(measured)
        origins = {self.origin_of(layer) for layer in (*ran, *left_out)}
        for request, names in self.requests.items():
            if not origins.intersection(names):
                raise RuntimeError(
                    f"Expected layer {request!r} to run in the model's forward pass, but it never did (or returned no"
                    f" floating-point tensor). The layers that ran are {_some([*map(repr, ran)])}."
                )
            reasons = [why for layer, why in left_out.items() if self.origin_of(layer) == request]
            if reasons and not any(self.origin_of(layer) == request for layer in ran):
                raise RuntimeError(
                    f"Expected layer {request!r} to have values for every sample, but it is {reasons[0]}."
                )
        if not ran:
            raise RuntimeError(
                "Expected at least one layer that can be measured, but "
                + (f"all were left out: {summary_of(left_out)}." if left_out else f"none ran. {NOTHING_RAN}")
            )


def layer_names(model: nn.Module, layers: Layers = None) -> list[str]:
    """Names of a model's layers, in the order in which the model holds them.

    Args:
        model: any module.
        layers: what to select, as in :func:`evaluate`:

            - ``None``: every leaf module (a module without children).
            - names of modules, leaf or not, such as ``["conv1", "layer1"]``; the output of ``"layer1"`` is what the
              whole block returns.
            - glob patterns over the leaf modules, such as ``"layer1.*"`` or ``"*conv?"``; ``*`` also matches dots.
            - module types, such as ``nn.Conv2d`` or your own block class.
            - a predicate ``(name, module) -> bool``, asked for every module but the model itself.
            - a dict from module name to the name for results, curves and pictures.
            - patterns of operations, ``"layer1.0/add"`` or ``"layer*/add"``: what functions and operators compute in
              the forward of a module, see ``operations`` of :func:`evaluate`. They have names only when the model runs.

    Returns:
        The names. A module that runs k times in one forward pass gives the layers ``name``, ``name#1``, …,
        ``name#{k-1}``, and one that returns a tuple, list or dict gives ``name[0]``, ``name[key]``, …: these are known
        only when the model runs.

    Raises:
        ValueError: If a name or pattern is not in the model (the message lists near names), or nothing is selected.
        TypeError: If ``layers`` is of another kind.

    .. note::
        A module that runs inside an operation, like the ``out_proj`` of
        ``nn.MultiheadAttention``, never runs itself: it is left out where all leaf modules are meant and an error
        where it was asked for by name.

    Example:
        >>> from torch import nn
        >>> layer_names(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()))
        ['0', '1', '2']
    """
    return list(select_layers(model, layers).modules)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that ``torch.compile`` and distributed training put around it."""
    while "_orig_mod" in model._modules or isinstance(model, DataParallel | DistributedDataParallel):
        model = model.get_submodule("_orig_mod" if "_orig_mod" in model._modules else "module")
    return model


def select_layers(model: nn.Module, layers: Layers = None, operations: bool = False) -> Selection:
    """Resolve a request for layers; see :func:`layer_names`.

    Args:
        model: any module.
        layers: what to select.
        operations: whether all operations are selected, too.
    """
    if isinstance(layers, str):
        layers = [layers]
    patterns = ["*"] if operations else []
    if isinstance(layers, Iterable) and not isinstance(layers, Mapping):
        items = list(layers)
        asked = [item for item in items if isinstance(item, str) and "/" in item]
        if asked:
            rest = [item for item in items if item not in asked]
            selection = _select_modules(model, rest) if rest else Selection({}, {})
            requests = {**selection.requests, **{pattern: [pattern] for pattern in asked}}
            return Selection(selection.modules, requests, [*asked, *patterns])
        layers = items
    selection = _select_modules(model, layers)
    return Selection(selection.modules, selection.requests, patterns)


def _select_modules(model: nn.Module, layers: Layers) -> Selection:
    """Resolve a request for modules."""
    model = unwrapped(model)
    everything = {name: module for name, module in model.named_modules() if name and not _is_parametrization(name)}
    leaves = {name: module for name, module in everything.items() if _is_leaf(module)}
    if not everything:  # the model itself is the only layer
        everything = leaves = {type(model).__name__: model}
    if layers is None:
        return Selection(leaves, {})
    if isinstance(layers, Mapping):
        requests = {name: [_known(name, everything)] for name in layers}
        renamed = {str(layers[name]): everything[name] for name in requests}
        if len(renamed) != len(layers):
            raise ValueError(f"Expected argument `layers` to give different names, but got {list(layers.values())}.")
        return Selection(renamed, {name: [str(layers[name])] for name in requests})
    if isinstance(layers, str | type):
        layers = [layers]
    if callable(layers):
        names = [name for name, module in everything.items() if layers(name, module)]
        requests = {getattr(layers, "__name__", repr(layers)): names}
    elif isinstance(layers, Iterable):
        requests = {str(getattr(item, "__name__", item)): _resolve(item, everything, leaves) for item in layers}
    else:
        raise TypeError(
            "Expected argument `layers` to be names, glob patterns, module types, a predicate or a dict,"
            f" but got {layers!r}."
        )
    chosen = {name for names in requests.values() for name in names}
    if not chosen:
        raise ValueError(f"Expected argument `layers` to select at least one layer, but {layers!r} selects none.")
    return Selection({name: module for name, module in everything.items() if name in chosen}, requests)


def _is_parametrization(name: str) -> bool:
    """Whether a module computes a weight: what ``torch.nn.utils.parametrize`` puts into the module that uses it."""
    return "parametrizations" in name.split(".")


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module has no children but parametrisations of its weights."""
    return not any(name != "parametrizations" for name, _ in module.named_children())


def _resolve(item: Any, everything: Mapping[str, nn.Module], leaves: Mapping[str, nn.Module]) -> list[str]:
    """The names that one item of a list stands for."""
    if isinstance(item, type) and issubclass(item, nn.Module):
        names = [name for name, module in everything.items() if isinstance(module, item)]
        if not names:
            present = sorted({type(module).__name__ for module in everything.values()})
            raise ValueError(
                f"Expected argument `layers` to name types in the model, but it has no {item.__name__};"
                f" it has {', '.join(present)}."
            )
        return names
    if not isinstance(item, str):
        raise TypeError(f"Expected argument `layers` to hold names, patterns or module types, but got {item!r}.")
    if any(sign in item for sign in "*?[") and item not in everything:
        names = [name for name in leaves if fnmatchcase(name, item)]
        return names or [_known(item, everything)]
    return [_known(item, everything)]


def _known(name: str, modules: Mapping[str, nn.Module]) -> str:
    if name in modules:
        return name
    near = difflib.get_close_matches(name, modules, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(map(repr, near))}?" if near else f"The model has {', '.join(list(modules)[:20])}."
    raise ValueError(f"Expected argument `layers` to name layers of the model, but it has no layer {name!r}. {hint}")


def summary_of(left_out: Mapping[str, str]) -> str:
    """A short text that counts layers by reason and names a few: ``36 constant (a, b, …), 5 ragged (c, …)``."""
    by_reason: dict[str, list[str]] = {}
    for layer, reason in left_out.items():
        by_reason.setdefault(reason.partition(":")[0], []).append(layer)
    return ", ".join(f"{len(layers)} {reason} ({_some(layers)})" for reason, layers in by_reason.items())


def _some(layers: Sequence[str], most: int = 6) -> str:
    """A few names of layers."""
    return ", ".join(layers[:most]) + (", …" if len(layers) > most else "")
