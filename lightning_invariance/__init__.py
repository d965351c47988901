"""See, while a PyTorch Lightning model trains, how invariant every layer and unit is to input transformations."""

from lightning_invariance.callback import InvarianceMonitor
from lightning_invariance.compare import compare
from lightning_invariance.comparison import Comparison
from lightning_invariance.evaluate import evaluate
from lightning_invariance.loader import STLoader
from lightning_invariance.naming import layer_names
from lightning_invariance.result import InvarianceResult
from lightning_invariance.transforms import (
    TransformationSet,
    combine,
    flips,
    quarter_turns,
    rotations,
    scales,
    translations,
)

__all__ = [
    "Comparison",
    "InvarianceMonitor",
    "InvarianceResult",
    "STLoader",
    "TransformationSet",
    "combine",
    "compare",
    "evaluate",
    "flips",
    "layer_names",
    "quarter_turns",
    "rotations",
    "scales",
    "translations",
]
