"""Time of evaluate() against the bare forward passes over the same inputs.

    python tests/benchmarks/speed.py [--rounds 5] [--samples N] [--only WORDS] [--device cuda]

Each round runs the bare forward passes over the transformed inputs, without hooks, in batches of 64 and of 128, and
then evaluate() over the same inputs, which it transforms itself; the ratio to the faster ones is taken in each round,
and each case runs in a process of its own. Also the time of 16 rotations against a ResNet-20, and of
tmeasures (``pip install ".[bench]"``) against ours. Exits with 1 where a target is missed.

With a device other than the CPU: networks that people train there, at the monitor's default and with automatic batches,
and what the profiler says of synchronisations during the walk.

What it costs in memory, and how the cost grows, is in size.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import nn
from torchmetrics import Metric

from lightning_invariance import STLoader, evaluate, rotations
from lightning_invariance.measures import (
    Anova,
    ChannelEquivariance,
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

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from models import CifarResNet, simple_conv

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
    "CIFAR ResNet-20": lambda: CifarResNet(20),
    "ResNet-18, 64×64": torchvision.models.resnet18,
    "ViT, 4 layers of 128": lambda: torchvision.models.VisionTransformer(32, 4, 4, 4, 128, 256),
    "MobileNetV3-small, 64×64": torchvision.models.mobilenet_v3_small,
}


def default() -> list[Metric]:
    """The monitor's default measures."""
    return [NormalizedVariance(response=True)]


def variances() -> list[Metric]:
    """The family that shares its sums."""
    return [NormalizedVariance(), TransformationVariance(), SampleVariance(), Anova()]


def distances() -> list[Metric]:
    """The variances and the distances."""
    return [*variances(), TransformationDistance(), SampleDistance(), NormalizedDistance()]


def channels() -> list[Metric]:
    """Permuted channels."""
    return [ChannelEquivariance()]


def all_measures() -> list[Metric]:
    """Every measure."""
    same = [VarianceSameEquivariance(mask=True), DistanceSameEquivariance(mask=True)]
    return [*distances(), Goodfellow(), *same]


class Case(NamedTuple):
    """A row of the table.

    Attributes:
        name: what is measured.
        model: key of :data:`MODELS`.
        measures: makes the measures.
        target: the largest ratio that is accepted.
        part: of the samples, for models that take long.
        confidence: of intervals, which may need a second pass.
    """

    name: str
    model: str
    measures: Callable[[], list[Metric]]
    target: float
    part: float = 1.0
    confidence: float | None = None


CASES = [
    Case("NV", "SimpleConv-32", lambda: [NormalizedVariance()], 1.5),
    Case("TV, SV, NV, Anova", "SimpleConv-32", variances, 1.2),
    Case("TV, SV, NV, Anova", "SimpleConv-128", variances, 1.08, 1 / 2),
    Case("TV, SV, NV, Anova", "CIFAR ResNet-18", variances, 1.2, 1 / 2),
    Case("TV, SV, NV, Anova", "CIFAR ResNet-20", variances, 1.35),
    Case("default", "SimpleConv-32", default, 1.25),
    Case("default", "ResNet-18, 64×64", default, 1.3),
    Case("default", "CIFAR ResNet-20", default, 1.5),
    Case("default", "ViT, 4 layers of 128", default, 1.4),
    Case("default", "MobileNetV3-small, 64×64", default, 2.1),
    Case("and TD, SD, ND", "SimpleConv-32", distances, 1.8),
    Case("all measures", "SimpleConv-32", all_measures, 3.0),
    Case("TV, intervals", "SimpleConv-32", lambda: [TransformationVariance()], 1.3, confidence=0.95),
    Case("NV, intervals", "SimpleConv-32", lambda: [NormalizedVariance()], 2.3, confidence=0.95),
]


class DeviceCase(NamedTuple):
    """A row of the table of a device.

    Attributes:
        name: of the network.
        model: makes it.
        size: of its images.
        samples: how many there are where the user does not say.
        target: the largest ratio that is accepted.
        dtype: of its weights, images and activations.
        measures: makes the measures; by default the monitor's default.
        confidence: of intervals.
        memory_format: of weights and images.
        compiled: whether the bare passes are of the compiled model, beside which it is evaluated.
    """

    name: str
    model: Callable[[], nn.Module]
    size: int
    samples: int
    target: float = 1.25
    dtype: torch.dtype = torch.float32
    measures: Callable[[], list[Metric]] | None = None
    confidence: float | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False


DEVICE_CASES = [
    DeviceCase("ResNet-18, 224×224", torchvision.models.resnet18, 224, 1024),
    DeviceCase("ResNet-50, 224×224", torchvision.models.resnet50, 224, 1024),
    DeviceCase("ResNet-18, bfloat16", torchvision.models.resnet18, 224, 1024, dtype=torch.bfloat16),
    DeviceCase("SimpleConv-32", MODELS["SimpleConv-32"], 32, 10_000),  # images of CIFAR-10's test set
    DeviceCase("ViT-B/16", torchvision.models.vit_b_16, 224, 512),
    DeviceCase("ResNet-50, channels last", torchvision.models.resnet50, 224, 512, memory_format=torch.channels_last),
    DeviceCase("ResNet-50, compiled", torchvision.models.resnet50, 224, 512, compiled=True),
    DeviceCase("ResNet-18, intervals", torchvision.models.resnet18, 224, 512, target=2.6, confidence=0.95),
    DeviceCase("ResNet-18, distances", torchvision.models.resnet18, 224, 512, target=2.6, measures=distances),
    DeviceCase("ResNet-18, channels", torchvision.models.resnet18, 224, 512, target=2.6, measures=channels),
]

#: Names of synchronisations in a profile.
SYNCHRONISING = ("Synchronize", "_local_scalar_dense", "Memcpy DtoH", "aten::nonzero")


def model_and_images(name: str, samples: float) -> tuple[nn.Module, torch.Tensor]:
    """A model of :data:`MODELS`, and images for it."""
    torch.manual_seed(0)
    size = 64 if "64×64" in name else 32
    return MODELS[name]().eval(), torch.rand(max(16, int(samples)), 3, size, size)


def time_of_passes(model: nn.Module, batches: list[torch.Tensor]) -> float:
    """Seconds of the bare forward passes over transformed inputs."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return time.perf_counter() - start


def transformed(images: torch.Tensor, size: int = 128) -> list[torch.Tensor]:
    """The images as evaluate() gives them to a model, in batches of a size."""
    return [block.inputs.flatten(0, 1) for block in STLoader(images, TRANSFORMATIONS, size)]


def time_of_ours(
    model: nn.Module,
    images: torch.Tensor,
    measures: list[Metric] | None = None,
    confidence: float | None = None,
) -> float:
    """Seconds of evaluate()."""
    start = time.perf_counter()
    evaluate(model, images, TRANSFORMATIONS, measures, confidence=confidence, progress=False)
    return time.perf_counter() - start


def ratios(case: int, samples: int, rounds: int) -> tuple[list[float], str]:
    """Time of evaluate() over time of the bare forward passes, round by round, and the latter's median."""
    _, name, measures, _, part, confidence = CASES[case]
    warnings.simplefilter("ignore")  # of NaN, which some units of an untrained network are for some measures
    model, images = model_and_images(name, samples * part)
    batches = [transformed(images, size) for size in (64, 128)]
    times = [
        (min(time_of_passes(model, b) for b in batches), time_of_ours(model, images, measures(), confidence))
        for _ in range(rounds + 1)
    ][1:]  # the first warms up
    return [own / bare for bare, own in times], f"{statistics.median(bare for bare, _ in times):.2f} s"


def transform_ratios(size: int, images: int, rounds: int) -> tuple[list[float], str]:
    """Time of rotating images over time of a ResNet-20's forward passes over the rotated images."""
    model, x, times = CifarResNet(20).eval(), torch.rand(images, 3, size, size), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        inputs = TRANSFORMATIONS(x).flatten(0, 1)
        own = time.perf_counter() - start
        times.append((own, time_of_passes(model, list(inputs.split(64)))))
    return [own / bare for own, bare in times[1:]], f"{statistics.median(bare for _, bare in times[1:]):.2f} s"


def device_ratios(case: DeviceCase, device: str, samples: int | None, rounds: int) -> tuple[list[float], str, str]:
    """Ratios of evaluate() to the forward passes on a device, the median time of the passes, and synchronisations."""
    torch.manual_seed(0)
    samples = case.samples if samples is None else samples
    model = case.model().eval().to(device, case.dtype, memory_format=case.memory_format)
    model = torch.compile(model) if case.compiled else model
    images = torch.rand(samples, 3, case.size, case.size).to(case.dtype, memory_format=case.memory_format)
    measures = case.measures or default
    module = torch.get_device_module(device)
    finish: Callable[[], None] = getattr(module, "synchronize", lambda: None)

    def ours(some: int = samples) -> Any:
        about = {"confidence": case.confidence, "progress": False}
        return evaluate(model, images[:some], TRANSFORMATIONS, measures(), **about)

    ours()  # warms up and compiles
    size = min(2**14, 2**29 // (4 * images[0].numel()))  # as with ``batch_size="auto"``
    loader = STLoader(images, TRANSFORMATIONS, size, device=torch.device(device))
    times = []
    for _ in range(rounds + 1):
        bare = 0.0
        for block in loader:
            inputs = block.inputs.flatten(0, 1)
            finish()
            bare += time_of_passes(model, [inputs])
            start = time.perf_counter()
            finish()
            bare += time.perf_counter() - start
        start = time.perf_counter()
        ours()
        finish()
        times.append((bare, time.perf_counter() - start))
    with torch.profiler.profile() as profiler:
        ours(3 * loader.rows)
    counts = {event.key: event.count for event in profiler.key_averages()}
    found = {key: count for key, count in counts.items() if any(word in key for word in SYNCHRONISING)}
    blocks = -(-samples // loader.rows)
    told = f"n = {samples}, batches of {size}, {blocks} blocks; synchronisations of an evaluation of 3 blocks: {found}"
    return [own / bare for bare, own in times[1:]], f"{statistics.median(bare for bare, _ in times[1:]):.2f} s", told


def on_device(device: str, samples: int | None, rounds: int, only: str) -> int:
    """Print the rows of a device; 1 where a target is missed."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    print(f"{name}, torch {torch.__version__}; m = {len(TRANSFORMATIONS)}, the monitor's default\n")
    missed = False
    for case in DEVICE_CASES:
        if only in case.name:
            measured, divisor, told = device_ratios(case, device, samples, rounds)
            median = statistics.median(measured)
            missed |= median > case.target
            late = "  MISSED" if median > case.target else ""
            print(
                f"{case.name:24s}{min(measured):8.3f}{median:8.3f}{max(measured):8.3f}  ≤ {case.target:g}"
                f"  {divisor}{late}"
            )
            print(f"{'':24s}{told}", flush=True)
    return int(missed)


def time_of_tmeasures(model: str, samples: int) -> float:
    """Seconds that tmeasures takes for the normalised variance of a model of :data:`MODELS`."""
    import tmeasures.pytorch as theirs  # type: ignore[import-not-found]
    from tmeasures.pytorch.transformations.affine import RotationGenerator  # type: ignore[import-not-found]
    from tmeasures.transformations.parameters import UniformRotation  # type: ignore[import-not-found]

    warnings.simplefilter("ignore")  # of pinned memory
    network, images = model_and_images(model, samples)
    turns, options = RotationGenerator(UniformRotation(16, 1.0)), theirs.PyTorchMeasureOptions(64, 0, verbose=False)
    start = time.perf_counter()
    with torch.no_grad():
        measure = theirs.NormalizedVarianceInvariance()
        measure.eval(images, turns, theirs.AutoActivationsModule(network), options)  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def times_of_ours(model: str, samples: int) -> tuple[float, float]:
    """Seconds of evaluate() for the same model, and of the bare forward passes."""
    network, images = model_and_images(model, samples)
    return time_of_ours(network, images), time_of_passes(network, transformed(images))


def theirs_over_ours(model: str, samples: int, rounds: int) -> tuple[list[float], str]:
    """Ratios of tmeasures to evaluate(), by turns, and to the bare forward passes.

    Each library in a process of its own, as users run them: what evaluate() does about the memory allocator would
    otherwise speed up the other as well.
    """
    with own_process() as theirs, own_process() as ours:
        times = [
            (
                theirs.submit(time_of_tmeasures, model, samples).result(),
                *ours.submit(times_of_ours, model, samples).result(),
            )
            for _ in range(rounds + 1)
        ][1:]  # the first warms up
    own, over_bare = (statistics.median(values) for values in zip(*((t[1], t[0] / t[2]) for t in times), strict=True))
    return [their / own for their, own, _ in times], f"{own:.2f} s; it takes {over_bare:.2f} × the bare passes"


def own_process() -> ProcessPoolExecutor:
    """A process that starts anew."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own."""
    with own_process() as process:
        return process.submit(function, *arguments).result()


def machine() -> str:
    """The machine, and the versions of Python and torch."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()},"
        f" Python {platform.python_version()}, torch {torch.__version__}; m = {len(TRANSFORMATIONS)}"
    )


def main() -> int:
    """Print every figure; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, help="by default 256, on a device what is usual for each network")
    parser.add_argument("--only", default="", help="run the rows whose names hold these words")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    n, rounds = options.samples or 256, options.rounds
    if options.device != "cpu":
        if options.device.startswith("cuda") and not torch.cuda.is_available():
            parser.error("there is no CUDA device here")
        return on_device(options.device, options.samples, rounds, options.only)
    rows: list[tuple[str, float, Callable[[], tuple[list[float], str]]]] = [
        (f"{case.name}: {case.model}", case.target, lambda i=i: alone(ratios, i, n, rounds))  # type: ignore[misc]
        for i, case in enumerate(CASES)
    ]
    for size, images in ((32, 64), (224, 4)):
        name = f"16 rotations / ResNet-20: {images} images {size}×{size}"
        rows.append((name, 0.1, lambda s=size, i=images: alone(transform_ratios, s, i, rounds)))  # type: ignore[misc]
    for model, part in (("SimpleConv-32", 1), ("CIFAR ResNet-20", 2), ("SimpleConv-128", 8), ("CIFAR ResNet-18", 8)):
        name = f"tmeasures 1.2.11 / ours, NV: {model}"
        rows.append((name, -5, lambda a=model, b=n // part: theirs_over_ours(a, b, rounds)))  # type: ignore[misc]
    print(f"{machine()}\n\n{'ratio of times':52s}{'min':>8s}{'median':>8s}{'max':>8s}{'target':>8s}   divisor")
    missed = False
    for name, target, measure in rows:
        if options.only not in name:
            continue
        try:
            measured, divisor = measure()
        except ModuleNotFoundError as error:
            print(f"{name:52s}  not measured: {error}")
            continue
        median = statistics.median(measured)
        late = median < -target if target < 0 else median > target
        missed |= late
        sign = "≥" if target < 0 else "≤"
        print(
            f"{name:52s}{min(measured):8.3f}{median:8.3f}{max(measured):8.3f}{f'{sign} {abs(target):g}':>8s}"
            f"   {divisor}{'  MISSED' if late else ''}",
            flush=True,
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
