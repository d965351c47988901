r"""Confidence intervals over samples, computed from the influence of each sample on a value.

With influences :math:`\psi_i` of n independent samples (or groups of samples) the standard error is
:math:`\sqrt{\sum_i \psi_i^2 / (n (n - 1))}`. Its precision depends on the kurtosis b of the influences: it has
:math:`\nu = 2 n / (b - 1) - 1` degrees of freedom, n − 1 where they are normal, and few where few samples dominate it.
The bounds are quantiles of Student's t with ν degrees of freedom.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from scipy.special import betainc, stdtrit
from torch import Tensor

#: Intervals of fewer samples, or groups of samples, are doubtful.
MIN_SAMPLES = 10

#: Below this many degrees of freedom few samples dominate the standard error, and the interval tends to be too narrow.
MIN_DEGREES_OF_FREEDOM = 10.0

#: Largest fraction of the units of a layer that may have fewer degrees of freedom: values of these are biased, too.
MAX_SPARSE = 0.5

#: Largest fraction of the units that a mean may leave out without a remark.
MAX_LEFT_OUT = 0.01


@dataclass(frozen=True)
class Interval:
    """A confidence interval over samples.

    Attributes:
        value: the estimate.
        low, high: the bounds ``value ± t · standard_error`` of the value of very many samples. Where the definition of
            a measure depends on the number of samples n, as for distances, whose pairs of a sample with itself are 1/n
            of all, they are about the value without this bias.
        standard_error: of the value.
        freedom: degrees of freedom of the standard error.
        doubt: why the interval may be too narrow; empty where there is no reason.
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
    centre: float | None = None,
    unit: str = "samples",
    repeated: float = 0.0,
) -> Interval:
    """Compute the interval of a value.

    Args:
        value: the estimate.
        influences: ``(samples,)``; NaN for samples that do not count.
        confidence: in (0, 1).
        left_out: fraction of the units that are infinite or NaN, and so not in the value.
        sparse: fraction of the units with few degrees of freedom.
        centre: value without its bias, where the definition depends on the number of samples; by default the value.
        unit: ``"samples"`` or ``"groups of samples"``: the independent units, one for each influence.
        repeated: fraction of the samples that are copies of others.
    """
    psi = influences[~influences.isnan()]
    n = len(psi)
    if n < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan, math.nan, math.nan, "undefined")
    psi = psi - psi.mean()
    error = float((psi.square().sum() / (n * (n - 1))).sqrt())
    freedom = float(degrees_of_freedom(n, psi.square().sum(), psi.pow(4).sum()))
    half = t_quantile(confidence, freedom) * error
    doubts = [f"{n} {unit}"] if n < MIN_SAMPLES else []
    doubts += ["no sample differs from another"] if error == 0 and value != 0 else []
    doubts += [f"{repeated:.0%} of the {unit} repeat others"] if repeated > MAX_LEFT_OUT else []
    doubts += ["few samples decide the value"] if freedom < MIN_DEGREES_OF_FREEDOM and n >= MIN_SAMPLES else []
    doubts += [f"{sparse:.0%} of the units respond to few samples or none"] if sparse > MAX_SPARSE and error > 0 else []
    doubts += [f"{left_out:.0%} left out"] if left_out > MAX_LEFT_OUT else []
    centre = value if centre is None else centre
    return Interval(value, centre - half, centre + half, error, freedom, ", ".join(doubts))


def influences_of_all(influences: Tensor) -> Tensor:
    """Rescale the influences on a layer that some samples bypass to all samples, ``(samples,)``.

    Samples that bypass the layer (NaN) get 0, and the others weigh more in proportion. With fewer than two others, all
    are NaN.
    """
    missing = influences.isnan()
    known = int((~missing).sum())
    if known < 2:
        return torch.full_like(influences, torch.nan)
    return torch.where(missing, 0.0, influences) * (len(influences) / known)


def network_influences(of_layers: Iterable[Tensor | None]) -> Tensor:
    """Average the influences of each sample over layers, ``(samples,)``; empty if a layer has no influences."""
    known = list(of_layers)
    if not known or any(each is None for each in known):
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([influences_of_all(each) for each in known if each is not None]).mean(0)


def samples_for(interval: Interval, n: int, half_width: float, confidence: float) -> int:
    """Estimate how many samples an interval of ± ``half_width`` needs, given the interval of n samples.

    The standard error is proportional to 1 / √samples, and its degrees of freedom grow with their number.
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
    """Compute the degrees of freedom of a standard error, in [1, n − 1], from Σ ψ² and Σ ψ⁴ of n influences."""
    kurtosis = n * fourths / squares.square()
    found = 2 * n / (kurtosis - 1).clamp_min(1e-9) - 1
    return torch.where(squares > 0, found.nan_to_num(nan=1.0), n - 1.0).clamp(1, max(1, n - 1))


def t_quantile(confidence: float, freedom: float) -> float:
    """Return the half-width of a two-sided interval in standard errors, of Student's t distribution."""
    return float(stdtrit(freedom, (1 + confidence) / 2))


def t_quantiles(confidence: float, freedom: Tensor) -> Tensor:
    """Return :func:`t_quantile` for many degrees of freedom."""
    return torch.as_tensor(stdtrit(freedom.double().numpy(), (1 + confidence) / 2))


def p_value(difference: float, error: float, freedom: float) -> float:
    """Compute the two-sided p-value of a difference with a standard error; with an error of 0 it is 0 or 1."""
    if math.isnan(difference) or math.isnan(error):
        return math.nan
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    t = difference / error
    return float(betainc(freedom / 2, 0.5, freedom / (freedom + t * t)))  # Student's t


def one_sided(above: float, error: float, freedom: float) -> float:
    """Compute the p-value of the hypothesis that a quantity, estimated as ``above`` with an error, is at most 0."""
    if above == error == 0:
        return 1.0
    half = p_value(above, error, freedom) / 2
    return half if above > 0 else 1 - half


def check_confidence(confidence: float) -> float:
    """Check a confidence, and return it as a float.

    Raises:
        ValueError: If it is not a number in (0, 1).
    """
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 < confidence < 1:
        raise ValueError(
            f"Expected argument `confidence` to be in (0, 1), but got {confidence!r}: write 0.95 for 95 %."
        )
    return float(confidence)
