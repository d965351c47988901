"""Exchange small objects, errors, and dicts of tensors to merge between the processes of a distributed run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

#: The types that tensors may have.
DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32, torch.bool)

#: Marks an error that reports the error of another process.
OF_ANOTHER = "of_another_process"

Tensors: TypeAlias = dict[str, Tensor]


def rank_and_world_size(group: Any = None) -> tuple[int, int]:
    """Of this process in a group; ``(0, 1)`` where ``torch.distributed`` is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def gather_objects(value: Any) -> list[Any]:
    """One small object from every process, in the order of ranks."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


class Shared:
    """What the processes tell each other at the end of :func:`errors_shared`.

    Attributes:
        value: of this process.
        values: of all processes, in the order of ranks.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.values: list[Any] = []


@contextmanager
def errors_shared() -> Iterator[Shared]:
    """Raise an error of one process in all of them at the end of the context: the others would wait for it for ever.

    Raises:
        RuntimeError: If another process failed, with its error; ``torch.OutOfMemoryError``, which is one, if it ran out
            of memory. The one that failed raises its error itself.
    """
    error: Exception | None = None
    shared = Shared()
    try:
        yield shared
    except Exception as raised:
        if hasattr(raised, OF_ANOTHER):  # which has told all of them
            raise
        error = raised
    shared.values = _exchanged(shared.value, error)


def any_process(value: bool) -> bool:
    """Whether a value is true in any process; within :func:`errors_shared`, whose errors it raises."""
    return any(_exchanged(value))


def _exchanged(value: Any, error: Exception | None = None) -> list[Any]:
    """A value from every process, in the order of ranks; raises the error of this process or of another one."""
    gathered = gather_objects((None if error is None else repr(error), value))
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(gathered):
        if message is not None:
            kind = torch.OutOfMemoryError if message.startswith("OutOfMemoryError") else RuntimeError
            found = kind(f"Expected all processes to finish the walk, but rank {rank} failed: {message}")
            setattr(found, OF_ANOTHER, True)
            raise found
    return [value for _, value in gathered]


def merge_over_ranks(
    own: Sequence[Tensors],
    merges: Sequence[Callable[[Tensors, Tensors], Tensors]],
    device: torch.device,
    group: Any = None,
) -> list[Tensors]:
    """Merge the dicts of tensors of all processes; they correspond by position.

    All of them travel as one flat message along the chain of ranks, each of which merges its own, and the result
    travels back: a process sends its tensors twice at most and holds one other set, however many there are, and all of
    them end with equal bits.

    Args:
        own: the same names on every process, in the same order, each with the same number of dimensions everywhere.
        merges: ``merge(lower ranks, this rank)`` for each dict.
        device: where messages are made, which the process group must support.
        group: the processes; by default all.

    Returns:
        The merged dicts.
    """
    rank, world_size = rank_and_world_size(group)
    merged = list(own)
    if world_size == 1 or not own:
        return merged
    if rank > 0:
        received = _receive(own, rank - 1, device, group)
        merged = [merge(lower, mine) for merge, lower, mine in zip(merges, received, own, strict=True)]
    if rank < world_size - 1:
        _send(merged, rank + 1, device, group)
        merged = _receive(own, rank + 1, device, group)
    if rank > 0:
        _send(merged, rank - 1, device, group)
    return merged


def pack(dicts: Sequence[Tensors], device: torch.device) -> tuple[Tensor, Tensor]:
    """A header of types and shapes, and all values as bytes."""
    tensors = [tensor for each in dicts for tensor in each.values()]
    about = [number for tensor in tensors for number in (DTYPES.index(tensor.dtype), *tensor.shape)]
    values = [tensor.contiguous().flatten().view(torch.uint8).to(device) for tensor in tensors]
    return torch.tensor(about, dtype=torch.int64, device=device), torch.cat(values)


def unpack(like: Sequence[Tensors], header: Tensor, message: Callable[[int], Tensor]) -> list[Tensors]:
    """The dicts that were packed.

    Args:
        like: dicts of the same names, whose tensors have the same numbers of dimensions and say the devices.
        header: what :func:`pack` gave.
        message: gives the bytes, once their number is known.
    """
    numbers = iter(header.tolist())
    own = [tensor for each in like for tensor in each.values()]
    kinds = [(DTYPES[next(numbers)], torch.Size([next(numbers) for _ in range(tensor.ndim)])) for tensor in own]
    lengths = [shape.numel() * dtype.itemsize for dtype, shape in kinds]
    parts = torch.split(message(sum(lengths)), lengths)
    # Copied, since a part need not begin at a multiple of the size of its type.
    values = iter(
        part.clone().to(tensor.device).view(dtype).view(shape)
        for tensor, (dtype, shape), part in zip(own, kinds, parts, strict=True)
    )
    return [{name: next(values) for name in each} for each in like]


def _send(dicts: Sequence[Tensors], to: int, device: torch.device, group: Any) -> None:
    for tensor in pack(dicts, device):
        dist.send(tensor, _global(to, group), group)


def _receive(like: Sequence[Tensors], source: int, device: torch.device, group: Any) -> list[Tensors]:
    header = torch.empty(
        sum(1 + tensor.ndim for each in like for tensor in each.values()), dtype=torch.int64, device=device
    )
    dist.recv(header, _global(source, group), group)

    def message(length: int) -> Tensor:
        found = torch.empty(length, dtype=torch.uint8, device=device)
        dist.recv(found, _global(source, group), group)
        return found

    return unpack(like, header, message)


def _global(rank: int, group: Any) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
