"""Count kernels and bytes of operations on "meta", a device whose tensors have a size and no values."""

import math

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations that launch nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}


def size_of(tensor: Tensor) -> int:
    """Bytes that a kernel reads or writes: repeated ones once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size if stride else 1 for size, stride in sizes)


class Counted(TorchDispatchMode):
    """Counts while the context lasts.

    Attributes:
        kernels: operations of the device that are not views.
        bytes: size of their inputs and outputs.
        names: names of these operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.names = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not view and func._schema.name.removeprefix("aten::") not in FREE:
            read = tree_leaves((args, {k: v for k, v in (kwargs or {}).items() if k != "out"}))
            moved = [each for each in (*read, *tree_leaves(found)) if isinstance(each, Tensor)]
            if any(each.is_meta for each in moved):
                self.kernels += 1
                self.bytes += sum(map(size_of, moved))
                self.names.append(func._schema.name.removeprefix("aten::"))
        return found
