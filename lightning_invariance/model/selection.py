"""Selection of the modules and operations that are layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_invariance.messages import given, instead_of, some

#: A request for layers: see :func:`layer_names`.
Layers: TypeAlias = (
    str
    | type[nn.Module]
    | Iterable[str | type[nn.Module]]
    | Mapping[str, str]
    | Callable[[str, nn.Module], bool]
    | None
)

#: Attributes in which the wrappers of ``torch.compile`` and of Fabric hold the model.
WRAPPED = ("_orig_mod", "_forward_module")

#: Parts that ``torch.compile``, FSDP and activation checkpointing add to the names of modules.
ADDED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

#: The name that ``torch.nn.utils.parametrize`` gives to modules that compute weights.
PARAMETRIZED = "parametrizations"

#: Stands between the name of a module and the name of an operation. No logger takes it for a folder.
OF = "-"

NOTHING_RAN = (
    "The hooks of the selected modules never fired: scripted, traced or exported models have none, and neither has"
    " `module.forward(x)`, which must be `module(x)`."
)


@dataclass
class Selection:
    """The selected modules and operations.

    Attributes:
        modules: layer name (renamed by a dict) → module, in the order of the model.
        requests: what the user wrote → the layer names it selected; empty if all leaf modules are selected by default.
        containers: name → module with children, which is a layer if none of its children runs, such as an
            ``nn.MultiheadAttention``, whose ``out_proj`` only holds weights.
        operations: patterns of the names of operations, such as ``"layer*-add"``.
        origins: layer → the selected name it comes from, for layers that ran; filled while the model runs.
    """

    modules: dict[str, nn.Module]
    requests: dict[str, list[str]]
    containers: dict[str, nn.Module] = field(default_factory=dict)
    operations: Sequence[str] = ()
    origins: dict[str, str] = field(default_factory=dict)

    def origin_of(self, layer: str) -> str:
        """The selected name that a layer comes from; derived from its name if it only ran in other processes."""
        form = layer.partition("[")[0]
        return self.origins.get(layer) or (form.rpartition("#")[0] if "#" in form else form)

    def asks_for(self, layer: str) -> bool:
        """Whether the user asked for a layer, by its name, type or a predicate rather than by a pattern."""
        origin = self.origin_of(layer)
        return any(origin in names and not _has_wildcards(request) for request, names in self.requests.items())

    def types_of(self, layers: Iterable[str]) -> dict[str, str]:
        """Layer → class of its module, or name of the operation."""
        found: dict[str, str] = {}
        for layer in layers:
            origin = self.origin_of(layer)
            module = self.modules.get(origin, self.containers.get(origin))
            found[layer] = layer.rpartition(OF)[2].partition("#")[0] if module is None else type(module).__name__
        return found

    def check_measured(self, measured: Iterable[str], left_out: Mapping[str, str]) -> None:
        """Check that every request was measured.

        Args:
            measured: layers.
            left_out: layer → why it cannot be measured.

        Raises:
            RuntimeError: If nothing was measured, a requested layer never ran, or a layer requested by name cannot be
                measured.
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
                + (
                    f"all were left out: {summary_of(left_out)}. {_one_of(left_out)}."
                    if left_out
                    else f"none ran. {NOTHING_RAN}"
                )
            )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile``, distributed training and Fabric."""
    while True:
        inner = next((name for name in WRAPPED if name in model._modules), None)
        if inner is None and isinstance(model, DataParallel | DistributedDataParallel):
            inner = "module"
        if inner is None:
            return model
        model = model.get_submodule(inner)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module, as if no module were compiled, sharded or checkpointed."""
    return {plain_name(name): module for name, module in model.named_modules()}


def plain_name(name: str) -> str:
    """Remove the parts that wrappers add to the name of a module."""
    return ".".join(part for part in name.split(".") if part not in ADDED)


def select_layers(model: nn.Module, layers: Layers = None, operations: bool = False) -> Selection:
    """Resolve a request for layers; see :func:`layer_names`.

    Args:
        model: any module.
        layers: what to select.
        operations: whether to select all operations, too.
    """
    if isinstance(layers, nn.Module):
        raise TypeError(
            f"Expected argument `layers` to be names, glob patterns, module types, a predicate or a dict, but got a"
            f" {type(layers).__name__}: give its name, one of `layer_names(model)`."
        )
    if isinstance(layers, str | type):
        layers = [layers]
    of_operations: list[str] = []
    if isinstance(layers, Iterable) and not isinstance(layers, Mapping):
        items = list(layers)
        of_operations = [item for item in items if isinstance(item, str) and _is_of_operation(item, model)]
        layers = [item for item in items if item not in of_operations]
    selection = Selection({}, {}) if of_operations and not layers else _select_modules(model, layers)
    of_operations = [item.replace("/", OF) for item in of_operations]
    selection.requests |= {pattern: [pattern] for pattern in of_operations}
    selection.operations = [*of_operations, "*"] if operations else of_operations
    return selection


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module of argument ``transform_at``."""
    modules = {known: module for known, module in named_modules(unwrapped(model)).items() if known}
    if name not in modules:
        raise ValueError(
            f"Expected argument `transform_at` to name a module of the model, but got {given(name)}."
            f" {instead_of(str(name), modules)}"
        )
    return modules[name]


def _select_modules(model: nn.Module, layers: Layers) -> Selection:
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise RuntimeError(f"Expected at least one layer that can be measured, but none ran. {NOTHING_RAN}")
    named = named_modules(model).items()
    modules = {name: module for name, module in named if name and PARAMETRIZED not in name.split(".")}
    if not modules:  # the model itself is the only layer
        modules = {type(model).__name__: model}
    if layers is None:
        leaves = {name: module for name, module in modules.items() if _is_leaf(module)}
        return Selection(leaves, {}, {name: module for name, module in modules.items() if name not in leaves})
    if isinstance(layers, Mapping):
        renamed = {str(layers[name]): modules[_known(name, modules)] for name in layers}
        if len(renamed) != len(layers):
            raise ValueError(f"Expected argument `layers` to give different names, but got {list(layers.values())}.")
        return Selection(renamed, {name: [str(layers[name])] for name in layers})
    if callable(layers):
        names = [name for name, module in modules.items() if layers(name, module)]
        requests = {getattr(layers, "__name__", type(layers).__name__): names}
    elif isinstance(layers, Iterable):
        requests = {str(getattr(item, "__name__", item)): _resolve(item, modules) for item in layers}
    else:
        raise TypeError(
            "Expected argument `layers` to be names, glob patterns, module types, a predicate or a dict,"
            f" but got {given(layers)}."
        )
    chosen = {name for names in requests.values() for name in names}
    if not chosen:
        raise ValueError(f"Expected argument `layers` to select at least one layer, but {layers!r} selects none.")
    others = {name: module for name, module in modules.items() if name not in chosen and not _is_leaf(module)}
    containers: dict[str, nn.Module] = {}
    for pattern in (request for request in requests if _is_pattern(request, modules)):
        matching = [name for name in others if fnmatchcase(name, pattern)]
        requests[pattern] += matching
        containers |= {name: others[name] for name in matching}
    return Selection({name: module for name, module in modules.items() if name in chosen}, requests, containers)


def _is_of_operation(item: str, model: nn.Module) -> bool:
    """Whether an item names operations: as ``layer1.0-add``, which no module is called, or as ``layer1.0/add``."""
    return "/" in item or (OF in item and not any(fnmatchcase(name, item) for name in named_modules(model)))


def _is_leaf(module: nn.Module) -> bool:
    return not any(name != PARAMETRIZED for name, _ in module.named_children())


def _is_pattern(item: str, modules: Mapping[str, nn.Module]) -> bool:
    return item not in modules and _has_wildcards(item)


def _has_wildcards(item: str) -> bool:
    return any(sign in item for sign in "*?[")


def _resolve(item: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names that one item of a list selects."""
    if isinstance(item, type) and issubclass(item, nn.Module):
        names = [name for name, module in modules.items() if isinstance(module, item)]
        if not names:
            present = sorted({type(module).__name__ for module in modules.values()})
            raise ValueError(
                f"Expected argument `layers` to name types in the model, but it has no {item.__name__};"
                f" it has {some(present)}."
            )
        return names
    if not isinstance(item, str):
        raise TypeError(f"Expected argument `layers` to hold names, patterns or module types, but got {given(item)}.")
    names = []
    if _is_pattern(item, modules):
        names = [name for name, module in modules.items() if fnmatchcase(name, item) and _is_leaf(module)]
    return names or [_known(item, modules)]


def _known(name: str, modules: Mapping[str, nn.Module]) -> str:
    if name in modules:
        return name
    hint = instead_of(name, modules, "The model has")
    raise ValueError(f"Expected argument `layers` to name layers of the model, but it has no layer {name!r}. {hint}")


def _one_of(left_out: Mapping[str, str]) -> str:
    layer, reason = next(iter(left_out.items()))
    return f"Layer {layer!r} is {reason}"


def summary_of(left_out: Mapping[str, str]) -> str:
    """Count layers by reason and name a few: ``36 constant (a, b, …), 5 ragged (c, …)``."""
    by_reason: dict[str, list[str]] = {}
    for layer, reason in left_out.items():
        by_reason.setdefault(reason.partition(":")[0], []).append(layer)
    return ", ".join(f"{len(layers)} {reason} ({some(layers)})" for reason, layers in by_reason.items())
