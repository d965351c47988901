"""The measures as formulas on a whole ST tensor: short, slow, obviously right."""

from lightning_invariance.functional.variance import (
    normalized_variance,
    sample_variance,
    transformation_variance,
)

__all__ = ["normalized_variance", "sample_variance", "transformation_variance"]
