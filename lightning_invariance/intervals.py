r"""Confidence intervals over samples, from the influence of each sample.

With influences :math:`\psi_i` of n samples (or groups of samples, which are then what is independent) the standard
error is :math:`\sqrt{\sum_i \psi_i^2 / (n (n - 1))}`. How well it is known depends on the kurtosis b of the influences:
it has :math:`\nu = 2 n / (b - 1) - 1` degrees of freedom, n − 1 where they are normal, and few where it rests on few
samples. The interval is that of Student's t with ν degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.students_t import t_quantile, two_sided

#: An interval of fewer samples, or groups of samples, is marked.
FEWEST_SAMPLES = 10

#: So is one whose standard error has fewer degrees of freedom: a few samples decide it, and it tends to be too narrow.
FEWEST_DEGREES = 10.0

#: One of a layer in which that holds for more than this share of the units: their values are biased, too.
MOST_SPARSE = 0.2

#: One of a value whose definition depends on the number of samples, by more than this part of the standard error: then
#: 95 % intervals cover the value of very many samples in less than 93 %.
MOST_BIAS = 0.4

#: And one of a mean that leaves out more than this share of the units.
NOTABLE = 0.01


@dataclass(frozen=True)
class Interval:
    """A confidence interval over samples.

    Attributes:
        value: the estimate.
        low: lower bound. The bounds are ``value ± t · standard_error``.
        high: upper bound.
        standard_error: of the value.
        freedom: degrees of freedom of the standard error.
        doubt: why the interval may be too narrow; empty where nothing speaks against it.
    """

    value: float
    low: float
    high: float
    standard_error: float
    freedom: float
    doubt: str = ""

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]" + (f" ({self.doubt})" if self.doubt else "")


class Intervals(dict[str, Interval]):
    """Layer → interval of its mean.

    Attributes:
        network: the interval of the mean over layers.
    """

    network: Interval

    def __str__(self) -> str:
        width = max(map(len, (*self, "network")))
        rows = {**self, "network": self.network}
        return "\n".join(f"{layer:{width}s}  {interval}" for layer, interval in rows.items())


def interval_of(
    value: float,
    influences: Tensor,
    confidence: float,
    left_out: float = 0.0,
    sparse: float = 0.0,
    bias: float = 0.0,
) -> Interval:
    """The interval of a value.

    Args:
        value: the estimate.
        influences: ``(samples,)``; NaN for samples that do not count.
        confidence: in (0, 1).
        left_out: which share of the units the value leaves out since they are infinite or NaN.
        sparse: which share of the units few samples decide.
        bias: which part of the value depends on the number of samples by definition.
    """
    psi = influences[~influences.isnan()]
    n = len(psi)
    if n < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, math.nan, math.nan, "undefined")
    error = float((psi.square().sum() / (n * (n - 1))).sqrt())
    freedom = float(degrees_of_freedom(n, psi.square().sum(), psi.pow(4).sum()))
    half = t_quantile(confidence, freedom) * error
    doubts = [f"{n} samples"] if n < FEWEST_SAMPLES else []
    doubts += ["few samples decide"] if freedom < FEWEST_DEGREES and n >= FEWEST_SAMPLES else []
    doubts += [f"few samples decide {sparse:.0%} of the units"] if sparse > MOST_SPARSE else []
    doubts += [f"{left_out:.0%} left out"] if left_out > NOTABLE else []
    doubts += [f"differs by {bias:.1%} from that of many samples"] if abs(bias * value) > MOST_BIAS * error else []
    return Interval(value, value - half, value + half, error, freedom, ", ".join(doubts))


def network_influences(by_layer: Mapping[str, Tensor], layers: Sequence[str]) -> Tensor:
    """The influence of each sample on the mean over layers, ``(samples,)``.

    A sample that does not reach a layer has none on it; those that reach it weigh as much more as they are fewer.
    """
    if not layers:
        return torch.zeros(0, dtype=torch.float64)
    influences = torch.stack([by_layer[layer] for layer in layers])
    missing = influences.isnan()
    reached = (~missing).sum(1, keepdim=True).clamp_min(1)
    return (torch.where(missing, 0.0, influences) * (influences.shape[1] / reached)).mean(0)


def degrees_of_freedom(n: int, squares: Tensor, fourths: Tensor) -> Tensor:
    """Those of a standard error, given Σ ψ² and Σ ψ⁴ of n influences: between 1 and n − 1."""
    kurtosis = n * fourths / squares.square()
    found = 2 * n / (kurtosis - 1).clamp_min(1e-9) - 1
    return torch.where(squares > 0, found.nan_to_num(nan=1.0), n - 1.0).clamp(1, max(1, n - 1))


def p_value(difference: float, error: float, freedom: float) -> float:
    """Two-sided, of a difference with a standard error: 1 where both are 0, 0 where only the error is."""
    if math.isnan(difference) or math.isnan(error):
        return math.nan
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return two_sided(difference / error, freedom)


def one_sided(above: float, error: float, freedom: float) -> float:
    """P-value of a quantity that is at most 0 in truth, where ``above`` was found with a standard error."""
    if math.isnan(above) or math.isnan(error):
        return math.nan
    if error == 0:
        return 0.0 if above > 0 else 1.0
    half = p_value(above, error, freedom) / 2
    return half if above > 0 else 1 - half


def check_confidence(confidence: float) -> float:
    """Raise for a confidence out of (0, 1).

    Raises:
        ValueError: If it is.
    """
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 < confidence < 1:
        raise ValueError(
            f"Expected argument `confidence` to be in (0, 1), but got {confidence!r}: write 0.95 for 95 %."
        )
    return float(confidence)
