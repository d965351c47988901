"""Train one small network twice, with and without rotation augmentation, watch its invariance, and compare the two.

The data are scikit-learn's handwritten digits (8×8 pixels, part of its wheel). Takes about a minute.
"""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_invariance import InvarianceMonitor, InvarianceResult, TransformationSet, compare, evaluate, rotations
from lightning_invariance.plots import evolution, layers

EPOCHS = 20
FOLDER = Path("runs/quickstart")


class DigitNet(pl.LightningModule):
    """A small CNN; with ``augmentation``, each batch of training images is split among its transformations."""

    def __init__(self, augmentation: TransformationSet | None = None) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.act1 = nn.ELU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.act2 = nn.ELU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * 4 * 4, 64)
        self.act3 = nn.ELU()
        self.fc2 = nn.Linear(64, 10)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.act1(self.conv1(x)))
        x = self.pool2(self.act2(self.conv2(x)))
        x = self.fc2(self.act3(self.fc1(x.flatten(1))))
        return self.softmax(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        if self.augmentation is not None:
            every = self.augmentation(x)
            x = every[torch.arange(len(x)), torch.randint(len(self.augmentation), (len(x),))]
        return cross_entropy(self(x).clamp_min(1e-8).log(), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def digits() -> list[Subset[tuple[Tensor, ...]]]:
    """Handwritten digits of 16×16 pixels and their classes, for training and validation."""
    data = load_digits()
    # 8×8 pixels hardly turn: enlarge them, with a border so that no stroke leaves the frame.
    x = interpolate(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, size=12, mode="bilinear")
    x = nn.functional.pad(x, (2, 2, 2, 2))
    parts = TensorDataset(x, torch.tensor(data.target))
    return random_split(parts, [0.7, 0.3], generator=torch.Generator().manual_seed(0))


def train(name: str, augmentation: TransformationSet | None) -> tuple[InvarianceMonitor, InvarianceResult]:
    """Train the network once with the monitor on, and evaluate it on the whole validation set, with intervals."""
    pl.seed_everything(0, verbose=False)
    train_set, val_set = digits()
    monitor = InvarianceMonitor(rotations(16))
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[monitor],
        logger=TensorBoardLogger(FOLDER, name=None, version=name),
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    model = DigitNet(augmentation)
    trainer.fit(model, DataLoader(train_set, 64, shuffle=True), DataLoader(val_set, 128))
    print(f"{name}: accuracy on upright digits {trainer.callback_metrics['val_accuracy']:.3f}")
    return monitor, evaluate(model, val_set, rotations(16), include_input=True, confidence=0.95, progress=False)


def main() -> None:
    """Train both, compare them."""
    _, plain = train("plain", None)
    monitor, augmented = train("augmented", rotations(16))

    print(
        "\nWith rotated digits in training. 0: rotating a digit changes nothing; 1: as much as taking another digit.\n"
    )
    print(augmented.table())
    print(f"\n{compare(plain, augmented, names=('plain', 'augmented'))}")

    layers({"plain": plain, "augmented": augmented}, dashed="plain").savefig(FOLDER / "layers.png")
    evolution(monitor.history).savefig(FOLDER / "evolution.png")
    print(f"\nPictures: {FOLDER / 'layers.png'} and {FOLDER / 'evolution.png'}")
    print(f"Curves and heatmaps: .venv/bin/tensorboard --logdir {FOLDER}, then open http://localhost:6006")


if __name__ == "__main__":
    main()
