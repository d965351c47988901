"""The ST matrix itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class STTensor(Metric):
    """Keeps the sample × transformation matrices of a few samples instead of measuring them.

    For pictures and for looking closer: ``evaluate(model, images[:4], rotations(8), STTensor())["STTensor"]["conv1"]``
    is the ST tensor of a layer, which the functions of ``lightning_invariance.functional`` take. Its memory grows with
    every sample.

    As input to ``forward`` and ``update`` the metric accepts

    - ``st_block`` (:class:`~torch.Tensor`): complete rows of the ST matrix of every activation of a layer,
      ``(samples, transformations, *activation_shape)``.

    As output of ``forward`` and ``compute`` the metric returns all of them: ``(samples, transformations,
    *activation_shape)``.

    Args:
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from lightning_invariance import evaluate, quarter_turns
        >>> from lightning_invariance.measures import STTensor
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 5, 3))
        >>> evaluate(model, torch.rand(2, 1, 8, 8), quarter_turns(), STTensor())["STTensor"]["0"].shape
        torch.Size([2, 4, 5, 6, 6])
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    full_state_update = False

    blocks: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("blocks", [], dist_reduce_fx="cat")

    def update(self, st_block: Tensor) -> None:
        """Keep complete rows of the ST matrix."""
        self.blocks = [*self.blocks, st_block.detach().clone()]

    def compute(self) -> Tensor:
        """All rows so far."""
        return dim_zero_cat(self.blocks) if self.blocks else torch.zeros(0)
