"""Check before a walk that the sums of all layers fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import torch

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.layer_state import LayerState
from lightning_invariance.accumulators.rows import Rows
from lightning_invariance.engine.registry import INPUT, Registry, wants_intervals
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.messages import number_of
from lightning_invariance.model.channels import channel_axis_in, usual_channel_axis
from lightning_invariance.model.probe import Output
from lightning_invariance.model.sample_axis import Finding, Layout

#: What a layer returns for one input: shape, type, axis of the channels.
Activation: TypeAlias = tuple[tuple[int, ...], torch.dtype, int]

#: The size of sums is computed for so many rows, after which they have their types, and for up to ``MOST_ROWS`` where
#: they grow with the number of rows.
FEW_ROWS, MOST_ROWS = 8, 1024

#: For layers whose rows have more bytes than this, the size of the sums is extrapolated from a part of the activations.
LARGEST_ROW = 2**26

#: Bytes for each activation of the influences of samples (sums, derivatives, weights), and of a column mean in float32.
INFLUENCE, MEAN = 48, 4

#: Default of `state_budget` in bytes where rows are longer than a batch.
DEFAULT_BUDGET = 2**31

#: Where Linux keeps the memory limit of a container.
CONTAINER = Path("/sys/fs/cgroup")

UNITS = ("bytes", "kB", "MB", "GB", "TB")


class OverBudgetError(Exception):
    """The sums of all layers take more memory than they may.

    Attributes:
        needed: bytes that they take.
        budget: bytes that they may take.
        activations: number of activations of all layers.
        parts: what each measure takes, for a message.
    """

    def __init__(self, needed: int, budget: int, activations: int, parts: str) -> None:
        super().__init__(needed, budget, activations, parts)
        self.needed, self.budget, self.activations, self.parts = needed, budget, activations, parts


def check_memory(
    registry: Registry,
    activations: Mapping[str, Activation],
    batch_size: int,
    device: torch.device,
    budget: int | None,
) -> None:
    """Raise where the sums of all layers will not fit.

    Args:
        registry: with the measures.
        activations: of each layer.
        batch_size: largest number of inputs in a block.
        device: where the sums will be.
        budget: bytes that they may take; None for :data:`DEFAULT_BUDGET` where rows are longer than a batch, and else
            for what is free on the device.

    Raises:
        OverBudgetError: If they take more than the budget.
        MemoryError: If they take more than is free.
    """
    if budget is None and len(registry.transformations) > batch_size:
        budget = DEFAULT_BUDGET
    free = free_bytes(device) if budget is None else budget
    if free is None:
        return
    by_measure, total = needed_bytes(registry, activations, batch_size, device)
    if total <= free:
        return
    parts = ", ".join(f"{measure} {readable(size)}" for measure, size in by_measure.items())
    if budget is not None:
        number = sum(math.prod(shape) for shape, *_ in activations.values())
        raise OverBudgetError(total, budget, number, parts)
    of_what = f"the sums of {number_of(len(activations), 'layer')} for {len(registry.transformations)} transformations"
    raise MemoryError(
        f"Expected {of_what} to fit into the {readable(free)} that are free on {device}, but they will take"
        f" {readable(total)} ({parts}). Measure fewer layers with `layers=`, fewer transformations, or with measures"
        " that need less, or give the variances a `state_budget=`: they can do with less, by two walks."
    )


def activations_of(
    outputs: Mapping[str, Output], findings: Mapping[str, Finding], channel_axes: Mapping[str, int]
) -> dict[str, Activation]:
    """What the layers that can be measured return for one input.

    Args:
        outputs: of a probe.
        findings: of the probe.
        channel_axes: see :func:`~lightning_invariance.model.channels.channel_axis_in`.
    """
    found: dict[str, Activation] = {}
    for layer, (output, axis, batch) in outputs.items():
        layout = findings.get(layer)
        values = layout.batch_first(output, batch) if isinstance(layout, Layout) else None
        if values is not None:
            shape = tuple(values.shape[1:])
            dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
            found[layer] = shape, dtype, channel_axis_in(layer, shape, axis, channel_axes)
    return found


def needed_bytes(
    registry: Registry, activations: Mapping[str, Activation], batch_size: int, device: torch.device
) -> tuple[dict[str, int], int]:
    """Bytes of the sums of all layers on a device by measure; and together, with what measures share counted once.

    The parts of rows longer than a batch count, too, where they wait for the others.
    """
    by_measure: dict[str, int] = {}
    total, m = 0, len(registry.transformations)
    sizes: dict[tuple[Accumulator, Activation], int] = {}
    device = device if device.type == "cpu" else torch.device("meta")  # where tensors have a size and no values
    if registry.input_shape is not None:
        shape = registry.input_shape
        dtype = next((dtype for _, dtype, _ in activations.values()), torch.float32)
        names = [INPUT, registry.input_layer] if registry.input_layer else [INPUT]
        activations = {**activations, **dict.fromkeys(names, (shape, dtype, usual_channel_axis(shape)))}
    for name, activation in activations.items():
        shared: dict[Accumulator, int] = {}
        for key, measure in registry.applicable(name, activation[0], activation[2]).items():
            if not names_accumulators(measure):
                continue
            for accumulator in measure.needs:
                about = accumulator, activation
                if about not in sizes:
                    sizes[about] = state_bytes(accumulator, activation, m, registry.expected or MOST_ROWS, device)
                shared[accumulator] = sizes[about]
                by_measure[key] = by_measure.get(key, 0) + sizes[about]
            if name != INPUT and wants_intervals(measure, registry.confidence):
                size = math.prod(activation[0]) * (INFLUENCE + MEAN * m)
                by_measure[key] = by_measure.get(key, 0) + size
                total += size
        total += sum(size for each, size in shared.items() if not _is_included(each, shared))
        if m > batch_size:
            total += m * math.prod(activation[0]) * activation[1].itemsize
    return by_measure, total


def _is_included(accumulator: Accumulator, others: Iterable[Accumulator]) -> bool:
    return any(other != accumulator and other.includes(accumulator) for other in others)


@lru_cache(maxsize=4096)
def state_bytes(accumulator: Accumulator, activation: Activation, m: int, n: int, device: torch.device) -> int:
    """Bytes of the states of an accumulator for one layer and n samples, from rows of zeros; of huge layers, about.

    Remembered, since a network that trains is evaluated many times.
    """
    shape, dtype, axis = activation
    parts = -(-math.prod(shape) // max(1, LARGEST_ROW // (m * dtype.itemsize))) if shape else 1
    some = shape if parts == 1 else (*shape[:-1], -(-shape[-1] // parts))
    rows = torch.zeros((), dtype=dtype, device=device).expand(FEW_ROWS, m, *some)
    numbers = torch.arange(FEW_ROWS)
    layer, size = LayerState([accumulator], some, axis, device=device), -1
    most = min(n, MOST_ROWS) if accumulator.grows else FEW_ROWS
    for before in range(0, most, FEW_ROWS):
        some_rows = min(FEW_ROWS, most - before)
        layer.add(Rows(rows[:some_rows], before + numbers[:some_rows], numbers[:some_rows] % 1, channel_axis=axis))
        if size == (size := layer.nbytes):
            break
    return size if parts == 1 else size * shape[-1] // some[-1]


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had without swapping; None where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    try:  # of a container
        limit = int((CONTAINER / "memory.max").read_text(encoding="ascii"))  # else it is "max"
        used = int((CONTAINER / "memory.current").read_text(encoding="ascii"))
        about = dict(line.split() for line in (CONTAINER / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = int(about["active_file"]) + int(about["inactive_file"])  # of files, which give way
        return min(free, limit - used + cached)
    except (OSError, ValueError, KeyError):
        return free


def readable(size: int) -> str:
    """Bytes with three digits."""
    power = min(len(UNITS) - 1, max(0, (len(str(size)) - 1) // 3))
    return f"{size / 1000**power:.3g} {UNITS[power]}"
