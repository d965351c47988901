"""A trained ResNet on CIFAR-10: every layer's values against the definitions on the stored ST cube, in float64.

    python tests/benchmarks/stored_cube.py resnet20.th cifar10_test.npz [--samples 48]

The first file is a state dict of a CIFAR ResNet (keys may carry the prefix ``module.``), the second holds ``x`` (uint8,
NHWC) and ``y``. Prints the largest relative difference of each layer; exits with 1 where one exceeds 1e-4.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_invariance import evaluate, functional, rotations
from lightning_invariance.measures import NormalizedVariance, SampleVariance, TransformationVariance

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from models import CifarResNet

MEASURES = {
    "NormalizedVariance": (NormalizedVariance(), functional.normalized_variance),
    "TransformationVariance": (TransformationVariance(), functional.transformation_variance),
    "SampleVariance": (SampleVariance(), functional.sample_variance),
}


def load_model(path: Path) -> CifarResNet:
    """The ResNet whose depth the file tells."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
    depth = 6 * len({name.split(".")[1] for name in state if name.startswith("layer1.")}) + 2
    model = CifarResNet(depth)
    model.load_state_dict(state, strict=False)
    return model.eval()


def load_images(path: Path, samples: int) -> tuple[Tensor, Tensor]:
    """Standardised images (n, 3, 32, 32) and labels."""
    with np.load(path, allow_pickle=False) as data:
        x, y = torch.from_numpy(data["x"][:samples]), torch.from_numpy(data["y"][:samples]).long()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(), y


def stored_cubes(model: nn.Module, inputs: Tensor, rows: int, columns: int) -> dict[str, Tensor]:
    """The float32 activations of every leaf module under the same batches, kept whole."""
    kept: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, output, name=name: kept.setdefault(name, []).append(output.clone()))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        for batch in inputs.split(64):
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).unflatten(0, (rows, columns)) for name, parts in kept.items()}


def main() -> int:
    """Print the comparison; 1 if a layer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--samples", type=int, default=48)
    options = parser.parse_args()
    model, t = load_model(options.weights), rotations(16)
    x, y = load_images(options.images, options.samples)
    with torch.no_grad():
        print(f"accuracy on these {len(x)} images: {(model(x).argmax(1) == y).float().mean():.3f}")
    result = evaluate(model, x, t, {name: measure for name, (measure, _) in MEASURES.items()})
    cubes = stored_cubes(model, t(x).flatten(0, 1), len(x), len(t))
    assert result.layers == list(cubes)
    worst = 0.0
    print(f"{'layer':18s}{'activations':>12s}" + "".join(f"{name:>24s}" for name in MEASURES))
    for layer, cube in cubes.items():
        differences = []
        for name, (_, definition) in MEASURES.items():
            expected, value = definition(cube.double()), result[name][layer]
            same = (value == expected) | (value.isnan() & expected.isnan())
            differences.append(float(torch.where(same, 0.0, (value - expected).abs() / expected.abs()).max()))
        worst = max(worst, *differences)
        print(f"{layer:18s}{cube[0, 0].numel():12d}" + "".join(f"{d:24.1e}" for d in differences))
    print(f"largest relative difference: {worst:.1e}")
    return int(not worst < 1e-4)


if __name__ == "__main__":
    sys.exit(main())
