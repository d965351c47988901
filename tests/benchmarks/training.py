"""Cost of the callback at its default settings in a whole training: two epochs of a ResNet-20, with and without it.

    python tests/benchmarks/training.py [--images 10000] [--epochs 2] [--rounds 3] [--confidence 0.95]

Prints how much longer the training with it takes, what that would be for an epoch of 50,000 images, and where the time
of an evaluation goes: forward passes, sums and all else around them, pictures and logs. Random images stand in for
CIFAR-10, which they do not differ from in time. Exits with 1 where the target, of the default settings, is missed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from speed import machine, time_of_passes, transformed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_invariance import InvarianceMonitor, rotations
from lightning_invariance.monitor import callback

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from models import CifarResNet

#: How much longer a training with the callback may take.
TARGET = 1.28

#: Images of an epoch of CIFAR-10.
EPOCH = 50_000


class Classifier(pl.LightningModule):
    """A ResNet-20."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = CifarResNet(20)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def images(count: int) -> TensorDataset:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(count, 3, 32, 32, generator=generator), torch.arange(count) % 10)


@contextmanager
def timed(times: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of evaluations and of pictures while the context lasts."""
    originals = {"evaluations": callback.evaluate_with, "pictures and logs": callback.draw}

    def wrapped(name: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return originals[name](*args, **options)
            finally:
                times[name] = times.get(name, 0) + time.perf_counter() - start

        return run

    callback.evaluate_with, callback.draw = (wrapped(name) for name in originals)
    try:
        yield
    finally:
        callback.evaluate_with, callback.draw = originals.values()


def train(count: int, epochs: int, monitor: InvarianceMonitor | None) -> float:
    """Seconds of a training."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=TensorBoardLogger(folder),
            callbacks=[] if monitor is None else [monitor],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        training, validation = DataLoader(images(count), 64, shuffle=True), DataLoader(images(512), 64)
        start = time.perf_counter()
        trainer.fit(Classifier(), training, validation)
        return time.perf_counter() - start


def main() -> int:
    """Print every figure; 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--confidence", type=float, help="of intervals, which the callback leaves out by default")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train(640, 1, InvarianceMonitor(rotations(16), max_samples=16))  # warms up
    evaluations = options.epochs + 1
    classifier = Classifier().eval()
    passes = evaluations * time_of_passes(classifier, transformed(images(256).tensors[0]))
    found: list[float] = []
    added: list[float] = []
    times: dict[str, float] = {}
    for _ in range(options.rounds):
        without = train(options.images, options.epochs, None)
        with timed(times):
            monitor = InvarianceMonitor(rotations(16), confidence=options.confidence)
            own = train(options.images, options.epochs, monitor)
        found.append(own / without)
        added.append((own - without) / evaluations)
        epoch = without / options.epochs * EPOCH / options.images
        print(f"without {without:.1f} s, with {own:.1f} s: {own / without:.3f}", flush=True)
    ratio, each = statistics.median(found), statistics.median(added)
    parts = {name: seconds / options.rounds / evaluations for name, seconds in times.items()}
    parts["forward passes"] = passes / evaluations
    print(f"\n{machine()}\n")
    target = TARGET if options.confidence is None else None
    about = "with intervals" if target is None else f"at most {target}"
    print(f"{options.epochs} epochs of {options.images} images: {ratio:.3f} ({about})")
    print(f"an epoch of {EPOCH} images, one evaluation each: {1 + each / epoch:.3f}")
    print(f"of the {each:.2f} s of an evaluation: {parts['forward passes']:.2f} s forward passes,")
    print(f"{parts['evaluations'] - parts['forward passes']:.2f} s sums and all else in `evaluate`,")
    print(f"{parts['pictures and logs']:.2f} s pictures and logs")
    return int(target is not None and ratio > target)


if __name__ == "__main__":
    sys.exit(main())
