r"""Sums over samples of powers of :math:`d = \theta_i - c`, from which the moments about the mean follow.

Taking :math:`\theta_i` of one of the samples for c loses few digits: then
:math:`\sum_i (\theta_i - \theta)^2 \ge (c - \theta)^2`, so that no term is larger than about n times the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_invariance.accumulators import States
from lightning_invariance.accumulators.backends import c_kernels


class Powers:
    """Sums over samples of :math:`d, d^2, d^3` and :math:`d^4` for each unit.

    Attributes:
        centre: c, ``(units,)``.
        sums: ``(4, units)``.
    """

    def __init__(self, centre: Tensor | None = None) -> None:
        self.centre = torch.zeros(0, dtype=torch.float64) if centre is None else centre
        self.sums = self.centre.new_zeros(4, len(self.centre))

    def add(self, values: Tensor) -> None:
        r"""Add :math:`\theta` of some samples, ``(samples, units)``."""
        deviations = values - self.centre
        squares = deviations.square()
        powers = (deviations, squares, squares * deviations, squares.square())
        self.sums += torch.stack([power.sum(0) for power in powers])

    def add_in_c(self, shares: Tensor, weight: float) -> Tensor | None:
        """Add shares ``(samples, units)`` times a weight; their sums over units, or None where C cannot."""
        return c_kernels.add_powers(shares, weight, self.centre, self.sums)

    def moments(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """The mean over n samples, and the second and fourth moment about it, ``(units,)``."""
        mean, second, third, fourth = self.sums / max(1, n)
        about_mean = fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean**4
        return self.centre + mean, (second - mean.square()).clamp_min(0), about_mean.clamp_min(0)

    def states(self, prefix: str = "") -> States:
        """The sums by name."""
        return {f"{prefix}centre": self.centre, f"{prefix}powers": self.sums}

    def load(self, states: States, prefix: str = "") -> None:
        """Take the sums from :meth:`states`."""
        self.centre, self.sums = states[f"{prefix}centre"], states[f"{prefix}powers"]

    @staticmethod
    def merged(a: States, b: States, n: int, prefix: str = "") -> States:
        """The states of two processes, the second one of n samples, about the centre of the first one."""
        shift = b[f"{prefix}centre"] - a[f"{prefix}centre"]
        first, second, third, fourth = b[f"{prefix}powers"]
        moved = (
            first + n * shift,
            second + shift * (2 * first + n * shift),
            third + shift * (3 * second + shift * (3 * first + n * shift)),
            fourth + shift * (4 * third + shift * (6 * second + shift * (4 * first + n * shift))),
        )
        sums = a[f"{prefix}powers"] + torch.stack(moved)
        return {f"{prefix}centre": a[f"{prefix}centre"], f"{prefix}powers": sums}
