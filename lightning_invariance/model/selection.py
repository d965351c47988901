"""Which modules of a model are its layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_invariance.messages import given, instead_of, some

#: What selects layers: see :func:`layer_names`.
Layers: TypeAlias = (
    str
    | type[nn.Module]
    | Iterable[str | type[nn.Module]]
    | Mapping[str, str]
    | Callable[[str, nn.Module], bool]
    | None
)

#: Where the wrappers of ``torch.compile`` and of Fabric keep the model.
WRAPPED = ("_orig_mod", "_forward_module")

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
        containers: further modules, which are layers where none of the modules in them runs, such as an
            ``nn.MultiheadAttention``, whose ``out_proj`` holds weights only.

    Attributes:
        modules: see Args. So are ``requests``, ``operations`` and ``containers``.
        origins: layer → the selected name it comes from, for the layers that ran; filled while the model runs.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        requests: dict[str, list[str]],
        operations: Sequence[str] = (),
        containers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.modules = modules
        self.requests = requests
        self.containers = dict(containers or {})
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
                    f" floating-point tensor). The layers that ran are {some(map(repr, ran))}."
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


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that ``torch.compile``, distributed training and Fabric put around it."""
    while True:
        inner = next((name for name in WRAPPED if name in model._modules), None)
        if inner is None and isinstance(model, DataParallel | DistributedDataParallel):
            inner = "module"
        if inner is None:
            return model
        model = model.get_submodule(inner)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module, without what ``torch.compile`` puts into the names of modules within a model."""
    return {plain_name(name): module for name, module in model.named_modules()}


def plain_name(name: str) -> str:
    """The name of a module as it is without ``torch.compile``."""
    return ".".join(part for part in name.split(".") if part != WRAPPED[0])


def select_layers(model: nn.Module, layers: Layers = None, operations: bool = False) -> Selection:
    """Resolve a request for layers; see :func:`layer_names`.

    Args:
        model: any module.
        layers: what to select.
        operations: whether all operations are selected, too.
    """
    if isinstance(layers, nn.Module):
        raise TypeError(
            f"Expected argument `layers` to be names, glob patterns, module types, a predicate or a dict, but got a"
            f" {type(layers).__name__}: give its name, which `layer_names(model)` tells."
        )
    if isinstance(layers, str | type):
        layers = [layers]
    patterns = ["*"] if operations else []
    if isinstance(layers, Iterable) and not isinstance(layers, Mapping):
        items = list(layers)
        asked = [item for item in items if isinstance(item, str) and "/" in item]
        if asked:
            rest = [item for item in items if item not in asked]
            selection = _select_modules(model, rest) if rest else Selection({}, {})
            requests = {**selection.requests, **{pattern: [pattern] for pattern in asked}}
            return Selection(selection.modules, requests, [*asked, *patterns], selection.containers)
        layers = items
    selection = _select_modules(model, layers)
    return Selection(selection.modules, selection.requests, patterns, selection.containers)


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of argument ``transform_at``."""
    modules: dict[str, nn.Module] = {
        known: module for known, module in named_modules(unwrapped(model)).items() if known
    }
    if name not in modules:
        raise ValueError(
            f"Expected argument `transform_at` to name a module of the model, but got {given(name)}."
            f" {instead_of(str(name), modules)}"
        )
    return modules[name]


def _select_modules(model: nn.Module, layers: Layers) -> Selection:
    """Resolve a request for modules."""
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise RuntimeError(f"Expected at least one layer that can be measured, but none ran. {NOTHING_RAN}")
    everything = {
        name: module for name, module in named_modules(model).items() if name and not _is_parametrization(name)
    }
    leaves = {name: module for name, module in everything.items() if _is_leaf(module)}
    if not everything:  # the model itself is the only layer
        everything = leaves = {type(model).__name__: model}
    if layers is None:
        return Selection(leaves, {}, containers={n: m for n, m in everything.items() if n not in leaves})
    if isinstance(layers, Mapping):
        requests = {name: [_known(name, everything)] for name in layers}
        renamed = {str(layers[name]): everything[name] for name in requests}
        if len(renamed) != len(layers):
            raise ValueError(f"Expected argument `layers` to give different names, but got {list(layers.values())}.")
        return Selection(renamed, {name: [str(layers[name])] for name in requests})
    if callable(layers):
        names = [name for name, module in everything.items() if layers(name, module)]
        requests = {getattr(layers, "__name__", repr(layers)): names}
    elif isinstance(layers, Iterable):
        requests = {str(getattr(item, "__name__", item)): _resolve(item, everything, leaves) for item in layers}
    else:
        raise TypeError(
            "Expected argument `layers` to be names, glob patterns, module types, a predicate or a dict,"
            f" but got {given(layers)}."
        )
    chosen = {name for names in requests.values() for name in names}
    if not chosen:
        raise ValueError(f"Expected argument `layers` to select at least one layer, but {layers!r} selects none.")
    modules = {name: module for name, module in everything.items() if name in chosen}
    containers = _containers_of(requests, everything, chosen)
    return Selection(modules, requests, containers=containers)


def _containers_of(
    requests: dict[str, list[str]], everything: Mapping[str, nn.Module], chosen: Collection[str]
) -> dict[str, nn.Module]:
    """The modules with children that a glob pattern fits; each is added to what the pattern stands for."""
    found: dict[str, nn.Module] = {}
    for request, names in requests.items():
        if _is_pattern(request) and request not in everything:
            fitting = [
                n for n, m in everything.items() if fnmatchcase(n, request) and n not in chosen and not _is_leaf(m)
            ]
            names += fitting
            found |= {name: everything[name] for name in fitting}
    return found


def _is_pattern(item: str) -> bool:
    return any(sign in item for sign in "*?[")


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
                f" it has {some(present)}."
            )
        return names
    if not isinstance(item, str):
        raise TypeError(f"Expected argument `layers` to hold names, patterns or module types, but got {given(item)}.")
    if _is_pattern(item) and item not in everything:
        names = [name for name in leaves if fnmatchcase(name, item)]
        return names or [_known(item, everything)]
    return [_known(item, everything)]


def _known(name: str, modules: Mapping[str, nn.Module]) -> str:
    if name in modules:
        return name
    hint = instead_of(name, modules, "The model has")
    raise ValueError(f"Expected argument `layers` to name layers of the model, but it has no layer {name!r}. {hint}")


def summary_of(left_out: Mapping[str, str]) -> str:
    """A short text that counts layers by reason and names a few: ``36 constant (a, b, …), 5 ragged (c, …)``."""
    by_reason: dict[str, list[str]] = {}
    for layer, reason in left_out.items():
        by_reason.setdefault(reason.partition(":")[0], []).append(layer)
    return ", ".join(f"{len(layers)} {reason} ({some(layers)})" for reason, layers in by_reason.items())
