"""Are the intervals and the tests right? How often intervals cover the truth, and how often tests reject it.

    python tests/benchmarks/coverage.py [--repeats 1000]
    python tests/benchmarks/coverage.py --cifar cifar10_test.npz --weights resnet20.th [--subsets 200]
    python tests/benchmarks/coverage.py --mnist DIR [--repeats 1000]

Without files: units whose truth is known from a simulation of 200,000 samples. With the files of a trained CIFAR
ResNet-20 and of the CIFAR-10 test images: random subsets of 256 of the 10,000 images, whose value for all of them is
the truth. With MNIST: tests of networks that are trained here and differ in nothing but their seed. Intervals are of
95 %, tests of level 5 %. With ``s`` repeats a share p is known within 2 √(p (1 − p) / s).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.datasets import MNIST

from lightning_invariance import InvarianceResult, TransformationSet, compare, evaluate, rotations
from lightning_invariance.measures import Measure, NormalizedDistance, NormalizedVariance, TransformationVariance

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from models import simple_conv, trained_resnet

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
    """Smooth values through a ReLU that fires for about 30 % of them."""
    return (smooth(n, generator) - 1).clamp_min(0)


def sparse(n: int, generator: torch.Generator) -> Tensor:
    """Smooth values through a ReLU that fires for 3 % of them."""
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
    n, factors = 256, (1.05, 1.1, 1.2)
    print(f"\nTransformation variances of two simulated networks on the same {n} samples: share of p below .05")
    powers = "".join(f"{f'{factor} times':>12s}" for factor in factors)
    print(f"{'':8s}{'equal':>8s}{powers}{'equivalent, at the margin':>27s}{'equivalent, equal':>19s}")
    for kind, draw in KINDS.items():
        generator = torch.Generator().manual_seed(1)
        exact = evaluated(draw(POPULATION, generator), TransformationVariance(), None).per_layer()["0"]
        margin = (factors[-1] - 1) * exact  # the largest factor is at the margin
        networks = (Half(0), Half(1), *(Half(1, factor**0.5) for factor in factors))
        found = []
        for _ in range(repeats):
            both = torch.stack([draw(n, generator), draw(n, generator)], 1)
            both[:, 1] = torch.where(torch.rand(n, 1, 1, generator=generator) < 0.5, both[:, 0], both[:, 1])
            swapped = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
            both = torch.where(swapped, both.flip(1), both)  # which is which is a coin for every sample
            measure = [TransformationVariance()]
            a, *others = (
                evaluate(network, both, OF_TWO, measure, confidence=0.95, progress=False, batch_size=1024)
                for network in networks
            )
            tests = [compare(a, b, margin=margin)["out"] for b in others]
            found.append([t.p for t in tests] + [tests[-1].equivalent, tests[0].equivalent])
        *differ, at_margin, inside = (np.array(found) < 0.05).mean(0)
        equal, *larger = (f"{share:{width}.3f}" for share, width in zip(differ, (8, 12, 12, 12), strict=True))
        print(f"{kind:8s}{equal}{''.join(larger)}{at_margin:27.3f}{inside:19.3f}", flush=True)


class Mixture(nn.Module):
    """Two networks as one: a second channel of each sample, above or below 0.5, tells whose activations it has."""

    def __init__(self, a: nn.Sequential, b: nn.Sequential, swapped: bool) -> None:
        super().__init__()
        self.networks, self.swapped = (a, b), swapped  # in a tuple, so that only the mixed layers are watched
        self.layers = nn.ModuleDict({name: nn.Identity() for name, _ in a.named_children()})

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 2, height, width)`` → outputs."""
        of_a = of_b = x[:, :1]
        first = (x[:, 1, x.shape[2] // 2, x.shape[3] // 2] > 0.5) ^ self.swapped  # turned corners are 0
        mixed = x
        for identity, in_a, in_b in zip(self.layers.values(), *self.networks, strict=True):
            of_a, of_b = in_a(of_a), in_b(of_b)
            mixed = identity(torch.where(first.view(-1, *[1] * (of_a.ndim - 1)), of_a, of_b))
        return mixed


def trained(x: Tensor, labels: Tensor, seed: int) -> nn.Sequential:
    """A small SimpleConv, trained for two epochs."""
    torch.manual_seed(seed)
    network = simple_conv(1, 28, filters=4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(2):
        for part in torch.randperm(len(x)).split(64):
            loss = nn.functional.nll_loss(network(x[part]).clamp_min(1e-8).log(), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def tests_of_seeds(root: Path, repeats: int, seeds: int, n: int) -> None:
    """Rejections for networks that differ in their seed alone: over samples, with labels shuffled, and over seeds."""
    (x, labels), (x_test, y_test) = (
        (data.data[:, None].float() / 255, data.targets) for data in (MNIST(root, train=True), MNIST(root, train=False))
    )
    networks = [trained(x[:4000], labels[:4000], seed) for seed in range(seeds)]
    with torch.no_grad():
        right = [float((net(x_test).argmax(1) == y_test).double().mean()) for net in networks]
    turns, generator = rotations(8), torch.Generator().manual_seed(0)
    print(f"\n{seeds} SimpleConv of 4 filters, accuracy {min(right):.3f} to {max(right):.3f}", flush=True)

    def measured(network: nn.Module, samples: Tensor) -> InvarianceResult:
        return evaluate(network, samples, turns, confidence=0.95, progress=False).reduced()

    rejected = []
    for i in range(repeats):
        a, b = torch.randperm(seeds, generator=generator)[:2].tolist()
        samples = x_test[torch.randperm(len(x_test), generator=generator)[:n]]
        coin = (torch.rand(n, 1, 1, 1, generator=generator) < 0.5).float().expand_as(samples)
        both = [Mixture(networks[a], networks[b], swapped) for swapped in (False, True)]
        test = compare(*(measured(mixture, torch.cat([samples, coin], 1)) for mixture in both))
        rejected.append((test.network.p < 0.05, bool(test.differing)))
        if i % 50 == 49:
            print(f"  {i + 1} tests", flush=True)
    network, layers = np.mean(rejected, 0)
    print(f"two seeds, a coin for each sample tells which is which: network {network:.3f}, any layer {layers:.3f}")

    results = [measured(network, x_test[:n]) for network in networks]
    pairs = [compare(a, b) for a, b in itertools.combinations(results, 2)]
    single = np.mean([test.network.p < 0.05 for test in pairs])
    print(f"two seeds as they are, over samples: network {single:.3f} of {len(pairs)} pairs")
    for count in (3, seeds // 2):
        rejected = []
        for _ in range(repeats):
            order = torch.randperm(seeds, generator=generator).tolist()
            a, b = ([results[k] for k in some] for some in (order[:count], order[count : 2 * count]))
            test = compare(a, b)
            rejected.append((test.network.p < 0.05, bool(test.differing)))
        network, layers = np.mean(rejected, 0)
        print(f"{count} seeds against {count} others: network {network:.3f}, any layer {layers:.3f}", flush=True)


def real_network(images: Path, weights: Path, subsets: int, transformations: int, n: int = 256) -> None:
    """Coverage of the values of all images by intervals of subsets, and tests of two subsets of them."""
    model, x = trained_resnet(images, weights)
    turns, start = rotations(transformations), time.perf_counter()
    measure = NormalizedVariance(response=True)
    exact = evaluate(model, x, turns, measure, progress=False)
    truth = exact.per_layer()
    print(f"\nResNet-20, {len(x)} images, {transformations} rotations: {time.perf_counter() - start:.0f} s", flush=True)
    results: list[list[InvarianceResult]] = []
    per_order = len(x) // n
    for number in range(-(-subsets // per_order)):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
        parts = order.split(n)[: min(per_order, subsets - number * per_order)]
        results.append([evaluate(model, x[part], turns, measure, progress=False, confidence=0.95) for part in parts])
        results[-1] = [result.reduced() for result in results[-1]]
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
    responses, bounds = (
        exact.response["NormalizedVariance"],
        [each.response_bounds["NormalizedVariance"] for each in every],
    )
    found = [
        np.mean([(each[layer][0][j] <= value) & (value <= each[layer][1][j]) for each in bounds])
        for layer, response in responses.items()
        for j, value in enumerate(response[1:], 1)  # the identity is exactly 0
    ]
    quantiles = np.quantile(found, [0, 0.1, 0.5, 0.9, 1])
    print(f"responses: covered {np.round(quantiles, 3)}, the least, the tenths and the most of {len(found)}")
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
    parser.add_argument("--mnist", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--subsets", type=int, default=200)
    parser.add_argument("--rotations", type=int, default=8)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of units that never fire
    if options.cifar and options.weights:
        real_network(options.cifar, options.weights, options.subsets, options.rotations)
        return
    if options.mnist:
        tests_of_seeds(options.mnist, options.repeats, seeds=24, n=256)
        return
    sizes = [64, 256, 1024]
    coverage(NormalizedVariance(), sizes, options.repeats)
    coverage(TransformationVariance(), sizes, options.repeats)
    coverage(NormalizedDistance(), sizes[1:], options.repeats // 4)
    tests_of_simulated_networks(options.repeats)


if __name__ == "__main__":
    main()
