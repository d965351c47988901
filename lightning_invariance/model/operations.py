"""Results of functions and operators in a forward pass, as additional layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_invariance.model.input_dependence import memory_of
from lightning_invariance.model.outputs import all_tensors_of
from lightning_invariance.model.selection import OF, plain_name
from lightning_invariance.model.snapshot import version_of

#: Receives the name of an operation, its arguments and its output.
OperationConsumer: TypeAlias = Callable[[str, tuple[Any, ...], Any], None]

#: Operators with reflected and in-place variants, such as ``__radd__`` and ``__iadd__``.
OPERATORS = frozenset(["add", "sub", "mul", "truediv", "div", "matmul", "pow", "mod", "floordiv"])

#: Functions that compute no new values: attributes, copies, conversions, and functions of a shape.
LEFT_OUT = frozenset(
    [
        *("__get__", "__set__", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "contiguous", "clone"),
        *("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"),
        *("zeros_like", "ones_like", "full_like", "empty_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    ]
)


class Operations(TorchFunctionMode):
    """While active, observes every function of tensors, and names it after the innermost running module.

    ``x + y`` in the forward of ``layer1.0`` is ``layer1.0-add``, the second one of a forward pass ``layer1.0-add#1``. A
    function that calls others, such as multi-head attention, is one operation. Views and copies are left out, and from
    the second forward pass on results that a measured module returns.

    Args:
        consumer: receives name, arguments and output of each operation directly after it, before the output can change.

    Attributes:
        names: of all operations so far.
        returned: names of operations whose results a measured module returned.
    """

    def __init__(self, consumer: OperationConsumer) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.returned: set[str] = set()
        self._consumer = consumer
        self._running: list[str] = []
        self._calls: dict[str, int] = {}
        # By id of the result, or of the tensor that it is a view of: a reference, its version, the operation.
        self._results: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def start_forward(self) -> None:
        """Begin a forward pass."""
        self._running, self._calls, self._results = [], {}, {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and pass its result to the consumer."""
        name = "" if not self._running else getattr(func, "__name__", "")
        if not name or name in LEFT_OUT:
            return func(*args, **(kwargs or {}))
        given = [tensor for _, tensor in all_tensors_of((args, kwargs or {}))]
        versions = [version_of(tensor) for tensor in given]
        output = func(*args, **(kwargs or {}))
        if not given:
            return output
        outputs = [output] if isinstance(output, Tensor) else [tensor for _, tensor in all_tensors_of(output)]
        in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("__i"))
        if not in_place and versions == [version_of(tensor) for tensor in given]:  # unlike F.relu(x, inplace=True)
            memory = {memory_of(tensor) for tensor in given}
            outputs = [tensor for tensor in outputs if memory_of(tensor) not in memory]  # without views
        if outputs:
            key = f"{self._running[-1]}{OF}{_plain(name)}"
            call = self._calls.get(key, 0)
            self._calls[key] = call + 1
            operation = key if call == 0 else f"{key}#{call}"
            self.names.add(operation)
            if operation not in self.returned:
                for tensor in map(_whole, outputs):
                    self._results[id(tensor)] = weakref.ref(tensor), version_of(tensor), operation
                self._consumer(operation, args, output)
        return output

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Track which module of a model runs, within the context."""
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                entering = self._entering(plain_name(name) or type(model).__name__)
                hooks.enter_context(module.register_forward_pre_hook(entering, prepend=True))
                hooks.enter_context(module.register_forward_hook(self._leaving, always_call=True))
            yield

    def _entering(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self._running.append(name)

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()

    def module_returned(self, output: Any) -> None:
        """Note the output of a measured module: operations with this result, in any shape, are not measured."""
        for tensor in (_whole(tensor) for _, tensor in all_tensors_of(output)):
            known = self._results.get(id(tensor))
            if known is not None and known[0]() is tensor and known[1] == version_of(tensor):
                self.returned.add(known[2])


def _whole(tensor: Tensor) -> Tensor:
    """The base of a view with equal values, such as a transpose; otherwise the tensor itself."""
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or base.dtype != tensor.dtype:  # such as the real part
        return tensor
    return base


def _plain(name: str) -> str:
    """The name of a function without marks of operators and in-place variants."""
    plain = name.strip("_")
    return plain[1:] if plain[:1] in ("r", "i") and plain[1:] in OPERATORS else plain
