"""Sets of input transformations, each with its inverse."""

from lightning_invariance.transforms.affine import AffineSet, rotations, scales, translations
from lightning_invariance.transforms.base import Transformation, TransformationSet
from lightning_invariance.transforms.combine import combine
from lightning_invariance.transforms.exact import flips, quarter_turns
from lightning_invariance.transforms.noise import noise
from lightning_invariance.transforms.positions import permutations, shifts
from lightning_invariance.transforms.volumes import volume_rotations

__all__ = [
    "AffineSet",
    "Transformation",
    "TransformationSet",
    "combine",
    "flips",
    "noise",
    "permutations",
    "quarter_turns",
    "rotations",
    "scales",
    "shifts",
    "translations",
    "volume_rotations",
]
