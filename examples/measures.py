"""The numbers of measures.md: what each measure gives where the right answer is known.

    python examples/measures.py [--cifar cifar10_test.npz --weights resnet20.th]

Where tmeasures 1.2.11 is installed (``pip install tmeasures==1.2.11``), its numbers stand beside ours. With the files
of a trained CIFAR ResNet and of CIFAR-10 it also shows how many samples are needed.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import trained_resnet
from torch import Tensor, nn

from lightning_invariance import TransformationSet, evaluate, functional, rotations, translations
from lightning_invariance.measures import (
    Anova,
    Goodfellow,
    Measure,
    SampleDistance,
    VarianceSameEquivariance,
)

try:
    import tmeasures.np as tm
    from tmeasures.np.activations_iterator import ActivationsIterator
except ImportError:
    tm = None

#: Transformations that pick the columns of samples that are rows of the ST matrix already, and the network for them.
COLUMNS = TransformationSet.from_callables({f"column {j}": partial(torch.select, dim=1, index=j) for j in range(16)})
FLAT = nn.Sequential(nn.Flatten())


def measured(metric: Measure, st: Tensor, size: int = 12) -> Tensor:
    """Show a measure the rows of a whole ST tensor, as often as it needs."""
    for rows in st.split(size):
        metric.update(rows)
    if not metric.complete:
        metric.end_pass()
        for rows in st.split(size):
            metric.update(rows)
    value: Tensor = metric.compute()
    return value


def theirs(make: Any, st: Tensor, size: int) -> np.ndarray[Any, Any] | None:
    """The same from tmeasures, in batches of ``size`` samples; None where it is not installed."""
    if tm is None:
        return None

    class Cube(ActivationsIterator):  # type: ignore[misc]
        def layer_names(self) -> list[str]:
            return ["layer"]

        def transformations_first(self) -> Any:
            return ((j, ((b.numpy(), [b.numpy()]) for b in st[:, j].split(size))) for j in range(st.shape[1]))

        def samples_first(self) -> Any:
            return ((row, [(row.numpy(), [row.numpy()])]) for row in st)

        def get_transformations(self) -> Any:
            return list(range(st.shape[1]))

        get_inverted_activations_iterator = get_both_iterator = get_normal_activations_iterator = layer_names

    return np.asarray(make(tm).eval(Cube()).layers[0])


def show(what: str, ours: float, other: float | None, right: str) -> None:
    """One row of a table."""
    print(f"| {what} | {ours:.4g} | {'' if other is None else f'{other:.4g}'} | {right} |")


def mean_of(values: np.ndarray[Any, Any] | None) -> float | None:
    """Mean of what may not be there."""
    return None if values is None else float(values.mean())


def anova() -> None:
    """Independent noise: nothing differs between transformations."""
    st = torch.randn(60, 8, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = theirs(lambda tm: tm.ANOVAInvariance(), st, 12)
    ours = measured(Anova(), st).mean().item()
    show("ANOVA, Bonferroni: share of 500 noise units that are rejected", ours, mean_of(found), "0")
    found = theirs(lambda tm: tm.ANOVAInvariance(alpha=0.95, bonferroni=False), st, 12)
    ours = measured(Anova(correction=None), st).mean().item()
    show("ANOVA, no correction, α = 0.05: the same share", ours, mean_of(found), "0.05")


def goodfellow() -> None:
    """A unit that no transformation changes, and one that is noise."""
    generator = torch.Generator().manual_seed(0)
    invariant = torch.randn(4000, 1, generator=generator, dtype=torch.float64).expand(4000, 10)
    noise = torch.randn(4000, 10, generator=generator, dtype=torch.float64)
    st = torch.stack([invariant, noise], 2)
    found = theirs(lambda tm: tm.GoodfellowNormalInvariance(), st, 500)
    ours = measured(Goodfellow(), st, 500)
    units = (("invariant unit", "1 / 0.01 = 100"), ("noise unit", "1 / (1 − 0.99¹⁰) = 10.5"))
    for unit, (name, right) in enumerate(units):
        show(f"Goodfellow S, {name}", ours[unit].item(), None if found is None else float(found[unit]), right)


def distances() -> None:
    """Sample distance by batch size and by the order of the samples."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(48) // 12
    st = 5.0 * classes[:, None, None] + torch.randn(48, 16, 20, generator=generator, dtype=torch.float64)
    shuffled = st[torch.randperm(48, generator=generator)]
    right = functional.sample_distance(st).mean().item()

    def make(tm: Any) -> Any:
        return tm.SampleDistanceInvariance(tm.DistanceAggregation(normalize=False, keep_shape=False))

    for order, cube in (("shuffled", shuffled), ("sorted by class", st)):
        for size in (2, 4, 12):
            found = evaluate(FLAT, cube, COLUMNS, SampleDistance(), batch_size=16 * size, progress=False)
            ours = found["SampleDistance"]["0"].mean().item()
            other = mean_of(theirs(make, cube, size))
            show(f"sample distance, {order}, batches of {size}", ours, other, f"{right:.4g}")


def same_equivariance() -> None:
    """The identity network: all it can score comes from interpolation and from the border."""
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    identity = nn.Sequential(nn.Identity())
    sets = {"4 rotations": rotations(4), "16 rotations": rotations(16), "24 shifts": translations()}
    for name, transformations in sets.items():
        for mask in (False, True):
            measure = VarianceSameEquivariance(normalize=False, mask=mask)
            value = evaluate(identity, images, transformations, measure).per_layer()["0"] / 256
            what = f"same-equivariance of the identity, {name}, mask={mask}: variance a pixel"
            show(what, value, None, "0 but for interpolation")


def quarter_turn() -> None:
    """A rotation by 90 degrees."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    right, other = torch.rot90(image, 1, (2, 3)), None
    ours = float((rotations(4)[1](image) - right).abs().max())
    if tm is not None:
        from tmeasures.pytorch.transformations.affine import RotationTransformation

        # The parameter may be meant as a part of a whole or of half a turn, and either way round.
        parts = [RotationTransformation(part)(image[0])[None] for part in (0.25, 0.5, -0.25, -0.5)]
        other = min(float((turned - right).abs().max()) for turned in parts)
    show("rotation by 90°: largest difference to torch.rot90", ours, other, "0")


def error_of_the_estimate() -> None:
    """The sample distance of normal values from pairs within groups of 256 samples, over 200 repetitions."""
    print("\n| samples in a group | pairs of 32,640 | error against all pairs | standard error in the result |")
    print("|---|---|---|---|")
    sizes = (2, 4, 8, 16, 32, 64)
    measures = {str(size): SampleDistance(samples=size) for size in (*sizes, 256)}
    squares = {size: torch.zeros(2, dtype=torch.float64) for size in sizes}
    for repetition in range(200):
        values = torch.randn(256, 16, 4, generator=torch.Generator().manual_seed(repetition), dtype=torch.float64)
        result = evaluate(FLAT, values, COLUMNS, measures, progress=False)
        exact = result["256"]["0"]
        for size in sizes:
            differences = result[str(size)]["0"] - exact, result.standard_errors[str(size)]["0"]
            squares[size] += torch.stack([(each / exact).square().mean() for each in differences]) / 200
    for size, found in squares.items():
        error, told = found.sqrt().tolist()
        print(f"| {size} | {256 // size * math.comb(size, 2)} | {error:.4f} | {told:.4f} |")


def convergence(images: Path, weights: Path) -> None:
    """Values of a trained network for a part of the samples."""
    model, x = trained_resnet(images, weights)
    layers = ["conv1", "layer1", "layer2", "layer3", "linear"]
    numbers = [len(x) // part for part in (8, 4, 2, 1)]
    found = [evaluate(model, x, rotations(16), layers=layers, max_samples=n).per_layer() for n in numbers]
    print("\n| layer |" + "".join(f" n = {n} |" for n in numbers) + "\n|---|" + "---|" * len(numbers))
    for layer in layers:
        print(f"| {layer} |" + "".join(f" {values[layer]:.4f} |" for values in found))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="npz with x (uint8, NHWC)")
    parser.add_argument("--weights", type=Path, help="state dict of a CIFAR ResNet")
    options = parser.parse_args()
    print("| what | lightning_invariance | tmeasures 1.2.11 | right |\n|---|---|---|---|")
    anova()
    goodfellow()
    distances()
    same_equivariance()
    quarter_turn()
    error_of_the_estimate()
    if options.cifar and options.weights:
        convergence(options.cifar, options.weights)


if __name__ == "__main__":
    main()
