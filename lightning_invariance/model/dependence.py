"""Which tensors are computed from the input of a forward pass, whatever their values are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

#: Kernels that take only the shape of their argument.
OF_SHAPES = frozenset(
    [
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    ]
)


class Dependence(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Follows what kernels compute from some inputs, while it is active.

    Args:
        inputs: what everything else is computed from.
    """

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._dependent = {_memory(inputs)}
        self._kept: list[Any] = [inputs]  # memory that is freed would be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a kernel; what it computes from a dependent tensor is dependent."""
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in OF_SHAPES and any(self.holds(each) for each in _tensors((args, kwargs))):
            results = _tensors(output)
            self._kept += results
            self._dependent |= {_memory(each) for each in results}
        return output

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed from the inputs."""
        return _memory(tensor) in self._dependent


def _tensors(tree: Any) -> list[Tensor]:
    return [each for each in _pytree.tree_leaves(tree) if isinstance(each, Tensor)]


def _memory(tensor: Tensor) -> int:
    """The place of a tensor's values, which its views share."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)
