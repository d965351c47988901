"""A measure that returns the ST tensor of a layer."""

from __future__ import annotations

from torch import Tensor

from lightning_invariance.accumulators import Matrix
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.base import Measure


class STTensor(Measure):
    """The ST tensor of each layer: the sample × transformation matrices of all activations.

    For figures, and as input to the functions of ``lightning_invariance.functional``, for a few samples: its memory
    grows with every sample. The value is ``(samples, transformations, *activation_shape)``, in the order of
    ``indices``, if given.

    Example:
        >>> import torch
        >>> from lightning_invariance import evaluate, quarter_turns
        >>> from lightning_invariance.measures import STTensor
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 5, 3))
        >>> evaluate(model, torch.rand(2, 1, 8, 8), quarter_turns(), STTensor())["STTensor"]["0"].shape
        torch.Size([2, 4, 5, 6, 6])
    """

    any_channel_axis = True
    higher_is_better: bool | None = None
    needs = (Matrix(),)
    least_transformations = 1

    def value(self, sums: Sums) -> Tensor:
        """All rows, in the order of ``indices``."""
        return sums["rows"][sums["order"].argsort(stable=True).to(sums["rows"].device)]

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """``(samples, transformations, *activation_shape)``."""
        return (sums.n_samples, sums.n_transformations, *sums.activation_shape)
