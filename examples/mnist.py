"""The paper's SimpleConv on MNIST, with and without augmentation, and its invariance while it trains.

    python examples/mnist.py --data DIR --download --epochs 3 --filters 32 --transformations rotation

Trains twice and compares, as in the paper's figure 16: the network that was trained with augmentation is more invariant
in its last layers. Which layers differ by more than chance, and what an epoch changes, the intervals over samples tell.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from models import simple_conv
from torch import Tensor
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

from lightning_invariance import (
    InvarianceMonitor,
    TransformationSet,
    combine,
    compare,
    plots,
    rotations,
    scales,
    translations,
)

SETS = {
    "rotation": lambda: rotations(16),
    "scale": scales,
    "translation": translations,
    # The paper's combined set has 4224 members; this one of 72 covers the same range.
    "combined": lambda: combine(rotations(8), scales(factors=[0.5, 1, 1.25]), translations(pixels=[4])[4:7]),
}


class Classifier(pl.LightningModule):
    """SimpleConv; in training every image is moved by a random transformation, where there are some."""

    def __init__(self, filters: int, augmentation: TransformationSet | None) -> None:
        super().__init__()
        self.net = simple_conv(1, 28, filters)
        self.augmentation = augmentation

    def forward(self, x: Tensor) -> Tensor:
        """Class probabilities."""
        return self.net(x)

    def augmented(self, x: Tensor) -> Tensor:
        """Each image under one transformation, chosen at random."""
        if self.augmentation is None:
            return x
        chosen = torch.randint(len(self.augmentation), (len(x),))
        moved = torch.empty_like(x)
        for j in chosen.unique().tolist():
            moved[chosen == j] = self.augmentation[j](x[chosen == j])
        return moved

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Cross entropy of the probabilities."""
        x, y = batch
        return nll_loss(self(self.augmented(x)).clamp_min(1e-8).log(), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Accuracy on images as they are."""
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The paper's optimiser, with a larger step for fewer epochs."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def mnist(root: Path, download: bool, train: bool) -> TensorDataset:
    """MNIST with standardised pixels, black where nothing is drawn."""
    data = MNIST(root, train=train, download=download)
    return TensorDataset(data.data[:, None].float() / 255, data.targets)


def main() -> None:
    """Train both networks, then print and draw the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that holds MNIST/raw (default: data)")
    parser.add_argument("--download", action="store_true", help="download MNIST into that folder")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--filters", type=int, default=32, help="of the first convolution (paper: 64 for MNIST)")
    parser.add_argument("--transformations", choices=SETS, default="rotation")
    parser.add_argument("--max-samples", type=int, default=256, help="test images to measure with")
    parser.add_argument("--output", type=Path, default=Path("runs/mnist"))
    options = parser.parse_args()

    train_set, test_set = (mnist(options.data, options.download, train) for train in (True, False))
    transformations = SETS[options.transformations]()
    monitors: dict[str, InvarianceMonitor] = {}
    for name, augmentation in (("not augmented", None), ("augmented", transformations)):
        pl.seed_everything(0, verbose=False)
        monitors[name] = InvarianceMonitor(
            transformations, layers="net.*", max_samples=options.max_samples, confidence=0.95
        )
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            callbacks=[monitors[name]],
            logger=TensorBoardLogger(options.output, name=None, version=name.replace(" ", "_")),
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        loaders = DataLoader(train_set, 256, shuffle=True), DataLoader(test_set, 1024)
        trainer.fit(Classifier(options.filters, augmentation), *loaders)
        print(f"{name}: accuracy on test images as they are {trainer.callback_metrics['val_accuracy']:.4f}")

    results = {name: monitor.history[-1] for name, monitor in monitors.items()}
    names = "not augmented", "augmented"
    print(f"\n{options.transformations} set (lower is more invariant)\n")
    print(compare(*results.values(), names=names))
    first, last = monitors["augmented"].history[1], monitors["augmented"].history[-1]
    epochs = f"epoch {first.epoch + 1}", f"epoch {last.epoch + 1}"
    print("\nAugmented, after the first and the last epoch\n")
    print(compare(first, last, names=epochs))

    plots.compare(*results.values(), names=names).savefig(options.output / "compare.png")
    plots.compare(first, last, names=epochs).savefig(options.output / "epochs.png")
    plots.layers(results).savefig(options.output / "layers.png")
    plots.evolution(monitors["augmented"].history).savefig(options.output / "evolution.png")
    plots.heatmap(results["augmented"]).savefig(options.output / "heatmap.png")
    print(f"\nPictures in {options.output}; curves: tensorboard --logdir {options.output}")


if __name__ == "__main__":
    main()
