"""Are the intervals and the tests right? How often intervals cover the truth, and how often tests reject it.

    python tests/benchmarks/coverage.py [--repeats 1000]
    python tests/benchmarks/coverage.py --cifar cifar10_test.npz --weights resnet20.th [--subsets 195]

Without files: units whose truth is known from a simulation of 200,000 samples. With the files of a trained CIFAR
ResNet-20 and of the CIFAR-10 test images: random subsets of 256 of the 10,000 images, whose value for all of them is
the truth. Intervals are of 95 %, tests of level 5 %. With ``s`` repeats a share p is known within 2 √(p (1 − p) / s).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_invariance import InvarianceResult, TransformationSet, compare, evaluate, rotations
from lightning_invariance.measures import Measure, NormalizedDistance, NormalizedVariance, TransformationVariance

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from models import trained_resnet

#: Columns of samples that are rows of the ST matrix already, and the network that returns them.
M = 16
COLUMNS = TransformationSet.from_callables({f"column {j}": partial(torch.select, dim=1, index=j) for j in range(M)})
NETWORK = nn.Sequential(nn.Flatten())

#: Units of a simulated layer.
UNITS = 24

#: Samples of which the truth is computed.
POPULATION = 200_000


def normal(n: int, generator: torch.Generator) -> Tensor:
    """Independent units: as much of the sample as of the transformation."""
    sample, noise = (torch.randn(n, m, UNITS, generator=generator, dtype=torch.float64) for m in (1, M))
    return sample + noise


def smooth(n: int, generator: torch.Generator) -> Tensor:
    """Values that change smoothly with the angle, and share a part among the units of the layer."""
    angle = torch.arange(M) * (2 * torch.pi / M)
    waves = torch.stack([f(h * angle) / h for h in (1, 2) for f in (torch.sin, torch.cos)]).double()
    own = torch.randn(n, UNITS, 4, generator=generator, dtype=torch.float64)
    shared = torch.randn(n, 1, 4, generator=generator, dtype=torch.float64)
    level = torch.randn(n, UNITS, 1, generator=generator, dtype=torch.float64)
    return ((own + shared) @ waves + level).transpose(1, 2)


def relu(n: int, generator: torch.Generator) -> Tensor:
    """The same through a ReLU that fires for some 30 % of the values."""
    return (smooth(n, generator) - 1).clamp_min(0)


def sparse(n: int, generator: torch.Generator) -> Tensor:
    """The same through a ReLU that fires for 3 % of the values."""
    return (smooth(n, generator) - 3.5).clamp_min(0)


KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": normal,
    "smooth": smooth,
    "ReLU": relu,
    "sparse": sparse,
}


def evaluated(x: Tensor, measure: Measure, confidence: float | None = 0.95) -> InvarianceResult:
    """An evaluation of rows of the ST matrix."""
    return evaluate(NETWORK, x, COLUMNS, [measure], confidence=confidence, progress=False, batch_size=1024)


def coverage(measure: Measure, sizes: list[int], repeats: int) -> None:
    """How often intervals of units and of the mean of the layer cover the truth."""
    name = type(measure).__name__
    print(f"\n{name}: share of 95 % intervals that cover the truth; how many are marked; coverage of the others")
    print(f"{'':8s}{'n':>6s}{'unit':>10s}{'layer':>10s}{'marked':>10s}{'not marked':>12s}")
    for kind, draw in KINDS.items():
        generator = torch.Generator().manual_seed(0)
        exact = evaluated(draw(POPULATION // (20 if name == "NormalizedDistance" else 1), generator), measure, None)
        truth, mean = exact[name]["0"], exact.per_layer()["0"]
        for n in sizes:
            units, layers, marked = [], [], []
            for _ in range(repeats):
                result = evaluated(draw(n, generator), measure)
                low, high = result.unit_interval("0")
                interval = result.interval()["0"]
                units.append(((low <= truth) & (truth <= high)).double().mean())
                layers.append(interval.low <= mean <= interval.high)
                marked.append(bool(interval.doubt))
            covers, doubt = np.array(layers), np.array(marked)
            clean = f"{covers[~doubt].mean():.3f}" if (~doubt).any() else "–"
            unit = float(torch.stack(units).mean())
            print(f"{kind:8s}{n:6d}{unit:10.3f}{covers.mean():10.3f}{doubt.mean():10.2f}{clean:>12s}", flush=True)


class Half(nn.Module):
    """One of two networks: which half of a sample it sees, and how strongly."""

    def __init__(self, half: int, strength: float = 1.0) -> None:
        super().__init__()
        self.out = nn.Identity()
        self.half, self.strength = half, strength

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 2, units)`` → ``(batch, units)``."""
        out: Tensor = self.out(x[:, self.half] * self.strength)
        return out


#: Columns of samples that hold the rows of two networks.
OF_TWO = TransformationSet.from_callables({f"column {j}": partial(torch.select, dim=2, index=j) for j in range(M)})


def tests_of_simulated_networks(repeats: int) -> None:
    """Rejections of a true null, power, and the error of equivalence, for two networks on the same samples."""
    n, factor = 256, 1.2
    print(f"\nTransformation variances of two simulated networks on the same {n} samples: share of p below .05")
    print(f"{'':8s}{'equal':>8s}{f'{factor} times':>11s}{'equivalent, at the margin':>27s}{'equivalent, equal':>19s}")
    for kind, draw in KINDS.items():
        generator = torch.Generator().manual_seed(1)
        margin = (factor - 1) * evaluated(draw(POPULATION, generator), TransformationVariance(), None).per_layer()["0"]
        found: dict[str, list[bool]] = {key: [] for key in ("equal", "larger", "margin", "inside")}
        for _ in range(repeats):
            both = torch.stack([draw(n, generator), draw(n, generator)], 1)
            both[:, 1] = torch.where(torch.rand(n, 1, 1, generator=generator) < 0.5, both[:, 0], both[:, 1])
            swapped = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
            both = torch.where(swapped, both.flip(1), both)  # which is which is a coin for every sample
            measure = [TransformationVariance()]
            a, b, larger = (
                evaluate(network, both, OF_TWO, measure, confidence=0.95, progress=False, batch_size=1024)
                for network in (Half(0), Half(1), Half(1, factor**0.5))
            )
            found["equal"].append(compare(a, b)["out"].p < 0.05)
            found["larger"].append(compare(a, larger)["out"].p < 0.05)
            found["margin"].append(compare(a, larger, margin=margin)["out"].equivalent < 0.05)
            found["inside"].append(compare(a, b, margin=margin)["out"].equivalent < 0.05)
        equal, larger_, at_margin, inside = (float(np.mean(values)) for values in found.values())
        print(f"{kind:8s}{equal:8.3f}{larger_:11.3f}{at_margin:27.3f}{inside:19.3f}", flush=True)


def real_network(images: Path, weights: Path, subsets: int, transformations: int, n: int = 256) -> None:
    """Coverage of the values of all images by intervals of subsets, and tests of two subsets of them."""
    model, x = trained_resnet(images, weights)
    turns, start = rotations(transformations), time.perf_counter()
    exact = evaluate(model, x, turns, progress=False)
    truth = exact.per_layer()
    print(f"\nResNet-20, {len(x)} images, {transformations} rotations: {time.perf_counter() - start:.0f} s", flush=True)
    results: list[list[InvarianceResult]] = []
    per_order = len(x) // n
    for number in range(-(-subsets // per_order)):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
        parts = order.split(n)[: min(per_order, subsets - number * per_order)]
        results.append([evaluate(model, x[part], turns, progress=False, confidence=0.95).reduced() for part in parts])
        print(f"  {sum(map(len, results))} subsets, {time.perf_counter() - start:.0f} s", flush=True)
    every = [result for some in results for result in some]
    intervals = [result.interval() for result in every]
    covers = {
        layer: np.mean([each[layer].low <= v <= each[layer].high for each in intervals]) for layer, v in truth.items()
    }
    marked = {layer: np.mean([bool(each[layer].doubt) for each in intervals]) for layer in truth}
    print(f"{'layer':20s}{'NV':>8s}{'covered':>9s}{'marked':>8s}")
    for layer, value in truth.items():
        print(f"{layer:20s}{value:8.4f}{covers[layer]:9.3f}{marked[layer]:8.2f}")
    inside = sum(0.92 <= share <= 0.98 for share in covers.values())
    network = np.mean([each.network.low <= exact.mean() <= each.network.high for each in intervals])
    print(f"{inside} of {len(covers)} layers between .92 and .98, {len(every)} subsets; network {network:.3f}")
    tests = [compare(a, b) for some in results for a, b in zip(some[::2], some[1::2], strict=False)]
    tests += [compare(a, b) for some in results for a, b in zip(some[1::2], some[2::2], strict=False)]
    single = np.mean([test.network.p < 0.05 for test in tests])
    family = np.mean([bool(test.differing) for test in tests])
    print(f"{len(tests)} tests of two subsets: network rejected {single:.3f}, any layer by Holm {family:.3f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--cifar", type=Path, help="npz with x (uint8, NHWC)")
    parser.add_argument("--weights", type=Path, help="state dict of a CIFAR ResNet")
    parser.add_argument("--subsets", type=int, default=195)
    parser.add_argument("--rotations", type=int, default=8)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of units that never fire
    if options.cifar and options.weights:
        real_network(options.cifar, options.weights, options.subsets, options.rotations)
        return
    sizes = [64, 256, 1024]
    coverage(NormalizedVariance(), sizes, options.repeats)
    coverage(TransformationVariance(), sizes, options.repeats)
    coverage(NormalizedDistance(), sizes[1:], options.repeats // 4)
    tests_of_simulated_networks(options.repeats)


if __name__ == "__main__":
    main()
