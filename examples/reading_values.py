"""Normalized Variance of real networks and of their inputs: prints the table of reading_values.md.

    python examples/reading_values.py --data DIR --cifar cifar10_test.npz --weights resnet20.th resnet32.th

DIR holds MNIST/raw. Two small SimpleConv are trained on MNIST, with and without rotated digits (two minutes); the CIFAR
ResNets are pretrained. 500 test images each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from mnist import Classifier, mnist
from models import trained_resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_invariance import InvarianceResult, TransformationSet, evaluate, rotations, scales, translations

N = 500


def on_mnist(root: Path) -> Iterator[tuple[str, nn.Module, Tensor, float]]:
    """SimpleConv, trained for one epoch without and with rotated digits."""
    train_set, test_set = (mnist(root, False, train) for train in (True, False))
    for name, augmentation in (("upright digits", None), ("rotated digits", rotations(16))):
        pl.seed_everything(0, verbose=False)
        model = Classifier(8, augmentation)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=1, enable_progress_bar=False, **quiet)
        trainer.fit(model, DataLoader(train_set, 128, shuffle=True))
        yield f"SimpleConv, MNIST, {name}", model.net, test_set.tensors[0][:N], 0.0


def row(result: InvarianceResult, layer: str) -> str:
    """The mean of a layer and half the width of its interval, and the mean of the live units where some are dead."""
    found = next(each for each in result.table() if each.layer == layer)
    live = f" (live {found.live_mean:.2f})" if found.share_dead > 0.01 else ""
    return f"{found.mean:.2f} ± {(found.high - found.low) / 2:.2f}{live}"


def main() -> None:
    """Print a row for each network and set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    networks = [*on_mnist(options.data)]
    for path in options.weights:
        model, images = trained_resnet(options.cifar, path)
        black = torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]).tolist()
        networks.append((f"{path.stem.partition('-')[0]}, CIFAR-10", model, images[:N], black))
    print("| network | transformations | input | first convolution | middle | last convolution or pool | output |")
    print("|---|---|---|---|---|---|---|")
    for name, model, x, black in networks:
        sets: dict[str, TransformationSet] = {
            "16 rotations": rotations(16, fill=black),
            "16 rotations, filled with 0": rotations(16),
            "scales": scales(fill=black),
            "translations": translations(fill=black),
        }
        for kind, transformations in sets.items():
            if kind.endswith("with 0") and black == 0.0:
                continue
            result = evaluate(model, x, transformations, include_input=True, confidence=0.95, progress=False)
            types = {layer: result.layer_types.get(layer, "") for layer in result.layers}
            maps = [layer for layer, kind in types.items() if "Conv" in kind or "Pool" in kind]
            shown = ["input", maps[0], maps[len(maps) // 2], maps[-1], result.layers[-1]]
            print(f"| {name} | {kind} | " + " | ".join(row(result, layer) for layer in shown) + " |", flush=True)


if __name__ == "__main__":
    main()
