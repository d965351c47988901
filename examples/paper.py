"""The figures of the paper (section 3), re-run with error bars.

    python examples/paper.py FIGURE ... --mnist DIR --cifar DIR [--epochs 5 --filters 16 --seeds 8]

FIGURE is one of ``augmentation`` (figures 13 to 16), ``seeds`` (17 to 22), ``samples`` (3.3), ``combined`` (3.1.2) and
``all``. Networks and results are kept in ``--output``: a run that was interrupted goes on, and tables and pictures are
made again without training. ``--images 256`` makes everything small, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from mnist import mnist
from models import simple_conv
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from lightning_invariance import (
    InvarianceResult,
    TransformationSet,
    combine,
    compare,
    evaluate,
    plots,
    rotations,
    scales,
    translations,
)
from lightning_invariance.measures import (
    Anova,
    ChannelEquivariance,
    EffectiveInvariance,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    SampleVariance,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

SETS = {"rotation": lambda: rotations(16), "scale": scales, "translation": translations}

MEASURES = {
    "TV": TransformationVariance(),
    "SV": SampleVariance(),
    "NV": NormalizedVariance(),
    "TD": TransformationDistance(),
    "SD": SampleDistance(),
    "ND": NormalizedDistance(),
    "Goodfellow": Goodfellow(0.05),
    "ANOVA": Anova("reject"),
    "ANOVA paired": Anova("reject", paired=True),
    "effect": Anova("effect"),
}


@dataclass
class Runs:
    """Everything that is trained or measured, kept in files.

    Attributes:
        folder: where the files are.
        data: name → training set and test set.
        epochs, filters: of the networks.
        images: how many test images are measured.
    """

    folder: Path
    data: dict[str, tuple[TensorDataset, TensorDataset]]
    epochs: int
    filters: int
    images: int

    def network(self, data: str, augmentation: str, seed: int = 0) -> nn.Module:
        """SimpleConv: ``augmentation`` is a set, ``"none"``, or ``"untrained"``."""
        torch.manual_seed(seed)
        x, y = self.data[data][0].tensors
        model = simple_conv(x.shape[1], x.shape[-1], self.filters).eval()
        file = self.folder / f"{data}_{augmentation}_{seed}.pt"
        if augmentation == "untrained":
            return model
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
            return model
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        moves = None if augmentation == "none" else SETS[augmentation]()
        # As in the paper, epochs × log m with augmentation by m transformations.
        epochs = self.epochs if moves is None else round(self.epochs * np.log(len(moves)))
        batches = torch.cat([torch.randperm(len(x)) for _ in range(epochs)]).split(128)
        model.train()
        for chosen in tqdm(batches, f"{data}, {augmentation}, seed {seed}", leave=False, delay=3):
            images = x[chosen]
            if moves is not None:
                columns = torch.randint(len(moves), (len(chosen),))
                for j in columns.unique().tolist():
                    images[columns == j] = moves[j](images[columns == j])
            optimiser.zero_grad()
            nll_loss(model(images).clamp_min(1e-8).log(), y[chosen]).backward()
            optimiser.step()
        torch.save(model.state_dict(), file)
        return model.eval()

    def result(
        self, name: str, network: tuple[str, str, int], moves: str, measures: dict, n: int = 0
    ) -> InvarianceResult:
        """Measures of a network, with the accuracy under each transformation."""
        file = self.folder / f"{name}_{'_'.join(map(str, network))}_{moves}_{n or self.images}.npz"
        if file.exists():
            return InvarianceResult.load(file)
        accuracy = {"accuracy": MulticlassAccuracy(10, average="micro")}
        found = evaluate(
            self.network(*network),
            self.data[network[0]][1],
            SETS[moves](),
            measures,
            max_samples=n or self.images,
            confidence=0.95,
            outputs=accuracy,
        )
        found.save(file)
        return found


def table(columns: list[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table in Markdown."""
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def rank_correlation(x: np.ndarray, y: np.ndarray) -> str:
    """Spearman's correlation with a bootstrap interval over the pairs."""
    kept = np.isfinite(x) & np.isfinite(y)
    x, y, generator = x[kept], y[kept], np.random.default_rng(0)
    places = generator.integers(0, len(x), (1000, len(x)))
    low, high = np.nanquantile([stats.spearmanr(x[p], y[p])[0] for p in places], [0.025, 0.975])
    return f"{stats.spearmanr(x, y)[0]:.2f} [{low:.2f}, {high:.2f}], {len(x)} pairs"


def augmentation(runs: Runs) -> None:
    """Figures 13 to 16: networks with and without augmentation."""
    for data in runs.data:
        found = {}
        for moves in SETS:
            for how in ("none", moves):
                found[moves, how] = runs.result("all", (data, how, 0), moves, MEASURES)
        print(f"\n## {data}: accuracy (figures 13 to 15)\n")
        table(
            ["set", "augmentation", "accuracy, mean over the set", "worst", "NV of softmax", "interval"],
            (
                [
                    moves, how, r.outputs["accuracy"].mean, r.outputs["accuracy"].worst,
                    r.per_layer("NV")["softmax"], "[{0.low:.3g}, {0.high:.3g}]".format(r.interval("NV")["softmax"]),
                ]
                for (moves, how), r in found.items()
            ),
        )  # fmt: skip
        print(f"\n## {data}: by layer, rotation (figure 16)\n")
        for how in ("none", "rotation"):
            r = found["rotation", how]
            print(f"\naugmentation: {how}\n")
            table(["layer", *MEASURES], ([layer, *(r.per_layer(m)[layer] for m in MEASURES)] for layer in r.layers))
        for moves in SETS:
            both = found[moves, moves], found[moves, "none"]
            print(f"\n{moves}: {compare(*both, measure='NV', names=('augmented', 'not augmented')).verdict}")
        units = list(found.values())
        pairs = [np.concatenate([r[m][layer].flatten() for r in units for layer in r.layers]) for m in ("NV", "ND")]
        chosen = np.random.default_rng(0).permutation(len(pairs[0]))[:2000]
        print(f"\nNV and ND, units: Spearman {rank_correlation(pairs[0][chosen], pairs[1][chosen])}")
        means = [np.array([v for r in units for v in r.per_layer(m).values()]) for m in ("NV", "ND", "Goodfellow")]
        print(f"NV and ND, means of layers: Spearman {rank_correlation(means[0], means[1])}")
        print(f"NV and Goodfellow, means of layers: Spearman {rank_correlation(means[0], means[2])}")
        magnitudes = [v for v in found["rotation", "none"].per_layer("TV").values() if v > 0]
        print(f"TV of layers: largest / smallest {max(magnitudes) / min(magnitudes):.3g}")
        for moves in SETS:
            shown = {how: found[moves, how] for how in ("none", moves)}
            plots.layers(shown, measure="NV", size=(3.4, 2.6)).savefig(runs.folder / f"{data}_{moves}.png", dpi=150)


def spread(found: list[InvarianceResult], measure: str, layer: str) -> str:
    """Standard deviation between seeds, relative to the mean, without the noise of sampling; and its interval.

    All networks see the same images. What the noise of these images adds to differences between seeds is the part of
    the influences in which seeds differ.
    """
    values = np.array([r.per_layer(measure)[layer] for r in found])
    influences, count = np.stack([r.influences[measure][layer].numpy() for r in found]), len(found)
    apart = influences - influences.mean(0)
    n = influences.shape[1]
    noise = (apart**2).sum() / (n * (n - 1)) / (count - 1)
    total = values.var(ddof=1)
    bounds = [total * (count - 1) / stats.chi2.ppf(q, count - 1) for q in (0.975, 0.025)]
    shown = [f"{max(0.0, each - noise) ** 0.5 / values.mean():.1%}" for each in (total, *bounds)]
    return "{} [{}, {}]".format(*shown)


def seeds(runs: Runs, count: int) -> None:
    """Figures 17 to 22: how much measures depend on the seed, before and after training."""
    measures = {"NV": NormalizedVariance(), "ND": NormalizedDistance(), "SE": VarianceSameEquivariance(mask=True)}
    beyond = {"channels": ChannelEquivariance(), "effective": EffectiveInvariance()}
    all_networks = []
    for data in runs.data:
        for how in ("untrained", "none", "rotation"):
            found = [runs.result("seeds", (data, how, s), "rotation", measures | beyond) for s in range(count)]
            all_networks += [(data, how, r) for r in found]
            print(f"\n## {data}, {how}: {count} seeds (figures 17 to 22)\n")
            rows = []
            for layer in found[0].layers:
                row: list[object] = [layer]
                for measure in measures:
                    if layer not in found[0][measure]:
                        row += ["", ""]
                        continue
                    row += [np.mean([r.per_layer(measure)[layer] for r in found]), spread(found, measure, layer)]
                rows.append(row)
            table(["layer", *(f"{m}{what}" for m in measures for what in ("", ": seeds vary by"))], rows)
            depth = np.arange(len(found[0].layers))
            slopes = [stats.linregress(depth, list(r.per_layer("NV").values())).slope for r in found]
            half = stats.t.ppf(0.975, count - 1) * np.std(slopes, ddof=1) / np.sqrt(count)
            print(f"\nslope of NV over depth: {np.mean(slopes):.4f} ± {half:.4f} a layer")
        plots.stability(found, measure="NV", size=(3.4, 2.6)).savefig(runs.folder / f"{data}_seeds.png", dpi=150)
    trained = [r for _, how, r in all_networks if how != "untrained"]
    accuracy = np.array([r.outputs["accuracy"].mean for r in trained])
    for measure in ("NV", "ND", "effective"):
        last = np.array([r.last(measure) for r in trained])
        print(
            f"accuracy on rotated images and {measure} of the last layer: Spearman {rank_correlation(accuracy, last)}"
        )


def samples(runs: Runs) -> None:
    """How many samples suffice (3.3), and what the number of samples does to ANOVA (2.3)."""
    measures = {"NV": NormalizedVariance(), "ANOVA": Anova("reject"), "paired": Anova("reject", paired=True)}
    measures["effect"] = Anova("effect")
    for data in runs.data:
        print(f"\n## {data}: samples\n")
        rows = []
        for n in sorted({max(32, runs.images // part) for part in (16, 8, 4, 2, 1)}):
            r = runs.result("samples", (data, "rotation", 0), "rotation", measures, n)
            widths = [r.interval("NV")[layer].standard_error * 1.96 for layer in r.layers]
            rows.append([n, max(widths), *(r.mean(m) for m in ("NV", "ANOVA", "paired", "effect"))])
        table(["n", "widest ± of a layer's NV", "mean NV", "ANOVA rejects", "paired rejects", "effect size"], rows)


def combined(runs: Runs) -> None:
    """The combined set of 4,224 (3.1.2), in bounded memory."""
    moves: TransformationSet = combine(rotations(16), scales(), translations())
    data = next(iter(runs.data))
    start = time.perf_counter()
    n = min(64, runs.images)
    model, images = runs.network(data, "none"), runs.data[data][1]
    result = evaluate(model, images, moves, max_samples=n, layers=["conv*", "fc*", "softmax"])
    print(f"\n## {data}: {len(moves)} transformations of {n} images: {time.perf_counter() - start:.0f} s\n")
    table(["layer", "NV"], result.per_layer().items())


def made_up(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images of 28×28 with one of ten brightnesses in a corner."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    images = 0.1 * torch.rand(n, 1, 28, 28, generator=generator)
    images[:, :, 4:12, 4:12] += labels.view(-1, 1, 1, 1) / 10
    return images, labels


def loaded(options: argparse.Namespace) -> dict[str, tuple[TensorDataset, TensorDataset]]:
    """The data that there is: 10,000 training images of each; without any, bars and squares to see that it runs."""
    found = {}
    if not options.mnist and not options.cifar:
        found["made up"] = tuple(TensorDataset(*made_up(n, seed)) for n, seed in ((512, 0), (256, 1)))
    if options.mnist:
        found["mnist"] = tuple(mnist(options.mnist, False, train) for train in (True, False))
    if options.cifar:
        parts = []
        for name in ("cifar10_train10k.npz", "cifar10_test.npz"):
            with np.load(options.cifar / name) as file:
                x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).long()
            parts.append(TensorDataset(x.permute(0, 3, 1, 2).float().div(255).sub(0.47).div(0.25), y))
        found["cifar"] = tuple(parts)

    def few(data: TensorDataset, n: int) -> TensorDataset:
        chosen: Tensor = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n]
        return TensorDataset(*(tensor[chosen] for tensor in data.tensors))

    return {name: (few(train, options.train), test) for name, (train, test) in found.items()}


def main() -> None:
    """Run the figures that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    figures = {"augmentation": augmentation, "seeds": seeds, "samples": samples, "combined": combined}
    parser.add_argument("figures", nargs="+", choices=[*figures, "all"])
    parser.add_argument("--mnist", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--cifar", type=Path, help="folder with cifar10_train10k.npz and cifar10_test.npz")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--filters", type=int, default=16, help="of the first convolution (paper: 64 and 128)")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--train", type=int, default=10000, help="training images")
    parser.add_argument("--images", type=int, default=512, help="test images to measure with")
    parser.add_argument("--output", type=Path, default=Path("runs/paper"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.output, loaded(options), options.epochs, options.filters, options.images)
    about = {name: str(value) for name, value in vars(options).items()}
    (options.output / "options.json").write_text(json.dumps(about, indent=1))
    for name, figure in figures.items():
        if name in options.figures or "all" in options.figures:
            figure(runs, options.seeds) if figure is seeds else figure(runs)


if __name__ == "__main__":
    main()
