r"""How much each sample moves a measure that is a mean over samples: found in the first pass.

With :math:`\theta_i` the value of sample i by itself, the value is :math:`\theta = \frac{1}{n} \sum_i \theta_i`, and
the influence of sample i is :math:`\psi_i = \theta_i - \theta`. Of each unit it is enough to keep the sums over samples
of :math:`d, d^2, d^3` and :math:`d^4` with :math:`d = \theta_i - c`; they give :math:`\sum_i \psi_i^2` and
:math:`\sum_i \psi_i^4` about any c. Taking :math:`\theta_i` of one of the samples for c loses few digits: then
:math:`\sum_i \psi_i^2 \ge (c - \theta)^2`, so that no term is larger than about n times the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_invariance.accumulators import Accumulator, Rows, States, kernels
from lightning_invariance.evaluation.influence import derivatives, is_mapped, of_units
from lightning_invariance.measures import Measure
from lightning_invariance.measures.sums import Sums

#: The mean of the samples by themselves is the value, up to the rounding of float32.
TOLERANCE = 1e-4

#: Where the samples of a unit by themselves differ by less than this part of their mean, in root mean square, the
#: rounding of float32 shares may show in the differences.
TOO_ALIKE = 1e-3


class InfluenceOnMean:
    """Collects the influences of the samples on one measure of one layer, in the first pass.

    Args:
        measure: whose value is a mean over samples.
        accumulators: those that it needs.
        sums: what they came to so far; called once, after the first rows.

    Attributes:
        waits: whether rows are still added.
        pairs: None, since samples are apart.
    """

    pairs = None

    def __init__(self, measure: Measure, accumulators: Sequence[Accumulator], sums: Callable[[], Sums]) -> None:
        self.waits = True
        self._measure, self._accumulators, self._sums_so_far = measure, accumulators, sums
        self._at = Sums({}, 1, 1, ())  # of one sample
        self._weights: States = {}
        self._weight: float | None = None  # of all activations, where they are the units; C then adds the powers
        self._numbers, self._on_sum = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.float64)]
        self._centre = torch.zeros(0, dtype=torch.float64)
        self._powers = torch.zeros(4, 0, dtype=torch.float64)
        self._found: States = {}

    @property
    def states(self) -> States:
        """Those that are merged; at the end, those of :class:`~lightning_invariance.evaluation.influence.Influence`."""
        if self._found:
            return self._found
        on_sum = torch.cat([each.cpu() for each in self._on_sum])
        return {"numbers": torch.cat(self._numbers), "on_sum": on_sum, "centre": self._centre, "powers": self._powers}

    @states.setter
    def states(self, states: States) -> None:
        self._numbers, self._on_sum = [states["numbers"]], [states["on_sum"]]
        self._centre, self._powers = states["centre"], states["powers"]

    def add(self, rows: Rows) -> None:
        """Add rows that were just added to the accumulators."""
        if rows.indices is None:
            raise ValueError("Expected argument `indices` for influences, which belong to samples.")
        shares: States = {}
        for accumulator in self._accumulators:
            shares.update(accumulator.shares(rows, None))
        if not self._weights:
            self._begin(shares)
        self._numbers.append(rows.indices.cpu())
        if self._weight is not None:
            [share] = shares.values()
            if (on_sum := kernels.add_powers(share, self._weight, self._centre, self._powers)) is not None:
                self._on_sum.append(on_sum)
                return
        values = self._values(shares)
        self._on_sum.append(values.sum(1))
        deviations = values - self._centre
        squares = deviations.square()
        powers = (deviations, squares, squares * deviations, squares.square())
        self._powers += torch.stack([power.sum(0) for power in powers])

    def finish(self, value: Tensor) -> bool:
        """Turn powers into influences, once they are those of all samples.

        Returns:
            Whether they are. Otherwise a second pass must find the influences: the value is not the mean of those of
            the samples, it is not finite, or the samples are :data:`TOO_ALIKE`.
        """
        states, n = self.states, len(self.states["numbers"])
        mean, second, third, fourth = self._powers / n
        finite = value.isfinite()
        same = (self._centre + mean - value).abs() <= TOLERANCE * value.abs()
        none = (self._centre == 0) & (self._powers == 0).all(0)
        variance = (second - mean.square()).clamp_min(0)
        alike = (variance > 0) & (variance < (TOO_ALIKE * value).square())
        if not bool((same & ~alike | ~finite & none).all()):
            return False
        units = max(1, int(finite.sum()))
        about_mean = fourth - 4 * mean * third + 6 * mean.square() * second - 3 * mean**4
        self._found = {
            "numbers": states["numbers"],
            "on_mean": (states["on_sum"] - states["on_sum"].mean()) / units,
            "squares": n * variance,
            "fourths": n * about_mean.clamp_min(0),
        }
        self.waits = False
        self._centre, self._powers = torch.zeros(0), torch.zeros(0)
        return True

    def _begin(self, shares: States) -> None:
        """Find the weights, and take the first sample for the centre.

        The value of one sample is linear in its shares, with the same derivative everywhere: it is taken where nothing
        is 0, since some values are not defined there.
        """
        sums = self._sums_so_far()
        ones = {name: torch.ones_like(state) for name, state in sums.states.items()}
        self._at = replace(sums, states=ones, n_samples=1)
        self._weights = derivatives(self._measure, self._at, list(shares))
        self._centre = self._values({name: share[:1] for name, share in shares.items()})[0]
        self._powers = self._centre.new_zeros(4, len(self._centre))
        if len(shares) == 1 and self._centre.is_cpu:
            [weight], [share] = self._weights.values(), shares.values()
            moved = is_mapped(self._accumulators) and sums.channel_axis != 0
            if share.shape[1:] == self._centre.shape and not moved and bool((weight == weight.flatten()[0]).all()):
                self._weight = float(weight.flatten()[0])

    def _values(self, shares: States) -> Tensor:
        """The value of each sample by itself, ``(samples, units)``."""
        units, mapped = math.prod(self._measure.value_shape(self._at)), is_mapped(self._accumulators)
        parts = [shares[name].to(weight.dtype) * weight for name, weight in self._weights.items()]
        return torch.stack([of_units(part, self._at, units, mapped) for part in parts]).sum(0)

    @staticmethod
    def merged(a: States, b: States) -> States:
        """The states of two processes, about the centre of the first one."""
        if not len(a["numbers"]) or not len(b["numbers"]):
            return a if len(a["numbers"]) else b
        shift, n = b["centre"] - a["centre"], len(b["numbers"])
        first, second, third, fourth = b["powers"]
        moved = (
            first + n * shift,
            second + shift * (2 * first + n * shift),
            third + shift * (3 * second + shift * (3 * first + n * shift)),
            fourth + shift * (4 * third + shift * (6 * second + shift * (4 * first + n * shift))),
        )
        joined = {name: torch.cat([a[name], b[name]]) for name in ("numbers", "on_sum")}
        return {**joined, "centre": a["centre"], "powers": a["powers"] + torch.stack(moved)}
