"""The measures of the paper as ``torchmetrics.Metric`` classes with online, mergeable states."""

from lightning_invariance.measures.anova import Anova
from lightning_invariance.measures.base import Measure
from lightning_invariance.measures.distance import NormalizedDistance, SampleDistance, TransformationDistance
from lightning_invariance.measures.variance import NormalizedVariance, SampleVariance, TransformationVariance

__all__ = [
    "Anova",
    "Measure",
    "NormalizedDistance",
    "NormalizedVariance",
    "SampleDistance",
    "SampleVariance",
    "TransformationDistance",
    "TransformationVariance",
]
