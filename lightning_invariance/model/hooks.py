"""Forward hooks that pass the outputs of layers to a consumer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_invariance.model.channels import channel_axis_of
from lightning_invariance.model.operations import Operations
from lightning_invariance.model.outputs import tensors_of
from lightning_invariance.model.selection import Selection
from lightning_invariance.model.snapshot import Snapshot

#: Receives the name of a layer, an output tensor or why it cannot be measured, and the channel axis, counted from the
#: end; None if unknown.
Consumer: TypeAlias = Callable[[str, Tensor | str, int | None], None]

SCRIPTED = "scripted: runs outside of Python, where no hook sees it"


class Catcher:
    """Passes the outputs of selected modules to a consumer, inside the forward hook, before they can be changed.

    Args:
        selection: see the attribute.
        consumer: receives every output.

    Attributes:
        selection: the modules and operations.
        state: of the model, put back after every forward pass.
        output: of the module whose tensors the consumer gets at the moment.
    """

    state: Snapshot
    output: Any = None

    def __init__(self, selection: Selection, consumer: Consumer) -> None:
        self._consumer = consumer
        self.operations = Operations(self._operation) if selection.operations else None
        self.selection = selection
        self._start()

    def _start(self) -> None:
        self._calls: dict[str, int] = {}
        self._runs = 0  # of modules, in this forward pass
        self._entered: list[int] = []  # the value of _runs when each running container began
        # By id of the tensors that modules returned; the reference tells whether the id still belongs to the tensor.
        self._channel_axes: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    @contextmanager
    def forward_pass(self, thorough: bool = False) -> Iterator[None]:
        """Treat everything that runs in this context as one forward pass, after which the model is as before.

        Args:
            thorough: see :meth:`~lightning_invariance.model.snapshot.Snapshot.restore`.
        """
        self._start()
        try:
            if self.operations is None:
                yield
                return
            self.operations.start_forward()
            with self.operations:
                yield
        finally:
            self.state.restore(thorough)

    @contextmanager
    def recording(self, consumer: Consumer) -> Iterator[None]:
        """Pass the outputs of one forward pass to another consumer."""
        usual, self._consumer = self._consumer, consumer
        try:
            with self.forward_pass(thorough=True):
                yield
        finally:
            self._consumer = usual

    def hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """The forward hook of a selected module."""

        def caught(module: nn.Module, args: Any, output: Any) -> None:
            self._runs += 1
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            layer = name if call == 0 else f"{name}#{call}"
            self._give(layer, name, module, args, output)
            if self.operations is not None:
                self.operations.module_returned(output)

        return caught

    def count(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward hook of modules that are not selected, so that their containers do not count as leaves."""
        self._runs += 1

    def enter(self, module: nn.Module, args: Any) -> None:
        """The forward pre-hook of a container."""
        self._entered.append(self._runs)

    def hook_of_container(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """The forward hook of a container, which is measured if no other module ran within it."""
        caught = self.hook(name)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self._entered and self._entered.pop() == self._runs:
                caught(module, args, output)

        return leave

    def _operation(self, operation: str, args: tuple[Any, ...], output: Any) -> None:
        patterns = self.selection.operations
        pattern = next((p for p in patterns if p == operation or fnmatchcase(operation, p)), None)
        if pattern is not None:
            self._give(operation, pattern, None, args, output)

    def _give(self, layer: str, origin: str, module: nn.Module | None, args: Any, output: Any) -> None:
        """Pass every tensor of an output to the consumer, whose sums no autocast and no function mode may change."""
        self.output = output
        with torch._C.DisableTorchFunction():
            for place, tensor in tensors_of(output):
                self.selection.origins.setdefault(layer + place, origin)
                if isinstance(tensor, str):
                    self._consumer(layer + place, tensor, None)
                    continue
                axis = self._channel_axis(module, args, tensor)
                kind = tensor.device.type
                with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
                    self._consumer(layer + place, tensor.detach() if tensor.requires_grad else tensor, axis)
        self.output = None

    def _channel_axis(self, module: nn.Module | None, args: Any, output: Tensor) -> int | None:
        """The channel axis of an output; a module that keeps the shape of its input also keeps its channel axis."""
        of_input = None
        if args and isinstance(args[0], Tensor) and args[0].shape == output.shape:
            known = self._channel_axes.get(id(args[0]))
            of_input = known[1] if known is not None and known[0]() is args[0] else None
        axis = channel_axis_of(module, output, of_input)
        if axis is not None:
            self._channel_axes[id(output)] = weakref.ref(output), axis
        return axis


@contextmanager
def catch_activations(
    model: nn.Module, before: Snapshot, selection: Selection, consumer: Consumer
) -> Iterator[Catcher]:
    """Call ``consumer(layer, output, channel_axis)`` for every output of the selected modules within the context.

    The hooks are removed afterwards, also if forward or the consumer raises. ``before`` is an earlier snapshot.
    """
    catcher = Catcher(selection, consumer)
    within = {module for container in selection.containers.values() for module in container.modules()}
    hooked = {*selection.modules.values(), *selection.containers.values()}
    with ExitStack() as hooks:
        for name, module in _hookable(selection.modules.items()):
            hooks.enter_context(module.register_forward_hook(catcher.hook(name)))
        for name, module in _hookable(selection.containers.items()):
            hooks.enter_context(module.register_forward_pre_hook(catcher.enter))
            hooks.enter_context(module.register_forward_hook(catcher.hook_of_container(name)))
        for _, module in _hookable(("", module) for module in within - hooked):
            hooks.enter_context(module.register_forward_hook(catcher.count))
        if catcher.operations is not None:
            hooks.enter_context(catcher.operations.following(model))
        catcher.state = Snapshot(model, before)
        yield catcher


def _hookable(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in named if not isinstance(module, torch.jit.ScriptModule))


@contextmanager
def transformed_input(module: nn.Module, transform: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply ``transform`` to the first argument of a module within the context."""

    def replaced(module: nn.Module, args: Any) -> Any:
        if not args or not isinstance(args[0], Tensor):
            raise RuntimeError("Expected the module of argument `transform_at` to take a tensor as its first argument.")
        return (transform(args[0]), *args[1:])

    with module.register_forward_pre_hook(replaced):
        yield
