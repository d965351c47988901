"""What functions and operators compute in a forward pass, beside what modules return."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_invariance.model.outputs import all_tensors_of
from lightning_invariance.model.selection import plain_name

#: Receives the name of an operation, its arguments and its output.
OperationConsumer: TypeAlias = Callable[[str, tuple[Any, ...], Any], None]

#: Operators whose names begin with a letter for "reflected" or "in place", as in ``__radd__`` and ``__iadd__``.
OPERATORS = frozenset(["add", "sub", "mul", "truediv", "div", "matmul", "pow", "mod", "floordiv"])

#: Functions without new values: attributes, copies in another shape, type or place, and what takes only a shape.
LEFT_OUT = frozenset(
    [
        *("__get__", "__set__", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "contiguous", "clone"),
        *("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda"),
        *("zeros_like", "ones_like", "full_like", "empty_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    ]
)


class Operations(TorchFunctionMode):
    """Sees every function of tensors that runs while it is active, and names it by the innermost running module.

    ``x + y`` in the forward of ``layer1.0`` is ``layer1.0/add``, the second one of a forward pass ``layer1.0/add#1``. A
    function that calls others is one operation, such as multi-head attention. Views and copies are left out, and so are
    results that a measured module returns, as soon as one forward pass has shown which these are.

    Args:
        consumer: gets name, arguments and output of each operation as soon as it has run, before anything changes it.

    Attributes:
        returned: names of operations whose results a measured module returned.
    """

    def __init__(self, consumer: OperationConsumer) -> None:
        super().__init__()
        self.returned: set[str] = set()
        self._consumer = consumer
        self._running: list[str] = []
        self._calls: dict[str, int] = {}
        # By identity of the result, or of what it is a view of: a reference, its version, the operation.
        self._results: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def start_forward(self) -> None:
        """A forward pass begins."""
        self._running, self._calls, self._results = [], {}, {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and give its result to the consumer."""
        name = "" if not self._running else getattr(func, "__name__", "")
        if not name or name in LEFT_OUT:
            return func(*args, **(kwargs or {}))
        given = _tensors_in(args) + (_tensors_in(tuple(kwargs.values())) if kwargs else [])
        versions = [_version(tensor) for tensor in given]
        output = func(*args, **(kwargs or {}))
        if not given:
            return output
        outputs = [output] if isinstance(output, Tensor) else [tensor for _, tensor in all_tensors_of(output)]
        in_place = name.endswith("_") and (not name.endswith("__") or name.startswith("__i"))
        if in_place or versions != [_version(tensor) for tensor in given]:  # such as F.relu(x, inplace=True)
            found = outputs
        else:
            found = [tensor for tensor in outputs if not _is_view(tensor, given)]
        if found:
            key = f"{self._running[-1]}/{_plain(name)}"
            call = self._calls.get(key, 0)
            self._calls[key] = call + 1
            operation = key if call == 0 else f"{key}#{call}"
            if operation not in self.returned:
                for tensor in map(_whole, found):
                    self._results[id(tensor)] = weakref.ref(tensor), _version(tensor), operation
                self._consumer(operation, args, output)
        return output

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Know which module of a model runs, while the context lasts."""
        handles = []
        try:
            for name, module in model.named_modules():
                entering = self._entering(plain_name(name) or type(model).__name__)
                handles.append(module.register_forward_pre_hook(entering, prepend=True))
                handles.append(module.register_forward_hook(self._leaving, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self._running.append(name)

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()

    def module_returned(self, output: Any) -> None:
        """A measured module has returned this, in this shape or another: no operation is measured for it."""
        for tensor in (_whole(tensor) for _, tensor in all_tensors_of(output)):
            known = self._results.get(id(tensor))
            if known is not None and known[0]() is tensor and known[1] == _version(tensor):
                self.returned.add(known[2])


def _tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among arguments, and in lists among them, as ``torch.cat`` takes them."""
    found = [value for value in values if isinstance(value, Tensor)]
    for value in values:
        if type(value) in (list, tuple):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _whole(tensor: Tensor) -> Tensor:
    """The tensor of which this one is a view with as many values, such as a transpose; otherwise itself."""
    base = tensor._base
    if base is None or base.numel() != tensor.numel() or base.dtype != tensor.dtype:  # such as the real part alone
        return tensor
    return base


def _plain(name: str) -> str:
    """The name of a function without signs of operators and of work in place."""
    plain = name.strip("_")
    return plain[1:] if plain[:1] in ("r", "i") and plain[1:] in OPERATORS else plain


def _is_view(output: Tensor, given: list[Tensor]) -> bool:
    """Whether an output is an argument, or shares its memory with one."""
    try:
        memory = output.untyped_storage().data_ptr()
        return any(each is output or each.untyped_storage().data_ptr() == memory for each in given)
    except (NotImplementedError, RuntimeError):  # tensors without memory of their own, such as sparse ones
        return False
