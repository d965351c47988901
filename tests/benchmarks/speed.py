"""What measuring costs: time against the bare forward passes, and memory against the number of samples.

    python tests/benchmarks/speed.py [--rounds 5] [--samples 256] [--only WORDS]

Each round runs the bare forward passes over the transformed inputs, batch for batch and without hooks, and then
evaluate() over the same inputs, which it transforms itself; the ratio is taken in each round. Exits with 1 where a
target is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchmetrics import Metric

from lightning_invariance import STLoader, evaluate, rotations
from lightning_invariance.measures import (
    Anova,
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    SampleVariance,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from models import simple_conv

TRANSFORMATIONS = rotations(16)


def resnet18() -> nn.Module:
    """torchvision's ResNet-18 with the stem for CIFAR: one 3×3 convolution, no pooling."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SimpleConv-32": lambda: simple_conv(3, 32, 32),
    "SimpleConv-128": lambda: simple_conv(3, 32, 128),
    "CIFAR ResNet-18": resnet18,
}


def variances() -> list[Metric]:
    """The family that shares its sums."""
    return [NormalizedVariance(), TransformationVariance(), SampleVariance(), Anova()]


def distances() -> list[Metric]:
    """The second family."""
    return [TransformationDistance(), SampleDistance(), NormalizedDistance()]


def all_measures() -> list[Metric]:
    """Every measure; Goodfellow's second pass is another forward pass over everything."""
    same = [VarianceSameEquivariance(mask=True), DistanceSameEquivariance(mask=True)]
    return [*variances(), *distances(), Goodfellow(), *same]


CASES: list[tuple[str, str, Callable[[], list[Metric]], float | None]] = [
    # what, model, measures, the largest ratio that is accepted
    ("NV, SimpleConv-32", "SimpleConv-32", lambda: [NormalizedVariance()], 1.5),
    ("NV, SimpleConv-128", "SimpleConv-128", lambda: [NormalizedVariance()], None),
    ("NV, CIFAR ResNet-18", "CIFAR ResNet-18", lambda: [NormalizedVariance()], None),
    ("variances, SimpleConv-32", "SimpleConv-32", variances, None),
    ("variances, distances, SimpleConv-32", "SimpleConv-32", lambda: [*variances(), *distances()], None),
    ("all measures, SimpleConv-32", "SimpleConv-32", all_measures, 4.0),
]


def ratios(
    make: Callable[[], nn.Module], measures: Callable[[], list[Metric]], samples: int, rounds: int
) -> tuple[list[float], float]:
    """Time of evaluate() over time of the bare forward passes, round by round, and the latter's median."""
    torch.manual_seed(0)
    model, images = make().eval(), torch.rand(samples, 3, 32, 32)
    batches = [block.inputs.flatten(0, 1) for block in STLoader(images, TRANSFORMATIONS)]
    measured, bare_times = [], []
    for round_ in range(rounds + 1):
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                model(batch)
        middle = time.perf_counter()
        evaluate(model, images, TRANSFORMATIONS, measures(), progress=False)
        end = time.perf_counter()
        if round_:  # the first warms up
            measured.append((end - middle) / (middle - start))
            bare_times.append(middle - start)
    return measured, statistics.median(bare_times)


def peak_memory(samples: int) -> int:
    """Peak memory in MB of a process that evaluates SimpleConv-32 on so many samples, beside the samples themselves."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_evaluate_in_process, (samples,))


def _evaluate_in_process(samples: int) -> int:
    # One image repeated: the data themselves take no memory, whatever their number.
    images = torch.rand(1, 3, 32, 32).expand(samples, -1, -1, -1)
    evaluate(simple_conv(3, 32, 32), images, TRANSFORMATIONS, progress=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> int:
    """Print the machine and every figure; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--only", default="", help="run the cases whose names hold these words")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()},"
        f" torch {torch.__version__}; m = {len(TRANSFORMATIONS)}, batches of 64"
    )
    missed = False
    print(f"\n{'evaluate() / bare forward':38s}{'min':>8s}{'median':>8s}{'max':>8s}{'target':>8s}   bare")
    for name, model, measures, target in CASES:
        if options.only not in name:
            continue
        samples = options.samples if "32" in name else options.samples // 8
        measured, bare = ratios(MODELS[model], measures, samples, options.rounds)
        median = statistics.median(measured)
        late = target is not None and median > target
        missed |= late
        print(
            f"{name:38s}{min(measured):8.3f}{median:8.3f}{max(measured):8.3f}{target or '':>8}"
            f"   {bare:.2f} s{'  MISSED' if late else ''}",
            flush=True,
        )
    small, large = peak_memory(256), peak_memory(2048)
    grew = large > 1.02 * small
    print(f"\npeak memory, SimpleConv-32: {small} MB at n = 256, {large} MB at n = 2048{'  MISSED' if grew else ''}")
    return int(missed or grew)


if __name__ == "__main__":
    sys.exit(main())
