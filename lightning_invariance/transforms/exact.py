"""Quarter turns and flips of images, which permute pixels and are exact."""

from __future__ import annotations

import torch

from lightning_invariance.transforms.affine import AffineSet, rotations


def quarter_turns() -> AffineSet:
    """Rotations by 0°, 90°, 180° and 270°, counter-clockwise: exact permutations of the pixels of square images.

    Other images raise a ``ValueError``, since a quarter turn does not map them onto themselves.

    Example:
        >>> import torch
        >>> x = torch.arange(4.0).view(1, 1, 2, 2)
        >>> quarter_turns()[1](x).tolist()
        [[[[1.0, 3.0], [0.0, 2.0]]]]
    """
    turns = rotations(4)
    return AffineSet(turns.matrices, turns.labels, turns.parameters, square=True)


def flips() -> AffineSet:
    """The identity, horizontal flip (left and right exchanged), vertical flip and both: exact permutations of pixels.

    Example:
        >>> import torch
        >>> flips()[1](torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).tolist()
        [[[[2.0, 1.0], [4.0, 3.0]]]]
    """
    signs = [[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]
    matrices = torch.stack([torch.diag(torch.tensor([*sign, 1.0], dtype=torch.float64)) for sign in signs])
    return AffineSet(matrices, ["identity", "horizontal", "vertical", "both"])
