"""Figures of results: a result (or several) in, a matplotlib ``Figure`` out. Nothing is changed, pyplot is never used.

| figure | question |
|---|---|
| :func:`heatmap` | Which units, or classes, are invariant? |
| :func:`layers` | Which layers are, and in which network? |
| :func:`evolution` | When did they become so? |
| :func:`response` | Which angles (factors, shifts) break it? |
| :func:`stability` | Does another seed give another picture? |
| :func:`compare` | Where do two networks differ? |
| :func:`feature_maps` | What do the most and the least invariant maps see? |
| :func:`orbits` | Which channels do transformations permute? |
| :func:`convergence` | How many samples and transformations are enough? |
"""

from lightning_invariance.plots.comparison import compare
from lightning_invariance.plots.convergence import convergence
from lightning_invariance.plots.evolution import evolution
from lightning_invariance.plots.feature_maps import feature_maps
from lightning_invariance.plots.heatmap import heatmap
from lightning_invariance.plots.layers import layers, stability
from lightning_invariance.plots.orbits import orbits
from lightning_invariance.plots.response import response

__all__ = [
    "compare",
    "convergence",
    "evolution",
    "feature_maps",
    "heatmap",
    "layers",
    "orbits",
    "response",
    "stability",
]
