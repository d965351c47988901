"""Any measure with any arguments, of any layout, type, scale, split and order of merging, against the definition.

    python tests/test_fuzz.py --minutes 60

runs the same for longer, with other cases each time, and prints how many of each measure it tried.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from definitions import LONG, aggregated, anova, goodfellow, groups_of, quotient, same_equivariance, sd, sv, td, tv
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_invariance import TransformationSet, evaluate, flips, quarter_turns
from lightning_invariance.measures import (
    Anova,
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    SampleVariance,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}
LARGEST_F = {torch.float32: 1e5, torch.float64: 1e10}
SHAPES = [(), (3,), (5, 3), (2, 3, 3), (70,), (4, 5, 5)]
TRIED: Counter[str] = Counter()


def turned(x, turns):
    return np.rot90(x, turns, (-2, -1))


#: Sets of transformations that only move pixels, and their inverses for arrays.
MOVES = {
    "turns": (quarter_turns(), [partial(turned, turns=sign) for sign in (0, -1, -2, -3)]),
    "flips": (flips(), [partial(np.flip, axis=axes) for axes in ((), -1, -2, (-2, -1))]),
}


@st.composite
def variances(draw):
    squared, aggregate = draw(st.booleans()), draw(st.sampled_from([None, "mean", "max", "sum"]))
    cls, both = draw(
        st.sampled_from(
            [
                (TransformationVariance, lambda t, s: t),
                (SampleVariance, lambda t, s: s),
                (NormalizedVariance, quotient),
            ]
        )
    )
    response = squared and cls is not SampleVariance and draw(st.booleans())

    def definition(x, groups):
        return both(aggregated(tv(x, squared), aggregate), aggregated(sv(x, squared), aggregate))

    return partial(cls, squared=squared, aggregate=aggregate, response=response), definition


@st.composite
def distances(draw):
    over = draw(st.sampled_from(["activation", "channel"]))
    kind = draw(
        st.sampled_from(["abs", "squared"] if over == "activation" else ["abs", "squared", "euclidean", "cosine"])
    )
    aggregate = draw(st.sampled_from([None, "mean", "max", "sum"]))
    cls, both = draw(
        st.sampled_from(
            [
                (TransformationDistance, lambda t, s: t()),
                (SampleDistance, lambda t, s: s()),
                (NormalizedDistance, lambda t, s: quotient(t(), s())),
            ]
        )
    )
    samples = draw(st.sampled_from([2, 5, 64]))

    def definition(x, groups):
        how = aggregate if over == "activation" else None
        own = groups(samples) if kind != "squared" else None
        return both(lambda: aggregated(td(x, kind, over), how), lambda: aggregated(sd(x, kind, over, own), how))

    return partial(cls, kind, over, samples=samples, aggregate=aggregate), definition


@st.composite
def comparisons(draw):
    statistic, paired = draw(st.sampled_from(["f", "p", "effect"])), draw(st.booleans())
    return partial(Anova, statistic, paired=paired), lambda x, groups: anova(x, statistic, paired)


@st.composite
def firing(draw):
    alpha, threshold = draw(st.sampled_from([0.01, 0.1, 0.3])), draw(st.sampled_from(["normal", "quantile"]))
    sign, capacity = draw(st.sampled_from([1, -1])), draw(st.sampled_from([3, 256]))
    if threshold == "quantile":
        capacity = 256

    def definition(x, groups):
        value, margin = goodfellow(x, alpha, threshold, sign)
        scale = np.abs(x).max((0, 1))
        # A value that is the threshold but for rounding fires or does not.
        close = margin < 1e-5 * scale if threshold == "normal" else np.zeros(value.shape, bool)
        return np.where(close, np.nan, value), close

    return partial(Goodfellow, alpha, threshold, sign, capacity=capacity), definition


@st.composite
def movements(draw):
    transformations, inverses = MOVES[draw(st.sampled_from(sorted(MOVES)))]
    normalize, over = draw(st.booleans()), draw(st.sampled_from(["activation", "channel"]))
    normalized_by = draw(st.sampled_from([None, "samples"]))
    options = {"normalize": normalize, "over": over, "normalized_by": normalized_by}
    if draw(st.booleans()):
        make, kind = partial(VarianceSameEquivariance, transformations, **options), None
    else:
        kind = draw(st.sampled_from(["abs", "euclidean"] if over == "channel" else ["abs"]))
        make = partial(DistanceSameEquivariance, transformations, kind, samples=64, **options)

    def definition(x, groups):
        return same_equivariance(x, inverses, normalize, over, normalized_by, kind)

    return make, definition, len(transformations)


MEASURES = {
    "variances": variances(),
    "distances": distances(),
    "anova": comparisons(),
    "goodfellow": firing(),
    "same-equivariance": movements(),
}


@st.composite
def cubes(draw, m, shape, farthest):
    """Activations of one kind or another: plain, rectified, sparse, invariant, constant, far from zero."""
    n = draw(st.integers(2, 40))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))

    def random(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    x = draw(st.sampled_from([0.0, 0.3, 1.0])) * random(n, m, *shape) + random(n, 1, *shape)
    kind = draw(st.sampled_from(["plain", "rectified", "sparse", "invariant", "constant", "repeated"]))
    if kind == "rectified":
        x = x.relu()
    elif kind == "sparse":
        x = (x - 1.5).relu()
    elif kind == "invariant":
        x = random(n, 1, *shape).expand(n, m, *shape)
    elif kind == "constant":
        x = random(1, m, *shape).expand(n, m, *shape)
    elif kind == "repeated":
        x = x[torch.randint(max(1, n // 3), (n,), generator=generator)]
    far = draw(st.sampled_from(["none", "all", "columns", "rows"]))
    distance = 10.0 ** draw(st.integers(0, farthest))
    if far == "all":
        x = x + distance
    elif far == "columns":
        x = x + distance * random(1, m, *[1] * len(shape))
    elif far == "rows":
        x = x + distance * random(n, 1, *[1] * len(shape))
    scale = 10.0 ** draw(st.integers(-12, 12) if dtype == torch.float32 else st.integers(-30, 30))
    return (scale * x).to(dtype)


@st.composite
def cases(draw, family):
    drawn = draw(MEASURES[family])
    make, definition = drawn[:2]
    if len(drawn) == 3:
        # Unit vectors of float32 maps that are all but constant differ by little more than their rounding.
        m, shape, farthest = drawn[2], draw(st.sampled_from([(1, 4, 4), (3, 6, 6)])), 1
    else:
        m, shape, farthest = draw(st.integers(2, 9)), draw(st.sampled_from(SHAPES)), 3
    return make, definition, draw(cubes(m, shape, farthest))


def merged(metrics, data):
    """One metric of all, merged in pairs that are drawn."""
    while len(metrics) > 1:
        first = data.draw(st.integers(0, len(metrics) - 1), label="merged into")
        one = metrics.pop(first)
        other = metrics.pop(data.draw(st.integers(0, len(metrics) - 1), label="merged"))
        one.merge_state(other)
        metrics.append(one)
    return metrics[0]


def by_hand(make, x, data):
    """Some metrics get blocks of rows of their own, and are merged."""
    owners = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(x), max_size=len(x)), label="owners"))
    whole = getattr(make(), "capacity", 256) >= len(x)  # one block of few samples may need a second pass
    how = data.draw(st.sampled_from(["update", "forward"] if whole else ["update"]), label="how")
    size, named = data.draw(st.integers(1, len(x)), label="size"), data.draw(st.booleans(), label="named")

    def feed(metric, rows):
        for some in rows.split(size):
            if len(some):
                getattr(metric, how)(x[some], *([some] if named else []))

    parts = [torch.arange(len(x))[owners == owner] for owner in range(4)]
    metrics = [make() for _ in parts]
    for metric, rows in zip(metrics, parts, strict=True):
        feed(metric, rows)
    metric = merged([metric for metric, rows in zip(metrics, parts, strict=True) if len(rows)], data)
    if not metric.complete:
        metric.end_pass()
        how = "update"
        feed(metric, torch.arange(len(x)))
    return metric.compute()


def by_evaluation(make, x, data):
    """A network that returns its input, of which transformation j picks column j."""
    picks = {str(j): partial(torch.select, dim=1, index=j) for j in range(x.shape[1])}
    columns = TransformationSet.from_callables(picks)
    stored = torch.empty_like(x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    stored[order] = x  # the walk takes them in the order of x
    batch_size = data.draw(st.integers(1, 2 * x.shape[1] * len(x)), label="batch_size")
    network = nn.Sequential(nn.Identity())
    result = evaluate(
        network, stored, columns, {"it": make()}, batch_size=batch_size, channel_axis={"*": 0}, progress=False
    )
    return result["it"]["0"]


def check(family, data):
    make, definition, x = data.draw(cases(family), label="case")
    evaluated = x.ndim > 2 and family != "same-equivariance" and data.draw(st.booleans(), label="evaluated")
    way = by_evaluation if evaluated else by_hand
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            value = way(make, x, data)
        except ValueError as error:  # a quantile above the largest value
            if "`alpha` to be at least" not in str(error):
                raise
            return
    exact = isinstance(make(), SampleDistance | NormalizedDistance) and not evaluated
    if exact and make().samples < len(x) and make().distance != "squared":
        return  # an estimate
    with np.errstate(all="ignore"):
        whole = x.numpy().astype(LONG).reshape(*x.shape[:2], *(x.shape[2:] or (1,)))
        expected = definition(whole, partial(groups_of, len(x)) if evaluated else lambda samples: None)
    if isinstance(expected, tuple):
        expected, doubtful = expected
        value = torch.where(torch.from_numpy(np.asarray(doubtful)).reshape(value.shape), torch.nan, value)
    TRIED[type(make()).__name__] += 1
    expected = torch.from_numpy(np.asarray(expected, dtype=np.float64)).reshape(value.shape)
    absolute = 0.0
    if getattr(make(), "distance", None) == "cosine":  # the definition rounds 1 − 1
        absolute = 1e-18
    if family == "same-equivariance" and make().normalize:
        # The norm of a map that was flipped is the same but for the rounding of its sum.
        absolute = TOLERANCE[x.dtype] / (100 if make().normalized_by is None else 1)
    if isinstance(make(), Anova):  # an error that is nothing but the rounding of the values makes any large F
        value, expected = (each.clamp(max=LARGEST_F[x.dtype]) for each in (value, expected))
        absolute = TOLERANCE[x.dtype]
    torch.testing.assert_close(value, expected, rtol=TOLERANCE[x.dtype], atol=absolute, equal_nan=True)


@pytest.mark.parametrize("family", MEASURES)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_measure_is_its_definition(family, data):
    check(family, data)


def main() -> None:
    """Run for some minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    end = time.time() + 60 * parser.parse_args().minutes
    torch.set_num_threads(1)
    longer = settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    found = 0
    while time.time() < end:
        for family in MEASURES:

            @longer
            @given(data=st.data())
            def run(data):
                check(family, data)  # noqa: B023

            try:
                run()
            except Exception as error:
                found += 1
                print(f"{family}: {type(error).__name__}: {error}", flush=True)
                print("\n".join(getattr(error, "__notes__", [])), flush=True)
    print(f"{found} found;", ", ".join(f"{count} {name}" for name, count in TRIED.most_common()))


if __name__ == "__main__":
    main()
