"""Memory of an evaluation, and how its time grows.

    python tests/benchmarks/size.py [--only WORDS]

Prints, and exits with 1 where one is missed: peak memory for 256 and for 8192 samples; time for each sample and
transformation over a factor of 16 of both; and a ResNet-50 at 224×224, its peak and ratio to the bare forward passes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

from lightning_invariance import STLoader, evaluate, rotations

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from speed import TRANSFORMATIONS, alone, machine, variances

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
    """Time for each sample and transformation: at most a quarter longer than with a sixteenth of the work."""
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


def _large(samples: int, layers: Any) -> tuple[float, float, int, int, int]:
    """Seconds of an evaluation and of the bare forward passes, the number of activations, and peak memory in MB: how
    much the evaluation adds to the passes' peak, and the total."""
    model, images = torchvision.models.resnet50(weights=None).eval(), torch.rand(samples, 3, 224, 224)
    batches = [block.inputs.flatten(0, 1) for block in STLoader(images, TRANSFORMATIONS)]
    with torch.no_grad():
        start = time.perf_counter()
        for batch in batches:
            model(batch)
        bare, before = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    start = time.perf_counter()
    result = evaluate(model, images, TRANSFORMATIONS, variances(), layers=layers, progress=False)
    own, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return own, bare, sum(values.numel() for values in result["NormalizedVariance"].values()), peak - before, peak


def large_model() -> bool:
    """At most 1.5 GB for the convolutions, which hold 11 million activations, and 24 GB for all layers."""
    fine = True
    for what, layers, most in (("convolutions", torch.nn.Conv2d, 1536), ("all layers", None, 24 * 1024)):
        own, bare, activations, added, peak = alone(_large, 16, layers)
        print(
            f"ResNet-50 at 224×224, n = 16, m = 16, {what}: {activations / 1e6:.1f} million activations,"
            f" {added / 1024:.2f} GB more than the forward passes, peak {peak / 1024:.1f} GB,"
            f" {own / bare:.2f} × the bare forward passes (one round of {bare:.0f} s)"
        )
        fine &= added <= most and peak <= 24 * 1024
    return fine


PARTS: list[Callable[[], bool]] = [growth, peak_memory, large_model]


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
