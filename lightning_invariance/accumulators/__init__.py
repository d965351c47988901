"""Families of sums over the ST matrix, from which measures compute values, and which processes merge.

A custom measure names one of these, or its own subclass of :class:`Accumulator`.
"""

from lightning_invariance.accumulators.base import Accumulator
from lightning_invariance.accumulators.by_class import ByClass
from lightning_invariance.accumulators.changes import Changes
from lightning_invariance.accumulators.channel_moments import ChannelMoments
from lightning_invariance.accumulators.column_means import means_of
from lightning_invariance.accumulators.constant import Constant
from lightning_invariance.accumulators.deviations import Deviations
from lightning_invariance.accumulators.direct import Correlations, DirectDistances
from lightning_invariance.accumulators.distances import RowDistances
from lightning_invariance.accumulators.grouped_pairs import GroupedPairs
from lightning_invariance.accumulators.mapped_back import MappedBack
from lightning_invariance.accumulators.matrix import Matrix
from lightning_invariance.accumulators.paired import PairedDeviations
from lightning_invariance.accumulators.peaks import Extremes, Firing, Peaks
from lightning_invariance.accumulators.rows import Context, Rows, States
from lightning_invariance.accumulators.subsample import ColumnPairs
from lightning_invariance.accumulators.winners import Winners

__all__ = [
    "Accumulator",
    "ByClass",
    "Changes",
    "ChannelMoments",
    "ColumnPairs",
    "Constant",
    "Context",
    "Correlations",
    "Deviations",
    "DirectDistances",
    "Extremes",
    "Firing",
    "GroupedPairs",
    "MappedBack",
    "Matrix",
    "PairedDeviations",
    "Peaks",
    "RowDistances",
    "Rows",
    "States",
    "Winners",
    "means_of",
]
