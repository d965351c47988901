r"""Confidence intervals over samples, from the influence of each sample.

With influences :math:`\psi_i` of n samples (or groups of samples, which are then what is independent) the standard
error is :math:`\sqrt{\sum_i \psi_i^2 / (n (n - 1))}`. How well it is known depends on the kurtosis b of the influences:
it has :math:`\nu = 2 n / (b - 1) - 1` degrees of freedom, n − 1 where they are normal, and few where it rests on few
samples. The interval is that of Student's t with ν degrees of freedom.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_invariance.results.students_t import t_quantile, two_sided

#: An interval of fewer samples, or groups of samples, is marked.
FEWEST_SAMPLES = 10

#: So is one whose standard error has fewer degrees of freedom: a few samples decide it, and it tends to be too narrow.
FEWEST_DEGREES = 10.0

#: One of a layer in which that holds for more than this share of the units: their values are biased, too.
MOST_SPARSE = 0.2

#: One of a mean that leaves out more than this share of the units.
NOTABLE = 0.01

#: One of a value whose definition depends on the number of samples, by more than this part of the standard error: then
#: 95 % intervals cover the value of very many samples in less than 93 %.
MOST_BIAS = 0.4


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
    unit: str = "samples",
    repeated: float = 0.0,
) -> Interval:
    """The interval of a value.

    Args:
        value: the estimate.
        influences: ``(samples,)``; NaN for samples that do not count.
        confidence: in (0, 1).
        left_out: which share of the units the value leaves out since they are infinite or NaN.
        sparse: which share of the units few samples decide.
        bias: which part of the value depends on the number of samples by definition.
        unit: what each influence is of: samples, or groups of them.
        repeated: which part of the samples repeats others.
    """
    psi = influences[~influences.isnan()]
    n = len(psi)
    if n < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, math.nan, math.nan, "undefined")
    error = float((psi.square().sum() / (n * (n - 1))).sqrt())
    freedom = float(degrees_of_freedom(n, psi.square().sum(), psi.pow(4).sum()))
    half = t_quantile(confidence, freedom) * error
    doubts = [f"{n} {unit}"] if n < FEWEST_SAMPLES else []
    doubts += ["no sample differs from another"] if error == 0 and value != 0 else []
    doubts += [f"{repeated:.0%} of the {unit} repeat others"] if repeated > NOTABLE else []
    doubts += ["few samples decide"] if freedom < FEWEST_DEGREES and n >= FEWEST_SAMPLES else []
    doubts += [f"few samples decide {sparse:.0%} of the units"] if sparse > MOST_SPARSE and error > 0 else []
    doubts += [f"{left_out:.0%} left out"] if left_out > NOTABLE else []
    doubts += [f"differs by {bias:.1%} from that of many samples"] if abs(bias * value) > MOST_BIAS * error else []
    return Interval(value, value - half, value + half, error, freedom, ", ".join(doubts))


def influences_of_all(influences: Tensor) -> Tensor:
    """The influences of all samples on a mean over those that reach it, ``(samples,)``.

    A sample that does not has none; those that do weigh as much more as they are fewer. All are NaN where fewer than
    two do.
    """
    missing = influences.isnan()
    reached = int((~missing).sum())
    if reached < 2:
        return torch.full_like(influences, torch.nan)
    return torch.where(missing, 0.0, influences) * (len(influences) / reached)


def network_influences(of_layers: Iterable[Tensor | None]) -> Tensor:
    """The influence of each sample on the mean over layers, ``(samples,)``; undefined where one has no influences."""
    known = list(of_layers)
    if not known or any(each is None for each in known):
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([influences_of_all(each) for each in known if each is not None]).mean(0)


def samples_for(interval: Interval, n: int, half_width: float, confidence: float) -> int:
    """How many samples would make an interval as narrow as ± ``half_width``, which n samples gave.

    The standard error falls with the square root of their number, and its degrees of freedom rise with it.
    """
    scale = interval.standard_error * math.sqrt(n)

    def suffices(count: int) -> bool:
        freedom = min(count - 1, max(1.0, (interval.freedom + 1) * count / n - 1))
        return t_quantile(confidence, freedom) * scale <= half_width * math.sqrt(count) * (1 + 1e-9)

    most = 2
    while not suffices(most):
        most *= 2
    return bisect.bisect_left(range(most + 1), True, lo=2, key=suffices)


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
