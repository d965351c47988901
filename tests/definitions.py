"""The measures as the paper defines them, in numpy's longest floating point; nothing here uses the package.

All take an ST array ``(n, m, *activation_shape)``. Section and equation numbers refer to Quiroga's paper.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
from scipy import stats

LONG = np.longdouble


def variance(x, axis):
    """With n − 1 in the denominator (eq. 1); exactly 0 for equal values, whose mean may be rounded."""
    x = x - np.take(x, [0], axis)
    return ((x - x.mean(axis, keepdims=True)) ** 2).sum(axis) / (x.shape[axis] - 1)


def tv(x, squared=True):
    """Eq. 2; standard deviations instead of variances for ``squared=False``."""
    found = variance(x, 1)
    return (found if squared else np.sqrt(found)).mean(0)


def sv(x, squared=True):
    """Eq. 3."""
    found = variance(x, 0)
    return (found if squared else np.sqrt(found)).mean(0)


def quotient(a, b):
    """0/0 = 1, x/0 = ∞ (section 2.4)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((a == 0) & (b == 0), LONG(1), a / b)


def aggregated(values, how):
    """One value for each feature map."""
    if how is None or values.ndim < 2:
        return values
    flat = values.reshape(len(values), -1)
    return {"mean": flat.mean, "max": flat.max, "sum": flat.sum}[how](axis=1)


def distance(a, b, kind, over):
    """Distance of activations, or of feature maps as vectors; channels first."""
    if kind == "squared":
        found = (a - b) ** 2
    elif kind == "abs":
        found = abs(a - b)
    if over == "activation":
        return found
    if kind in ("abs", "squared"):
        return found.reshape(len(found), -1).sum(1)
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if kind == "euclidean":
        return np.sqrt(((a - b) ** 2).sum(1))
    one, other = (np.sqrt((v**2).sum(1)) for v in (a, b))
    with np.errstate(divide="ignore", invalid="ignore"):
        angle = ((a / one[:, None] - b / other[:, None]) ** 2).sum(1) / 2  # 1 - cos, without losing its digits
    angle = np.where(angle < 4e-31, 0, angle)  # of parallel vectors
    angle = np.where(one * other == 0, ((one == 0) != (other == 0)).astype(LONG), angle)
    return np.where((a == b).all(1), 0, angle)


def average_distance(rows, kind, over):
    """Eq. 6: the mean over all ordered pairs, including pairs of a value with itself."""
    pairs = [distance(rows[a], rows[b], kind, over) for a, b in itertools.combinations(range(len(rows)), 2)]
    return 2 * sum(pairs, 0 * distance(rows[0], rows[0], kind, over)) / len(rows) ** 2


def td(x, kind="abs", over="activation"):
    """Eq. 5, of rows."""
    return sum(average_distance(row, kind, over) for row in x) / len(x)


def groups_of(n, samples):
    """Groups of nearly equal size, one sample after the other."""
    count = math.ceil(n / samples)
    return [[i for i in range(n) if i * count // n == group] for group in range(count)]


def sd(x, kind="abs", over="activation", groups=None):
    """Eq. 5, of columns; or from the pairs within groups, times (n − 1)/n for the pairs of a sample with itself."""
    if groups is None:
        groups = [range(len(x))]
    total, pairs = 0, 0
    for group in groups:
        size = len(group)
        for column in range(x.shape[1]):
            total = total + average_distance(x[list(group), column], kind, over) * size**2
            pairs += size * (size - 1)
    return total / pairs * (len(x) - 1) / len(x)


def anova(x, statistic, paired):
    """Section 2.3: one-way, or with samples as subjects and Greenhouse and Geisser's ε pooled over activations."""
    n, m = x.shape[:2]
    of_rows, of_columns = x - x[:, :1], x - x[:1]  # exactly 0 where nothing varies, unlike means
    columns = of_rows.mean(0)
    between = n * ((columns - columns.mean(0)) ** 2).sum(0)
    if paired:
        rest = of_rows - of_rows.mean(1, keepdims=True) - columns + columns.mean(0)
        within = (rest**2).sum((0, 1))
    else:
        within = ((of_columns - of_columns.mean(0)) ** 2).sum((0, 1))
    if statistic == "effect":
        return np.where(between + within == 0, 0, between / np.where(between + within == 0, 1, between + within))
    d1, d2 = m - 1, (m - 1) * (n - 1) if paired else m * (n - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        f = np.where((between == 0) & (within == 0), 0, (between / d1) / (within / d2))
    if statistic == "f":
        return f
    epsilon = 1.0
    if paired:
        flat = rest.reshape(n, m, -1)
        covariance = np.einsum("ijk,ilk->jl", flat, flat)
        squares = (covariance**2).sum()
        epsilon = np.clip(np.trace(covariance) ** 2 / ((m - 1) * squares), 1 / (m - 1), 1) if squares else 1.0
    return stats.f.sf(f.astype(float), float(epsilon * d1), float(epsilon * d2))


def goodfellow(x, alpha, threshold, sign):
    """Section 3.2: local over global firing rate; and how close the nearest value is to the threshold."""
    x = sign * x
    n, m = x.shape[:2]
    flat = x.reshape(n * m, *x.shape[2:])
    if threshold == "normal":
        level = flat.mean(0) + LONG(stats.norm.ppf(1 - alpha)) * np.sqrt(variance(flat, 0))
    else:
        level = np.sort(flat, 0)[::-1][int(Fraction(str(alpha)) * n * m)]
    fires = x > level
    rows = fires.any(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        local = np.where(rows, fires.mean(1), 0).sum(0) / rows.sum(0)
        value = local / fires.mean((0, 1))
    return value, abs(flat - level).min(0)


def unit_maps(x):
    """Each feature map over its euclidean norm; a map of zeros stays one."""
    norm = np.sqrt((x**2).sum((-2, -1), keepdims=True))
    return np.where(norm == 0, x, x / np.where(norm == 0, 1, norm))


def same_equivariance(x, inverses, normalize, over, normalized_by, kind=None):
    """Section 2.6: TV, or for a distance TD, of maps that are mapped back; NaN for maps that are zero throughout."""
    back = np.stack([inverse(x[:, j]) for j, inverse in enumerate(inverses)], 1)
    dark = (x == 0).all((0, 1, 3, 4))
    back = unit_maps(back) if normalize else back
    if kind is None:
        parts = [tv(back), sv(back) if normalized_by else None]
        if over == "channel":
            parts = [None if part is None else part.reshape(len(part), -1).sum(1) for part in parts]
    else:
        parts = [td(back, kind, over), sd(back, kind, over) if normalized_by else None]
    value = parts[0] if parts[1] is None else quotient(*parts)
    undefined = (dark if normalize else np.zeros_like(dark)).reshape(-1, *[1] * (value.ndim - 1))
    return np.where(undefined, np.nan, value)


def degrees_of_freedom(values):
    """Degrees of freedom of the variance of n values ``(n, ...)`` by their kurtosis: between 1 and n − 1."""
    n, centred = len(values), values - values.mean(0)
    kurtosis = n * (centred**4).sum(0) / (centred**2).sum(0) ** 2
    return np.clip(2 * n / (kurtosis - 1) - 1, 1, n - 1)


def half_width(values, confidence=0.95):
    """Half the width of Student's interval of the mean of values ``(n, ...)``."""
    t = stats.t.ppf((1 + confidence) / 2, degrees_of_freedom(values))
    return t * values.std(0, ddof=1) / np.sqrt(len(values))
