"""Joining what the processes of a distributed run have measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from lightning_invariance.measures.base import Measure, States

#: The types that states may have.
DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32, torch.bool)


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


def gather_or_raise(value: Any, error: BaseException | None) -> list[Any]:
    """One small object from every process, unless one of them failed: then no process waits for it.

    Raises:
        RuntimeError: If another process failed, with its error; ``torch.OutOfMemoryError``, which is one, if it ran out
            of memory. The one that failed raises its error itself.
    """
    told = gather_objects((value, None if error is None else repr(error)))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(told):
        if message is not None:
            kind = torch.OutOfMemoryError if message.startswith("OutOfMemoryError") else RuntimeError
            raise kind(f"Expected all processes to finish the walk, but rank {rank} failed: {message}")
    return [value for value, _ in told]


def merge_over_ranks(measures: Sequence[Measure], device: torch.device, group: Any = None) -> int:
    """Give the measures of every process the merged states of all; measures correspond by position.

    The states of all measures travel as one flat message along the chain of ranks, each of which merges its own, and
    the result travels back: a process sends its states twice at most and holds one other set, however many there are,
    and all of them end with the same bits.

    Args:
        measures: the same on every process, in the same order; those of a process without samples are empty.
        device: where messages are made, which the process group must support.
        group: the processes; by default all.

    Returns:
        The number of bytes that this process sent.
    """
    rank, world_size = rank_and_world_size(group)
    if world_size == 1 or not measures:
        return 0
    sent = 0
    if rank > 0:
        for measure, states in zip(measures, _receive(measures, rank - 1, device, group), strict=True):
            measure._reduce_states(states)
    if rank < world_size - 1:
        sent += _send(measures, rank + 1, device, group)
        for measure, states in zip(measures, _receive(measures, rank + 1, device, group), strict=True):
            measure._set_states(states)
    if rank > 0:
        sent += _send(measures, rank - 1, device, group)
    return sent


def _send(measures: Sequence[Measure], to: int, device: torch.device, group: Any) -> int:
    states = [getattr(measure, name) for measure in measures for name in measure._defaults]
    about = [number for state in states for number in (DTYPES.index(state.dtype), *state.shape)]
    header = torch.tensor(about, dtype=torch.int64, device=device)
    message = torch.cat([state.to(device).contiguous().flatten().view(torch.uint8) for state in states])
    for tensor in (header, message):
        dist.send(tensor, _global(to, group), group)
    return header.nbytes + message.nbytes


def _receive(measures: Sequence[Measure], source: int, device: torch.device, group: Any) -> list[States]:
    own = [getattr(measure, name) for measure in measures for name in measure._defaults]
    # A state has the same number of dimensions on every process, so that the length of the header is known.
    header = torch.empty(sum(1 + state.ndim for state in own), dtype=torch.int64, device=device)
    dist.recv(header, _global(source, group), group)
    numbers, kinds = iter(header.tolist()), []
    for state in own:
        dtype = DTYPES[next(numbers)]
        kinds.append((dtype, torch.Size([next(numbers) for _ in range(state.ndim)])))
    lengths = [shape.numel() * dtype.itemsize for dtype, shape in kinds]
    message = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
    dist.recv(message, _global(source, group), group)
    # Copied, since a part need not begin where its type may.
    values = iter(
        part.clone().view(dtype).view(shape).to(state.device)
        for state, (dtype, shape), part in zip(own, kinds, torch.split(message, lengths), strict=True)
    )
    return [{name: next(values) for name in measure._defaults} for measure in measures]


def _global(rank: int, group: Any) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
