"""Orbits: groups of channels that transformations permute among each other."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_invariance.messages import number_of
from lightning_invariance.results.table import aligned, format_cell


class Orbit(NamedTuple):
    """A group of channels that the transformations permute among each other.

    Attributes:
        channels: their numbers. One channel alone moves as the input does (or does not change); two are a flip pair,
            four are copies of one filter under quarter turns.
        score: mean of R² over the channels and the transformations other than the identity; 1 is equivariant.
    """

    channels: tuple[int, ...]
    score: float


class Orbits(list[Orbit]):
    """The orbits of a layer, the largest and best first; prints as a table."""

    def __repr__(self) -> str:
        counts = Counter(len(orbit.channels) for orbit in self)
        sizes = ", ".join(f"{count} of size {size}" for size, count in sorted(counts.items(), reverse=True))
        rows = [
            [str(len(orbit.channels)), format_cell(orbit.score), " ".join(map(str, orbit.channels))] for orbit in self
        ]
        total = f"{number_of(len(self), 'orbit')}{': ' if self else ''}{sizes}"
        return f"{aligned([['size', 'R²', 'channels'], *rows], left=0)}\n{total}" if self else total


def orbits_of(goes: Tensor, scores: Tensor, identity: int, least: float) -> Orbits:
    """Find the orbits of a layer.

    Args:
        goes: where each channel goes under each transformation, ``(m, channels)``.
        scores: R² of each channel under each transformation, ``(m, channels)``, of the channel that is explained.
        identity: position of the identity, which does not count.
        least: channels belong together where R² is at least this, and so must be the score of their group.
    """
    channels = goes.shape[1]
    group = list(range(channels))

    def root(channel: int) -> int:
        while group[channel] != channel:
            channel = group[channel]
        return channel

    for to, of_transformation in zip(goes.tolist(), scores.tolist(), strict=True):
        for channel, other in enumerate(to):
            if of_transformation[other] >= least:
                group[root(channel)] = root(other)
    members: dict[int, list[int]] = {}
    for channel in range(channels):
        members.setdefault(root(channel), []).append(channel)
    others = scores[torch.arange(len(scores)) != identity]
    found = [Orbit(tuple(own), float(others[:, own].nanmean())) for own in members.values()]
    kept = (orbit for orbit in found if orbit.score >= least)
    return Orbits(sorted(kept, key=lambda orbit: (-len(orbit.channels), -round(orbit.score, 4), orbit.channels)))
