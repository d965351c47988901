"""The models of the paper that the examples and benchmarks use."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


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
