"""Tracking of the tensors that a forward pass computes from its input, whatever their values are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: Kernels whose result depends on the shape of their argument, not on its values.
OF_SHAPES = frozenset(
    [
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    ]
)


class Dependence(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """While active, tracks the tensors that kernels compute from some inputs.

    Args:
        inputs: the inputs.
    """

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._dependent = {memory_of(inputs)}
        self._kept: list[Any] = [inputs]  # memory that is freed could be reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a kernel; its results are dependent if one of its arguments is."""
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in OF_SHAPES and any(self.holds(each) for each in _tensors((args, kwargs))):
            results = _tensors(output)
            self._kept += results
            self._dependent |= {memory_of(each) for each in results}
        return output

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed from the inputs."""
        return memory_of(tensor) in self._dependent


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in _pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def memory_of(tensor: Tensor) -> int:
    """An identifier of a tensor's memory, equal for its views."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # tensors without storage, such as sparse ones
        return id(tensor)
