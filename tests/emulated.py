"""An accelerator that this machine does not have, emulated by the CPU: as strict with its tensors as a GPU is.

And what its tests need of an NVIDIA GPU where there is one.
"""

import warnings
from concurrent.futures import Future, ProcessPoolExecutor

import torch
from ranks import CONTEXT
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

#: The type of the device.
NAME = "emulated"

#: Operations that take tensors of the CPU together with tensors of a device: indices, and values to copy.
MIXING = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_"}

#: Operations after which the CPU has waited for the device.
READING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"}


class OnDevice(Tensor):
    """A tensor that says it is on the device, whose values ``inner`` are on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            inner.stride(),
            inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} outside of an Emulation")

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"OnDevice({self.inner!r})"


class Emulation(TorchDispatchMode):
    """Runs the operations of the device on the CPU, and raises where the device would.

    Attributes:
        float64: whether the device has that type.
        operations: how many there were.
        read: names of the operations that made the CPU wait.
    """

    float64 = True

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.read = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        wrappers = {id(each.inner): each for each in given if isinstance(each, OnDevice)}
        if wrappers and name not in MIXING and any(not isinstance(t, OnDevice) and t.ndim for t in given):
            raise RuntimeError(f"Expected all tensors of {name} to be on {NAME}, but some are on the CPU.")
        here = bool(wrappers)
        if (asked := kwargs.get("device")) is not None:
            here = torch.device(asked).type == NAME
            kwargs["device"] = "cpu" if here else asked
        if wrappers and (name in READING or not here):
            self.read.append(name)
        if name == "_to_copy" and wrappers:  # which converts before it copies
            self._check(kwargs.get("dtype") or given[0].dtype)
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
        found = func(*args, **kwargs)
        self.operations += here
        return tree_map(lambda x: self._wrapped(x, wrappers) if here and isinstance(x, Tensor) else x, found)

    def _wrapped(self, tensor: Tensor, wrappers: dict[int, OnDevice]) -> Tensor:
        if id(tensor) in wrappers:  # changed in place
            return wrappers[id(tensor)]
        self._check(tensor.dtype)
        return OnDevice(tensor)

    def _check(self, dtype: torch.dtype) -> None:
        if dtype == torch.float64 and not self.float64:
            raise TypeError(f"Cannot convert a tensor to {NAME}, which does not support float64.")


def _install(float64: bool) -> None:
    class Module(backend_registration._DummyBackendModule):
        """``torch.emulated``, whose random generator has its last seed for a state."""

        seed = 0

        def manual_seed_all(self, seed):
            self.seed = seed

        def get_rng_state(self):
            return torch.tensor([self.seed])

        def set_rng_state(self, state):
            self.seed = int(state)

    torch.set_num_threads(1)
    Emulation.float64 = float64
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    library = torch.library.Library("aten", "IMPL")

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return OnDevice(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        target.inner.copy_(source.inner if isinstance(source, OnDevice) else source)
        return target

    # PyTorch makes tensors of lists of indices below all modes.
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    _installed.append(library)


_installed: list[torch.library.Library] = []


def process_with_device(float64: bool) -> ProcessPoolExecutor:
    """A process of its own that has the device, since a device type cannot be taken away again."""
    return ProcessPoolExecutor(1, CONTEXT, _install, (float64,))


class Watched(TorchDispatchMode):
    """Operations on an NVIDIA GPU, with float32 products as exact as on the CPU.

    Attributes:
        operations: how many there were.
        read: what PyTorch said each time that the CPU waited for the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations, self._recorded = 0, warnings.catch_warnings(record=True)

    def __enter__(self):
        self._rounded = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        self._said = self._recorded.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.cuda.set_sync_debug_mode("default")
        self._recorded.__exit__(*error)
        torch.backends.cudnn.allow_tf32 = self._rounded

    @property
    def read(self) -> list[str]:
        return [str(each.message) for each in self._said if "synchronizing CUDA operation" in str(each.message)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.operations += any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves(found))
        return found


class ThisProcess:
    """An executor that calls functions at once."""

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future
