"""The measures of the paper as ``torchmetrics.Metric`` classes with online, mergeable states."""

from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures.anova import Anova
from lightning_invariance.measures.base import Measure, quotient
from lightning_invariance.measures.channel_equivariance import ChannelEquivariance
from lightning_invariance.measures.components import IntraclassCorrelation, MainEffect
from lightning_invariance.measures.consistency import Consistency, EffectiveInvariance
from lightning_invariance.measures.distance import NormalizedDistance, SampleDistance, TransformationDistance
from lightning_invariance.measures.equivariance_correlation import EquivarianceCorrelation
from lightning_invariance.measures.goodfellow import Goodfellow
from lightning_invariance.measures.same_equivariance import DistanceSameEquivariance, VarianceSameEquivariance
from lightning_invariance.measures.st_tensor import STTensor
from lightning_invariance.measures.stratified import Stratified
from lightning_invariance.measures.variance import NormalizedVariance, SampleVariance, TransformationVariance

__all__ = [
    "Anova",
    "ChannelEquivariance",
    "Consistency",
    "DistanceSameEquivariance",
    "EffectiveInvariance",
    "EquivarianceCorrelation",
    "Goodfellow",
    "IntraclassCorrelation",
    "MainEffect",
    "Measure",
    "NormalizedDistance",
    "NormalizedVariance",
    "STTensor",
    "SampleDistance",
    "SampleVariance",
    "Stratified",
    "Sums",
    "TransformationDistance",
    "TransformationVariance",
    "VarianceSameEquivariance",
    "quotient",
]
