"""Every picture of this package, from networks trained here: handwritten digits, with and without rotated ones.

    python examples/gallery.py                 # scikit-learn's digits, no download
    python examples/gallery.py --data DIR      # MNIST in torchvision's layout, in DIR/MNIST/raw

Trains a small CNN without augmentation, and three with it that differ in their seed. Takes less than five minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from models import simple_conv
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate, nll_loss, pad
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

from lightning_invariance import InvarianceMonitor, TransformationSet, evaluate, plots, rotations, translations
from lightning_invariance.measures import NormalizedVariance, STTensor

TURNS = rotations(16)


class Digits(pl.LightningModule):
    """A small SimpleConv; with ``augmentation``, each training image is transformed at random."""

    def __init__(self, size: int, augmentation: TransformationSet | None) -> None:
        super().__init__()
        self.net = simple_conv(1, size, filters=8)
        self.augmentation = augmentation

    def forward(self, x: Tensor) -> Tensor:
        """Class probabilities."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        if self.augmentation is not None:
            every = self.augmentation(x)
            x = every[torch.arange(len(x)), torch.randint(len(self.augmentation), (len(x),))]
        return nll_loss(self(x).clamp_min(1e-8).log(), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Accuracy on upright digits."""
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def digits(root: Path | None) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images with labels: some of MNIST, or scikit-learn's digits enlarged to 16×16."""
    if root is not None:
        parts = [MNIST(root, train=train) for train in (True, False)]
        counts = (6000, 2000)
        images = [part.data[:n, None].float() / 255 for part, n in zip(parts, counts, strict=True)]
        labels = [part.targets[:n] for part, n in zip(parts, counts, strict=True)]
        return TensorDataset(images[0], labels[0]), TensorDataset(images[1], labels[1])
    data = load_digits()
    x = interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, size=12, mode="bilinear")
    x, y = pad(x, (2, 2, 2, 2)), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return TensorDataset(x[order[:1200]], y[order[:1200]]), TensorDataset(x[order[1200:]], y[order[1200:]])


def train(
    data: tuple[TensorDataset, TensorDataset], name: str, turned: bool, seed: int, options: argparse.Namespace
) -> tuple[Digits, InvarianceMonitor]:
    """Train one network with the monitor on."""
    pl.seed_everything(seed, verbose=False)
    monitor = InvarianceMonitor(TURNS, layers="net.*", max_samples=128)
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[monitor],
        logger=TensorBoardLogger(options.output / "logs", name=None, version=name.replace(" ", "_")),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    model = Digits(data[0][0][0].shape[-1], TURNS if turned else None)
    trainer.fit(model, DataLoader(data[0], 64, shuffle=True), DataLoader(data[1], 256))
    print(f"{name}: accuracy on upright digits {trainer.callback_metrics['val_accuracy']:.3f}", flush=True)
    return model, monitor


def main() -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds MNIST/raw; by default scikit-learn's digits")
    parser.add_argument("--epochs", type=int, help="by default 15 on the digits, 10 on MNIST")
    parser.add_argument("--output", type=Path, default=Path("runs/gallery"))
    options = parser.parse_args()
    options.epochs = options.epochs or (10 if options.data else 15)
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    data = digits(options.data)
    _, watched_plain = train(data, "not augmented", False, 0, options)
    augmented = [train(data, f"augmented {seed}", True, seed, options) for seed in range(3)]
    model, watched = augmented[0]
    without, with_ = watched_plain.history[-1], watched.history[-1]

    figures = {
        "layers": plots.layers({"not augmented": without, "augmented": with_}, dashed="not augmented"),
        "heatmap": plots.heatmap(with_),
        "heatmap_sorted": plots.heatmap(without, sort=True),
        "evolution": plots.evolution(watched.history),
        "response": plots.response(with_),
        "response_not_augmented": plots.response(without),
        "compare": plots.compare(without, with_, names=("not augmented", "augmented")),
        "stability": plots.stability([monitor.history[-1] for _, monitor in augmented]),
    }
    test = data[1]
    shifted = evaluate(model, test, translations(), NormalizedVariance(response=True), layers="net.*", max_samples=64)
    figures["response_translations"] = plots.response(shifted)
    many = [evaluate(model, test, TURNS, layers="net.*", max_samples=n) for n in (64, 128, 256, 512)]
    figures["convergence"] = plots.convergence(many)
    counts = [evaluate(model, test, rotations(m), layers="net.*", max_samples=64) for m in (2, 4, 8, 16, 32)]
    figures["convergence_transformations"] = plots.convergence(counts)
    eight, images = rotations(8), test.tensors[0][:2]
    by_eight = evaluate(model, test, eight, layers="net.*", max_samples=128)
    maps = evaluate(model, images, eight, STTensor(), layers="net.elu1")["STTensor"]["net.elu1"]
    figures["feature_maps"] = plots.feature_maps(by_eight, "net.elu1", eight(images)[0], maps[0])

    for name, figure in figures.items():
        figure.savefig(options.output / f"{name}.png")
    print(f"{len(figures)} pictures in {options.output} after {time.perf_counter() - start:.0f} s")
    print(f"curves: tensorboard --logdir {options.output / 'logs'}")


if __name__ == "__main__":
    main()
