"""The measures of the paper as ``torchmetrics.Metric`` classes with online, mergeable states."""

from lightning_invariance.measures.base import Measure
from lightning_invariance.measures.variance import NormalizedVariance, SampleVariance, TransformationVariance

__all__ = ["Measure", "NormalizedVariance", "SampleVariance", "TransformationVariance"]
