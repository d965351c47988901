"""What measuring costs in memory and messages, and how the cost grows.

    python tests/benchmarks/size.py [--only WORDS]

Prints, and exits with 1 where one is missed: peak memory for 256 and for 8192 samples; time for each sample and
transformation over a factor of 16 of both; the numbers kept for each activation; the bytes that each process of a
distributed run sends; the kernels and bytes of a block on a device, counted without one; and a ResNet-50 at 224×224,
its states, peak and ratio to the bare forward passes.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision

from lightning_invariance import STLoader, evaluate, rotations
from lightning_invariance.engine.registry import Registry
from lightning_invariance.engine.walk import Session
from lightning_invariance.measures import (
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    TransformationDistance,
    VarianceSameEquivariance,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from counting import counted
from speed import MODELS, TRANSFORMATIONS, alone, machine, variances

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from models import simple_conv


def peak_of(samples: int) -> int:
    """Peak memory in MB of this process after evaluating SimpleConv-8 on so many samples."""
    # One image repeated: the data themselves take no memory, whatever their number.
    images = torch.rand(1, 3, 32, 32).expand(samples, -1, -1, -1)
    evaluate(simple_conv(3, 32, 8), images, TRANSFORMATIONS, variances(), progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def peak_memory() -> bool:
    """At most 2 % more for 32 times as many samples."""
    small, large = alone(peak_of, 256), alone(peak_of, 8192)
    print(f"peak memory of a process, SimpleConv-8: {small} MB for n = 256, {large} MB for n = 8192")
    return large <= 1.02 * small


def growth() -> bool:
    """Time for each sample and transformation: no more than a quarter above that of a sixteenth of the work."""
    model = simple_conv(3, 32, 16).eval()
    fine = True
    for what, sizes in (("n", (32, 128, 512)), ("m", (4, 16, 64))):
        found = {}
        for size in sizes:
            n, m = (size, 16) if what == "n" else (64, size)
            images, times = torch.rand(n, 3, 32, 32), []
            for _ in range(4):
                start = time.perf_counter()
                evaluate(model, images, rotations(m), variances(), progress=False)
                times.append(time.perf_counter() - start)
            found[size] = 1e3 * statistics.median(times[1:]) / (n * m)
        print(f"ms for each sample and transformation, SimpleConv-16, {what}: "
              + ", ".join(f"{value:.3f} for {size}" for size, value in found.items()))  # fmt: skip
        fine &= found[sizes[-1]] <= 1.25 * found[sizes[0]]
    return fine


def states_of(model: torch.nn.Module, images: torch.Tensor, layers: Any = None) -> tuple[int, int, int]:
    """Numbers and bytes of the states of all layers at the end of a walk, and the number of activations."""
    counted: list[tuple[int, int, int]] = []
    walk = Session.walk

    def counting(self: Session, *args: Any, **options: Any) -> Registry:
        registry = walk(self, *args, **options)
        layers = registry.layers.values()
        states = [state for layer in layers for tally in layer.first for state in tally.states.values()]
        activations = sum(math.prod(layer.shape) for layer in layers)
        counted.append((sum(s.numel() for s in states), sum(s.nbytes for s in states), activations))
        return registry

    Session.walk = counting  # type: ignore[method-assign]
    try:
        evaluate(model, images, TRANSFORMATIONS, variances(), layers=layers, progress=False)
    finally:
        Session.walk = walk  # type: ignore[method-assign]
    return counted[0]


def state_numbers() -> bool:
    """At most m + 4 numbers for each activation."""
    numbers, size, activations = states_of(MODELS["SimpleConv-32"]().eval(), torch.rand(64, 3, 32, 32))
    each, most = numbers / activations, len(TRANSFORMATIONS) + 4
    print(
        f"states of the variances, SimpleConv-32: {each:.2f} numbers for each of {activations} activations"
        f" (m + 4 = {most}), {size / 2**20:.0f} MB"
    )
    return each <= most


def _send_and_count(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    sent, send = [], dist.send

    def counting(tensor: torch.Tensor, *args: Any) -> None:
        sent.append(tensor.nbytes)
        send(tensor, *args)

    dist.send = counting
    torch.manual_seed(0)
    _, size, _ = states_of(simple_conv(3, 32, 8).eval(), torch.rand(32, 3, 32, 32))
    torch.save((sum(sent), size), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def messages() -> bool:
    """Each process sends at most twice its states, however many there are."""
    fine = True
    for world_size in (2, 3, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(_send_and_count, (world_size, folder), world_size, start_method="spawn")
            parts = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world_size)]
        sent = ", ".join(f"{of_rank / size:.2f}" for of_rank, size in parts)
        print(f"bytes sent / bytes of states, {world_size} processes: {sent} ({parts[0][1] / 2**20:.1f} MB)")
        # And the header that tells the shapes.
        fine &= all(of_rank <= 2.01 * size for of_rank, size in parts)
    return fine


def _large(samples: int, layers: Any) -> tuple[float, float, int, int, int]:
    model, images = torchvision.models.resnet50(weights=None).eval(), torch.rand(samples, 3, 224, 224)
    batches = [block.inputs.flatten(0, 1) for block in STLoader(images, TRANSFORMATIONS)]
    with torch.no_grad():
        start = time.perf_counter()
        for batch in batches:
            model(batch)
        bare = time.perf_counter() - start
    start = time.perf_counter()
    _, size, activations = states_of(model, images, layers)
    own = time.perf_counter() - start
    return own, bare, size, activations, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def large_model() -> bool:
    """At most 1.2 GB of states for the convolutions, which hold 11 million activations, and 24 GB for all layers."""
    fine = True
    for what, layers, most in (("convolutions", torch.nn.Conv2d, 1.2e9), ("all layers", None, 24e9)):
        own, bare, size, activations, peak = alone(_large, 16, layers)
        print(
            f"ResNet-50 at 224×224, n = 16, m = 16, {what}: {activations / 1e6:.1f} million activations,"
            f" {size / 1e9:.2f} GB of states, peak {peak / 1024:.1f} GB,"
            f" {own / bare:.2f} × the bare forward passes (one round of {bare:.0f} s)"
        )
        fine &= size <= most and peak <= 24 * 1024
    return fine


def device_kernels() -> bool:
    """Fewer than 24 kernels for a block and family by PyTorch's operations on a device, and 24 times its bytes."""
    fine = True
    block = torch.empty(8, 16, 64, 14, 14)  # of which only the shape counts
    same = {"transformations": TRANSFORMATIONS}
    families = {
        "NV": NormalizedVariance(),
        "the monitor's default": NormalizedVariance(response=True),
        "NV of standard deviations": NormalizedVariance(squared=False),
        "TD": TransformationDistance(),
        "TD of angles": TransformationDistance("cosine", over="channel"),
        "ND": NormalizedDistance(),
        "Goodfellow": Goodfellow(),
        "variance same-equivariance": VarianceSameEquivariance(**same),
        "distance same-equivariance": DistanceSameEquivariance(**same),
    }
    for name, measure in families.items():
        found = counted(measure, block)
        times = found.bytes / block.nbytes
        print(
            f"a block of {tuple(block.shape)} on a device: {found.kernels:3d} kernels, {times:5.1f} × its bytes: {name}"
        )
        fine &= found.kernels < 24 and times < 24
    print("(and one of Triton's and its sum of changes for NV and the default, where Triton is)")
    return fine


PARTS: list[Callable[[], bool]] = [device_kernels, state_numbers, messages, growth, peak_memory, large_model]


def main() -> int:
    """Print every figure; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"one of {', '.join(part.__name__ for part in PARTS)}")
    options = parser.parse_args()
    print(machine())
    missed = [part for part in PARTS if options.only in part.__name__ and not part()]
    for part in missed:
        print(f"MISSED: {part.__doc__}")
    return int(bool(missed))


if __name__ == "__main__":
    multiprocessing.freeze_support()
    sys.exit(main())
