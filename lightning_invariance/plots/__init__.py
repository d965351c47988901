"""Figures of results: a result in, a matplotlib ``Figure`` out. Nothing is changed, and pyplot is never used."""

from lightning_invariance.plots.evolution import evolution
from lightning_invariance.plots.heatmap import heatmap
from lightning_invariance.plots.layers import layers

__all__ = ["evolution", "heatmap", "layers"]
