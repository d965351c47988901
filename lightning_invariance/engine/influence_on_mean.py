r"""How much each sample moves a measure that is a mean over samples: found in the first pass.

With :math:`\theta_i` the value of sample i by itself, the value is :math:`\theta = \frac{1}{n} \sum_i \theta_i`, and
the influence of sample i is :math:`\psi_i = \theta_i - \theta`. Of each unit it is enough to keep sums over samples of
powers of :math:`\theta_i`, and of each sample the sum over units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_invariance.accumulators import Accumulator, Rows, States
from lightning_invariance.engine.influence import check_units_apart, derivatives, is_mapped, of_units
from lightning_invariance.engine.powers import Powers
from lightning_invariance.engine.response_influence import has_intervals, response_weights
from lightning_invariance.measures import Measure
from lightning_invariance.measures.sums import Sums
from lightning_invariance.messages import is_of_package

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
        self._weights_of_response: Tensor | None = None
        self._numbers: list[Tensor] = [torch.zeros(0, dtype=torch.long)]
        self._on_sum: list[Tensor] = []
        self._powers, self._of_response = Powers(), Powers()
        self._found: States = {}

    @property
    def states(self) -> States:
        """Those that are merged; at the end, those of :class:`~lightning_invariance.engine.influence.Influence`."""
        if self._found:
            return self._found
        on_sum = torch.cat(self._on_sum).cpu() if self._on_sum else torch.zeros(0, dtype=torch.float64)
        powers = {**self._powers.states(), **self._of_response.states("response_")}
        return {"numbers": torch.cat(self._numbers), "on_sum": on_sum, **powers}

    @states.setter
    def states(self, states: States) -> None:
        self._numbers, self._on_sum = [states["numbers"]], [states["on_sum"]]
        self._powers.load(states)
        self._of_response.load(states, "response_")

    def add(self, rows: Rows) -> None:
        """Add rows that were just added to the accumulators."""
        if rows.indices is None:
            raise ValueError("Expected argument `indices` for influences, which belong to samples.")
        rows.widen()
        shares: States = {}
        for accumulator in self._accumulators:
            shares.update(accumulator.shares(rows, None))
        if not self._weights:
            self._begin(shares)
        self._numbers.append(rows.indices.cpu())
        if self._weights_of_response is not None:
            self._of_response.add((shares["changes"] * self._weights_of_response).sum(2))
        on_sum = None
        if self._weight is not None:
            [name] = self._weights
            on_sum = self._powers.add_in_c(shares[name], self._weight)
        if on_sum is None:
            values = self._values(shares)
            on_sum = values.sum(1)
            self._powers.add(values)
        self._on_sum.append(on_sum)

    def finish(self, sums: Sums) -> bool:
        """Turn powers into influences, once they are those of all samples.

        Args:
            sums: what all samples came to.

        Returns:
            Whether they are. Otherwise a second pass must find the influences: the value is not the mean of those of
            the samples, it is not finite, or the samples are :data:`TOO_ALIKE`.
        """
        states, n = self.states, len(self.states["numbers"])
        value = self._measure.value(sums).flatten().double()
        mean, second, fourth = self._powers.moments(n)
        finite = value.isfinite()
        same = (mean - value).abs() <= TOLERANCE * value.abs()
        none = (self._powers.centre == 0) & (self._powers.sums == 0).all(0)
        alike = (second > 0) & (second < (TOO_ALIKE * value).square())
        if not bool((same & ~alike | ~finite & none).all()):
            return False
        units = max(1, int(finite.sum()))
        # Told by the merged states, since other processes may have seen all rows of this layer.
        response = self._measure.response_of(sums) if self._of_response.sums.numel() else None
        self._found = {
            "numbers": states["numbers"],
            "on_mean": (states["on_sum"] - states["on_sum"].mean()) / units,
            "squares": n * second,
            "fourths": n * fourth,
            **self._found_of_response(response, n),
        }
        self.waits, self._powers = False, Powers()
        return True

    def _found_of_response(self, response: Tensor | None, n: int) -> States:
        """Σ ψ² and Σ ψ⁴ of the response; empty where it has no intervals.

        Channels that turned out to have no value count in the sums of samples, as 0, and not in the response.
        """
        mean, second, fourth = self._of_response.moments(n)
        scale = 1.0 if response is None else torch.where(mean == 0, 1.0, response / mean)
        return {"response_squares": n * second * scale**2, "response_fourths": n * fourth * scale**4}

    def _begin(self, shares: States) -> None:
        """Find the weights, and take the first sample for the centre.

        The value of one sample is linear in its shares, with the same derivative everywhere: it is taken where nothing
        is 0, since some values are not defined there.
        """
        sums = self._sums_so_far()
        if not is_of_package(self._measure):
            check_units_apart(self._measure, self._accumulators, sums)
        ones = {name: torch.ones_like(state) for name, state in sums.states.items()}
        self._at = replace(sums, states=ones, n_samples=1)
        self._weights = derivatives(self._measure, self._at, list(shares))
        first = self._values({name: share[:1] for name, share in shares.items()})[0]
        self._powers = Powers(first)
        if "changes" in shares and has_intervals(self._measure, self._at):
            self._weights_of_response = response_weights(self._measure, self._at)
            self._of_response = Powers((shares["changes"][0] * self._weights_of_response).sum(1))
        if len(self._weights) == 1 and first.is_cpu:
            [(name, weight)] = self._weights.items()
            moved = is_mapped(self._accumulators) and sums.channel_axis != 0
            if shares[name].shape[1:] == first.shape and not moved and bool((weight == weight.flatten()[0]).all()):
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
        n = len(b["numbers"])
        joined = {name: torch.cat([a[name], b[name]]) for name in ("numbers", "on_sum")}
        return {**joined, **Powers.merged(a, b, n), **Powers.merged(a, b, n, "response_")}
