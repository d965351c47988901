"""Snapshots of everything that a forward pass may change in a model, to put it back."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import is_
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_invariance.random_state import Generator

#: Bytes of tensors that a snapshot copies, the smallest first. Changes of the others are only detected.
LARGEST_COPY = 2**29

#: Containers with more entries are searched for changes of their length alone, and not for state within the entries.
MOST_ENTRIES = 10_000

#: Packages whose objects are not part of a model, although a module may refer to them. Modules and containers are.
FOREIGN = {"lightning", "pytorch_lightning", "lightning_fabric", __name__.partition(".")[0], *sys.stdlib_module_names}

#: What loads samples, which is not part of a model either.
OF_DATA = (Dataset, DataLoader, Sampler)

#: Classes of modules that exchange sharded parameters for whole ones and back. By name: an import would take long.
SHARDING = {"FSDPModule", "FullyShardedDataParallel"}

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, range)


@dataclass
class Values:
    """A tensor with what it was.

    Attributes:
        tensor: the tensor itself.
        alias: another tensor with its memory and shape.
        copy: its values; None for those that are too large.
        version: number of its in-place changes when it was last looked at.
        address: of its memory.
        hides: whether its values have changed while its version did not, as by ``x.data.add_(1)``.
        name: of a parameter or buffer.
    """

    tensor: Tensor
    alias: Tensor
    copy: Tensor | None
    version: int
    address: int
    hides: bool = False
    name: str = ""

    def restore(self, thorough: bool) -> None:
        """Put the values back if they have changed, as far as the version tells, or in fact."""
        version, address = version_of(self.tensor), address_of(self.tensor)
        moved = address != self.address or self.tensor.shape != self.alias.shape
        if thorough and not moved and version == self.version and self.copy is not None:
            self.hides = self.hides or not _equal(self.tensor, self.copy)
        if not (moved or self.hides or version != self.version):
            return
        if self.copy is None:
            raise RuntimeError(
                f"Expected forward to leave large tensors as they are, but it changed {self.name or 'one'} of shape"
                f" {tuple(self.alias.shape)}: measure a copy of the model."
            )
        with torch.no_grad():
            if moved:
                self.tensor.data = self.alias
            self.tensor.copy_(self.copy)
        self.version = version_of(self.tensor)


class Snapshot:
    """The state of a model, or of other objects, which :meth:`restore` puts back.

    State is what can be reached from the model: attributes of modules, of their classes and of objects that they hold,
    containers, values of tensors and arrays, random generators. Whether anything has changed is told by the identity
    of objects and the versions of tensors. Parameters of modules that are sharded (FSDP) are left alone: forward
    exchanges them, and keeps account of it.

    Args:
        root: the model.
        earlier: another snapshot of the model, whose copies of tensors are used where they are equal.
        copies: whether to copy the values of tensors, and leave out what loads samples. Without, it finds generators.

    Attributes:
        generators: the random generators of the model's own.
        parameters: leaves of autograd, with their gradients.
    """

    def __init__(self, root: Any, earlier: Snapshot | None = None, copies: bool = True) -> None:
        self.generators: list[Generator] = []
        self._copies = copies
        self._seen: dict[int, Any] = {}
        self._empty: list[Any] = []
        self._filled: list[tuple[Any, Any, tuple[Any, ...]]] = []  # container, copy, its entries
        self._attributes: list[tuple[Any, Mapping[str, Any]]] = []  # of classes, and of objects with slots
        self._tensors: list[Tensor] = []
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if is_sharded(module):
                for part in module.modules():
                    views = [value for value in vars(part).values() if isinstance(value, Tensor)]
                    alone = (part._parameters, *part._parameters.values(), *views)
                    self._seen.update({id(each): each for each in alone})
        found = [root]
        while found:
            value = found.pop()
            if not isinstance(value, ATOMS) and id(value) not in self._seen:
                self._seen[id(value)] = value
                found += self._keep(value)
        self.parameters = [(t, t.grad) for t in self._tensors if t.is_leaf and t.requires_grad]
        self._random = [(generator, generator.get()) for generator in self.generators]
        self._values = self._copied(root, earlier) if copies else {}

    def restore(self, thorough: bool = False) -> None:
        """Put the state back.

        Args:
            thorough: whether to compare all values of tensors. Tensors that change in secret are found by it, and put
                back at every later call.

        Raises:
            RuntimeError: If a tensor has changed that was too large to be copied.
        """
        self._restore_objects()
        for values in self._values.values():
            values.restore(thorough)
        for parameter, gradient in self.parameters:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for generator, state in self._random:
            generator.set(state)

    def _restore_objects(self) -> None:
        if any(self._empty):
            for container in self._empty:
                container.clear()
        for container, copy, entries in self._filled:
            if not _unchanged(container.values() if isinstance(container, dict) else container, entries):
                container.clear()
                (container.extend if isinstance(container, list | deque) else container.update)(copy)
        for owner, attributes in self._attributes:
            now = _attributes_of(owner)
            if not _unchanged(now.values(), attributes.values()):
                for name in now.keys() - attributes.keys():
                    delattr(owner, name)
                for name in [name for name, value in attributes.items() if now.get(name, now) is not value]:
                    setattr(owner, name, attributes[name])

    def _keep(self, value: Any) -> Iterable[Any]:
        """Keep the state of one object; return the objects that it holds."""
        if isinstance(value, Tensor):
            if not is_lazy(value):
                self._tensors.append(value)
            return vars(value).values()
        if isinstance(value, np.ndarray):
            if value.flags.writeable and value.dtype.kind in "fiub" and value.dtype.isnative:
                self._tensors.append(torch.from_numpy(value))
            return ()
        if (generator := Generator.of(value)) is not None:
            self.generators.append(generator)
            return ()
        if isinstance(value, dict | list | set | deque):
            return self._keep_entries(value)
        return self._keep_object(value)

    def _keep_object(self, value: Any) -> Iterable[Any]:
        if isinstance(value, tuple | frozenset):
            return value
        if isinstance(value, FunctionType | MethodType | partial):
            return _held_by(value)
        if isinstance(value, torch.jit.ScriptModule):
            return (*value.parameters(), *value.buffers())
        if not self._is_part(value):
            return ()
        for cls in type(value).__mro__:
            if not _is_foreign(cls) and id(cls) not in self._seen:
                self._seen[id(cls)] = cls
                self._attributes.append((cls, dict(vars(cls))))
        if slots := _attributes_of(value):
            self._attributes.append((value, slots))
        return (*slots.values(), getattr(value, "__dict__", None))

    def _keep_entries(self, container: Any) -> Iterable[Any]:
        entries = tuple(container.values() if isinstance(container, dict) else container)
        if not entries:
            self._empty.append(container)
            return ()
        self._filled.append((container, dict(container) if isinstance(container, dict) else entries, entries))
        return entries if len(entries) <= MOST_ENTRIES else ()

    def _is_part(self, value: Any) -> bool:
        """Whether an object belongs to the model."""
        if isinstance(value, type | ModuleType):
            return False
        if isinstance(value, nn.Module):
            return not any(
                each is not None and is_lazy(each) for each in value._parameters.values()
            )  # forward initialises it, for good
        if isinstance(value, OF_DATA):
            return not self._copies
        return isinstance(value, SimpleNamespace) or not any(map(_is_foreign, type(value).__mro__[:-1]))

    def _copied(self, root: nn.Module, earlier: Snapshot | None) -> dict[int, Values]:
        names = {id(tensor): name for name, tensor in (*root.named_parameters(), *root.named_buffers())}
        found, size = {}, 0
        for tensor in sorted(self._tensors, key=_bytes_of):
            size += _bytes_of(tensor)
            alias, copy = tensor.detach(), None
            if size <= LARGEST_COPY:
                known = None if earlier is None else earlier._values.get(id(tensor))
                copy = known.copy if known is not None and known.address == address_of(tensor) else None
                copy = alias.clone() if copy is None or not _equal(tensor, copy) else copy
            name = names.get(id(tensor), "")
            found[id(tensor)] = Values(tensor, alias, copy, version_of(tensor), address_of(tensor), name=name)
        return found


def is_sharded(module: nn.Module) -> bool:
    """Whether a module exchanges sharded parameters for whole ones when it runs."""
    return bool(SHARDING.intersection(cls.__name__ for cls in type(module).__mro__))


def version_of(tensor: Tensor) -> int:
    """Number of in-place changes of a tensor; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def address_of(tensor: Tensor) -> int:
    """Where the values of a tensor lie; 0 for layouts without one place."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided else 0


def _is_foreign(cls: type) -> bool:
    home = cls.__module__
    return home.partition(".")[0] in FOREIGN or (
        home.startswith("torch.") and not issubclass(cls, torch.optim.Optimizer)
    )


def _held_by(function: FunctionType | MethodType | partial[Any]) -> Iterable[Any]:
    """The objects that a function remembers: closure, defaults, arguments, ``self``."""
    if isinstance(function, MethodType):
        return (function.__self__,)
    if isinstance(function, partial):
        return function.func, function.args, function.keywords
    cells = (_contents(cell) for cell in function.__closure__ or ())
    return (*cells, function.__defaults__, function.__kwdefaults__)


def _unchanged(now: Collection[Any], entries: Collection[Any]) -> bool:
    return len(now) == len(entries) and (len(entries) > MOST_ENTRIES or all(map(is_, now, entries)))


def _attributes_of(owner: Any) -> Mapping[str, Any]:
    """Name → value: all attributes of a class, or the slots of an object."""
    if isinstance(owner, type):
        return vars(owner)
    slots = (slot for cls in type(owner).__mro__ for slot in _slots_of(cls))
    return {slot: getattr(owner, slot) for slot in slots if hasattr(owner, slot)}


def _slots_of(cls: type) -> Iterable[str]:
    slots = () if _is_foreign(cls) else vars(cls).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [slot for slot in slots if slot not in ("__dict__", "__weakref__")]


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # of a name without a value
        return None


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _equal(tensor: Tensor, copy: Tensor) -> bool:
    """Whether two tensors of one shape have equal bits; for layouts without plain memory, equal values."""
    if tensor.is_meta:
        return True
    if address_of(tensor) and not tensor.is_quantized:
        one, other = (each.detach().contiguous().flatten().view(torch.uint8) for each in (tensor, copy))
        return torch.equal(one, other)
    try:
        one, other = (each.to_dense() if each.layout != torch.strided else each for each in (tensor, copy))
        return torch.equal(one.detach(), other.detach())
    except (RuntimeError, NotImplementedError):  # of a class of tensors without this comparison
        return True
