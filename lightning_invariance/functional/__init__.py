"""Measures of a whole ST tensor: short, slow reference formulas."""

from lightning_invariance.functional.anova import anova
from lightning_invariance.functional.distance import (
    normalized_distance,
    sample_distance,
    transformation_distance,
)
from lightning_invariance.functional.equivariance import distance_same_equivariance, variance_same_equivariance
from lightning_invariance.functional.goodfellow import goodfellow
from lightning_invariance.functional.variance import (
    normalized_variance,
    sample_variance,
    transformation_variance,
)

__all__ = [
    "anova",
    "distance_same_equivariance",
    "goodfellow",
    "normalized_distance",
    "normalized_variance",
    "sample_distance",
    "sample_variance",
    "transformation_distance",
    "transformation_variance",
    "variance_same_equivariance",
]
