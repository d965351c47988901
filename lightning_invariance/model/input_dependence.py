"""Tracking of the tensors that a forward pass computes from its input, whatever their values are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_invariance.model.outputs import all_tensors_of

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
        arguments = (tensor for _, tensor in all_tensors_of((args, kwargs)))
        if func.overloadpacket.__name__ not in OF_SHAPES and any(map(self.holds, arguments)):
            results = [tensor for _, tensor in all_tensors_of(output)]
            self._kept += results
            self._dependent |= {memory_of(tensor) for tensor in results}
        return output

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed from the inputs."""
        return memory_of(tensor) in self._dependent


def memory_of(tensor: Tensor) -> int:
    """An identifier of a tensor's memory, equal for its views."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # tensors without storage, such as sparse ones
        return id(tensor)
