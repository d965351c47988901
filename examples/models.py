"""The models of the paper that the examples and benchmarks use."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def simple_conv(channels: int = 1, size: int = 28, filters: int = 32, classes: int = 10) -> nn.Sequential:
    """SimpleConv (paper, figure 12): five 3×3 convolutions and two linear layers with ELU, max pooling, softmax.

    Args:
        channels: of the input images.
        size: height and width of the input images.
        filters: of the first two convolutions; the next have two and four times as many.
        classes: outputs.
    """
    f, features = filters, 4 * filters * (size // 4) ** 2
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, f, 3, padding=1),
            elu1=nn.ELU(),
            conv2=nn.Conv2d(f, f, 3, padding=1),
            elu2=nn.ELU(),
            pool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(f, 2 * f, 3, padding=1),
            elu3=nn.ELU(),
            conv4=nn.Conv2d(2 * f, 2 * f, 3, padding=1),
            elu4=nn.ELU(),
            pool2=nn.MaxPool2d(2),
            conv5=nn.Conv2d(2 * f, 4 * f, 3, padding=1),
            elu5=nn.ELU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(features, 4 * f),
            elu6=nn.ELU(),
            fc2=nn.Linear(4 * f, classes),
            softmax=nn.Softmax(dim=1),
        )
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut that subsamples and pads channels with zeros (He et al. 2015, option A)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride, self.padding = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels_in, h, w)`` → ``(batch, channels, h / stride, w / stride)``."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return self.relu2(y + shortcut)


class CifarResNet(nn.Module):
    """ResNet for 32×32 images (He et al. 2015, section 4.2): three stages of (depth − 2) / 6 blocks."""

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


def trained_resnet(images: Path, weights: Path) -> tuple[CifarResNet, Tensor]:
    """A trained CIFAR ResNet, and images as it takes them.

    Args:
        images: npz with x (uint8, NHWC).
        weights: state dict of the network, whose depth it tells.
    """
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
    model = CifarResNet(6 * len({name.split(".")[1] for name in state if name.startswith("layer1.")}) + 2)
    model.load_state_dict(state, strict=False)
    with np.load(images, allow_pickle=False) as data:
        x = torch.from_numpy(data["x"]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return model, (x - mean[:, None, None]) / std[:, None, None]
