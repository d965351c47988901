"""See, while a PyTorch Lightning model trains, how invariant every layer and unit is to input transformations."""

from lightning_invariance.data.loader import STLoader
from lightning_invariance.evaluate import evaluate, layer_names
from lightning_invariance.monitor.callback import InvarianceMonitor
from lightning_invariance.results.compare import compare
from lightning_invariance.results.comparison import Comparison
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.transforms import (
    TransformationSet,
    combine,
    flips,
    noise,
    permutations,
    quarter_turns,
    rotations,
    scales,
    shifts,
    translations,
    volume_rotations,
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
    "noise",
    "permutations",
    "quarter_turns",
    "rotations",
    "scales",
    "shifts",
    "translations",
    "volume_rotations",
]
