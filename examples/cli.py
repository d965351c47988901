"""The digits of the quickstart with LightningCLI: the monitor, its transformations and measures come from a YAML file.

    python examples/cli.py fit --config examples/cli.yaml
    python examples/cli.py fit --help                              # what can be configured
    python examples/cli.py fit --trainer.callbacks.help lightning_invariance.InvarianceMonitor

A function of your own that returns a TransformationSet is as good a ``class_path`` as ``rotations``. Needs
``jsonargparse[signatures]``, which the extra ``examples`` brings.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split


class DigitNet(pl.LightningModule):
    """A small CNN.

    Args:
        filters: of the first convolution; the second has twice as many.
        learning_rate: of the optimiser.
    """

    def __init__(self, filters: int = 8, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Conv2d(1, filters, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(filters, 2 * filters, 3, padding=1),
            nn.ELU(),
            nn.Flatten(),
            nn.Linear(2 * filters * 64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Cross entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        """Accuracy."""
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


class Digits(pl.LightningDataModule):
    """scikit-learn's handwritten digits, 8×8 pixels.

    Args:
        batch_size: of training and validation.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Part into training and validation."""
        digits = load_digits()
        data = TensorDataset(torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target))
        self.train_set, self.val_set = random_split(data, [0.7, 0.3])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Seven tenths."""
        return DataLoader(self.train_set, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The rest."""
        return DataLoader(self.val_set, self.batch_size)


if __name__ == "__main__":
    LightningCLI(DigitNet, Digits, seed_everything_default=0)
