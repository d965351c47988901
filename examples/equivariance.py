"""Which layers are equivariant, and how: by the same maps, by permuted channels, or by mixed channels.

    python examples/equivariance.py [--mnist DIR] [--cifar cifar10_test.npz --weights resnet20.th resnet32.th]

Prints the tables of ``equivariance.md`` and saves its pictures. Without data: a layer with turned copies of its filters
beside one with random filters, and a small U-Net whose masks move with the image. With MNIST: SimpleConv, trained with
and without rotations. With CIFAR-10: trained residual networks beside untrained ones.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from mnist import mnist
from models import CifarResNet, simple_conv, trained_resnet
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, max_pool2d, nll_loss
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_invariance import (
    InvarianceResult,
    TransformationSet,
    compare,
    evaluate,
    flips,
    plots,
    quarter_turns,
    rotations,
)
from lightning_invariance.measures import ChannelEquivariance, EquivarianceCorrelation, STTensor

MEASURES = {how: ChannelEquivariance(channels=how) for how in ("identity", "permutation", "linear")}
MEASURES["correlation"] = EquivarianceCorrelation()

SECTION = "\n## {}\n"


def measured(
    model: nn.Module, x: Tensor, transformations: TransformationSet, layers: object = None
) -> InvarianceResult:
    """All measures of equivariance, with intervals."""
    return evaluate(model, x, transformations, MEASURES, layers=layers, confidence=0.95)


def show(results: Mapping[str, InvarianceResult], layers: list[str] | None = None) -> None:
    """Print the mean of each measure for each layer and network, and the sizes of orbits."""
    first = next(iter(results.values()))
    columns = [f"{name}: {how}" for name in results for how in (*MEASURES, "orbits > 1")]
    print("| layer | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for layer in layers or first.layers:
        cells = []
        for result in results.values():
            cells += [f"{result.per_layer(how)[layer]:.2f}" if layer in result[how] else "" for how in MEASURES]
            sizes = (
                Counter(len(orbit.channels) for orbit in result.orbits(layer)) if layer in result.channel_maps else {}
            )
            cells.append(", ".join(f"{n} of {size}" for size, n in sorted(sizes.items()) if size > 1) or "none")
        print(f"| {layer} | " + " | ".join(cells) + " |")


def turned_copies(output: Path) -> None:
    """A convolution whose filters are turned copies of each other, and one with random filters."""
    print(SECTION.format("Turned copies of filters, and random ones"))
    torch.manual_seed(0)
    x = avg_pool2d(torch.randn(256, 1, 36, 36), 5, 1)
    filters, results = torch.randn(4, 1, 5, 5), {}
    networks = {
        name: nn.Sequential(nn.Conv2d(1, 16, 5, padding=2, bias=False), nn.ReLU()) for name in ("copies", "random")
    }
    networks["copies"][0].weight.data = torch.cat([torch.rot90(filters, turns, (2, 3)) for turns in range(4)])
    for name, model in networks.items():
        results[name] = measured(model, x, quarter_turns())
    show(results)
    print("\n", results["copies"].orbits("1"), sep="")
    letter = torch.zeros(2, 1, 32, 32)  # F, twice, since an evaluation needs two samples
    for rows, columns in ((slice(6, 26), slice(9, 12)), (slice(6, 9), slice(9, 22)), (slice(14, 17), slice(9, 18))):
        letter[:, :, rows, columns] = 1
    maps = evaluate(networks["copies"], letter, quarter_turns(), STTensor())["STTensor"]["1"][0]
    plots.orbits(results["copies"], "1", maps=maps).savefig(output / "orbits_copies.png")


class UNet(nn.Module):
    """A U-Net with two levels, for images of one channel and two classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = self._block(1, width)
        self.bottom = self._block(width, 2 * width)
        self.up = self._block(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _block(channels_in: int, channels: int) -> nn.Sequential:
        first = nn.Conv2d(channels_in, channels, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 1, h, w)`` → logits ``(batch, 2, h, w)``."""
        high = self.down(x)
        low = self.bottom(max_pool2d(high, 2))
        return self.head(self.up(torch.cat([high, interpolate(low, scale_factor=2)], 1)))


def bars(n: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Noisy images with an upright bar and a square each; the target is the bar."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(n, 1, size, size, generator=generator)
    targets = torch.zeros(n, size, size, dtype=torch.long)
    places = torch.randint(8, size - 12, (n, 4), generator=generator)
    for image, target, (x, y, u, v) in zip(images, targets, places.tolist(), strict=True):
        image[0, v : v + 6, u : u + 6] += 1
        image[0, y - 4 : y + 8, x : x + 3] += 1
        target[y - 4 : y + 8, x : x + 3] = 1
    return images, targets


def unet() -> None:
    """IoU under each angle, with masks that are mapped back and without; the targets stay as they are."""
    print(SECTION.format("A U-Net: masks that move with the image"))
    t, x = rotations(16), bars(2048, 0)
    for name in ("upright", "turned"):
        torch.manual_seed(0)
        model = UNet()
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(400):
            chosen = torch.randint(len(x[0]), (32,))
            images, targets = x[0][chosen], x[1][chosen]
            if name == "turned":
                j = step % len(t)
                images, targets = t[j](images), t[j](targets[:, None].float())[:, 0].round().long()
            optimiser.zero_grad()
            cross_entropy(model(images), targets, torch.tensor([1.0, 5.0])).backward()
            optimiser.step()
        data = torch.utils.data.TensorDataset(*bars(256, 1))
        for moves in (True, False):
            metric = MulticlassJaccardIndex(2, ignore_index=255)
            result = evaluate(model, data, t, outputs={"IoU": metric}, outputs_move=moves, layers=["head"])
            found = result.outputs["IoU"]
            shown = ", ".join(f"{t.labels[j]} {found.values[j]:.2f}" for j in (0, 1, 2, 4, 8))
            print(f"trained {name}, outputs_move={moves}: IoU {shown}; mean {found.mean:.2f}")


def simple_conv_on_mnist(folder: Path, epochs: int, output: Path) -> None:
    """SimpleConv, untrained, trained, and trained with rotations."""
    print(SECTION.format("SimpleConv on MNIST, 512 test images"))
    x, y = mnist(folder, False, train=True).tensors
    t, augmentation, results = quarter_turns(), rotations(16), {}
    test = mnist(folder, False, train=False).tensors[0][:512]
    for name in ("untrained", "trained", "with rotations"):
        torch.manual_seed(0)
        model = simple_conv(filters=16)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for chosen in (
            torch.cat([torch.randperm(len(x)) for _ in range(epochs)]).split(128) if name != "untrained" else ()
        ):
            images = x[chosen]
            if name == "with rotations":
                angles = torch.randint(16, (len(chosen),))
                for j in angles.unique().tolist():
                    images[angles == j] = augmentation[j](images[angles == j])
            optimiser.zero_grad()
            nll_loss(model(images).clamp_min(1e-8).log(), y[chosen]).backward()
            optimiser.step()
        results[name] = measured(model, test, t, ["conv*", "fc*"])
        print(f"{name}: done", flush=True)
    show(results)
    for how in ("identity", "permutation"):
        both = results["with rotations"], results["trained"]
        print(f"\n{how}: {compare(*both, measure=how, names=('with rotations', 'trained')).verdict}")
    plots.orbits(results["with rotations"], "conv1").savefig(output / "orbits_mnist.png")


def residual_networks(images: Path, weights: list[Path], output: Path) -> None:
    """Trained residual networks beside untrained ones."""
    for file in weights:
        model, x = trained_resnet(images, file)
        torch.manual_seed(0)
        untrained = CifarResNet(6 * len(model.layer1) + 2)
        for set_name, t in (("flips", flips()), ("quarter turns", quarter_turns())):
            print(SECTION.format(f"ResNet-{6 * len(model.layer1) + 2}, {set_name}, 512 test images"))
            layers = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d | nn.Linear)]
            results = {
                name: measured(network, x[:512], t, layers)
                for name, network in (("untrained", untrained), ("trained", model))
            }
            show(results)
            both = results["trained"], results["untrained"]
            for how in ("identity", "permutation"):
                print(f"\n{how}: {compare(*both, measure=how, names=('trained', 'untrained')).verdict}")
            plots.layers(results, measure="permutation").savefig(
                output / f"resnet{6 * len(model.layer1) + 2}_{set_name.replace(' ', '_')}.png"
            )
            if set_name == "flips":
                plots.orbits(results["trained"], "bn1").savefig(
                    output / f"orbits_resnet{6 * len(model.layer1) + 2}.png"
                )


def main() -> None:
    """Run what there is data for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--cifar", type=Path, help="npz with test images x (uint8, NHWC)")
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="state dicts of CIFAR ResNets")
    parser.add_argument("--output", type=Path, default=Path("runs/equivariance"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    turned_copies(options.output)
    unet()
    if options.mnist:
        simple_conv_on_mnist(options.mnist, options.epochs, options.output)
    if options.cifar:
        residual_networks(options.cifar, options.weights, options.output)


if __name__ == "__main__":
    main()
