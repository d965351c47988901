"""The distance measures against hand calculations, and the estimate of the sample distance."""

import math

import numpy as np
import pytest
import torch
from definitions import LONG, td
from scipy.spatial.distance import pdist
from torch import nn

from lightning_invariance import evaluate, functional, rotations
from lightning_invariance.accumulators import GroupedPairs, RowDistances
from lightning_invariance.measures import (
    NormalizedDistance,
    SampleDistance,
    SampleVariance,
    TransformationDistance,
    TransformationVariance,
)

BY_HAND = torch.tensor([[1.0, 3.0], [5.0, 5.0]])


def measured(metric, *blocks):
    for block in blocks:
        metric.update(block)
    return metric.compute()


@pytest.mark.parametrize(
    ("measure", "distance", "value"),
    [
        (TransformationDistance, "abs", 0.5),  # rows: (0 + 2 + 2 + 0) / 4 and 0
        (TransformationDistance, "squared", 1.0),  # (0 + 4 + 4 + 0) / 4 and 0
        (SampleDistance, "abs", 1.5),  # columns: 2 and 1
        (SampleDistance, "squared", 5.0),  # columns: 8 and 2
        (NormalizedDistance, "abs", 1 / 3),
        (NormalizedDistance, "squared", 0.2),
        (TransformationDistance, lambda x, y: (x - y).abs().sqrt(), 2**0.5 / 4),
    ],
)
def test_values_worked_out_by_hand(measure, distance, value):
    assert measured(measure(distance), BY_HAND).item() == pytest.approx(value, rel=1e-6)
    definition = {
        TransformationDistance: functional.transformation_distance,
        SampleDistance: functional.sample_distance,
        NormalizedDistance: functional.normalized_distance,
    }[measure]
    assert definition(BY_HAND, distance).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("distance", "metric"), [("abs", "cityblock"), ("euclidean",) * 2, ("cosine",) * 2])
def test_distances_of_feature_maps_equal_scipy(distance, metric):
    st = torch.randn(7, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n = len(st)
    of_samples = [[2 * pdist(st[:, j, c].flatten(1).numpy(), metric).sum() / n**2 for j in range(4)] for c in range(2)]
    expected = torch.tensor(of_samples, dtype=torch.float64).mean(1)
    torch.testing.assert_close(measured(SampleDistance(distance, "channel"), st), expected, rtol=1e-9, atol=1e-12)
    of_rows = [[2 * pdist(st[i, :, c].flatten(1).numpy(), metric).sum() / 4**2 for i in range(n)] for c in range(2)]
    expected = torch.tensor(of_rows, dtype=torch.float64).mean(1)
    value = measured(TransformationDistance(distance, "channel"), st)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_squared_distances_are_variances():
    # Paper, eq. 7: the average squared distance is twice the variance with n in the denominator.
    st = torch.randn(9, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tv, sv = measured(TransformationVariance(), st), measured(SampleVariance(), st)
    torch.testing.assert_close(measured(TransformationDistance("squared"), st), 2 * 4 / 5 * tv)
    torch.testing.assert_close(measured(SampleDistance("squared"), st), 2 * 8 / 9 * sv)


@pytest.mark.parametrize("m", [2, 16, 32, 33, 100])
def test_rows_of_any_length_far_from_zero(m):
    st = 1e4 + torch.randn(6, m, 11, generator=torch.Generator().manual_seed(2))
    value = measured(TransformationDistance(), *st.split(4))
    torch.testing.assert_close(value, functional.transformation_distance(st.double()), rtol=1e-4, atol=0)


def test_invariant_dead_and_infinite_units_are_exact():
    generator = torch.Generator().manual_seed(7)
    samples, columns = torch.rand(11, 1, generator=generator), torch.rand(1, 6, generator=generator)
    st = torch.stack([samples.expand(11, 6), columns.expand(11, 6), torch.full((11, 6), 0.1)], 2)
    assert measured(NormalizedDistance(), *st.split(3)).tolist() == [0, math.inf, 1]


def test_the_estimate_depends_neither_on_order_nor_on_blocks_nor_on_merging():
    st = torch.randn(200, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    indices = torch.arange(200)
    whole = SampleDistance(samples=4)
    whole.update(st, indices)
    expected = whole.compute()
    other = SampleDistance(samples=4)
    for rows in st[:, 0, 0].argsort().split(7):
        other.update(st[rows], rows)
    torch.testing.assert_close(other.compute(), expected, rtol=1e-12, atol=0)
    parts = [SampleDistance(samples=4) for _ in range(3)]
    for part, rows in zip(parts, indices.split([1, 150, 49]), strict=True):
        part.update(st[rows], rows)
    parts[2].merge_state(parts[0])
    parts[1].merge_state(parts[2])
    torch.testing.assert_close(parts[1].compute(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("named", [False, True])
def test_the_estimate_is_unbiased_for_data_sorted_by_class(named):
    # 2,000 activations, each with its own values, share their choice of samples only through the contents of a row;
    # 40 choices with 2,000 activations each leave an error of the mean far below the tolerance.
    generator = torch.Generator().manual_seed(4)
    classes = torch.arange(64) // 16
    ratios = []
    for repetition in range(40):
        st = 5.0 * classes[:, None, None] + torch.randn(64, 2, 50, generator=generator, dtype=torch.float64)
        metric = SampleDistance(samples=4)
        indices = torch.arange(64) + 1000 * repetition
        metric.update(st, indices if named else None)
        ratios.append((metric.compute() / functional.sample_distance(st)).mean())
    ratio = torch.stack(ratios)
    # The mean lies within four of its own standard errors of 1.
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() < 0.3


@pytest.mark.parametrize("samples", [4, 16])
def test_the_error_falls_as_the_docstring_says(samples):
    generator = torch.Generator().manual_seed(5)
    errors = []
    normal = 2 / math.sqrt(math.pi) * 255 / 256  # the mean distance of two normal values, self pairs included
    for repetition in range(60):
        metric = SampleDistance(samples=samples)
        st = torch.randn(256, 4, 20, generator=generator, dtype=torch.float64)
        metric.update(st, torch.arange(256) + 1000 * repetition)
        errors.append(metric.compute() / normal - 1)
    found = torch.stack(errors).std()
    assert found == pytest.approx(0.7 / math.sqrt(samples * 4), rel=0.35)


def test_the_family_shares_its_sums_in_evaluate(monkeypatch):
    calls = []
    for accumulator in (RowDistances, GroupedPairs):

        def add(self, states, rows, original=accumulator.add):
            if len(rows.values) == 7:  # not those by which its memory is computed
                calls.append(type(self).__name__)
            original(self, states, rows)

        monkeypatch.setattr(accumulator, "add", add)
    images = torch.rand(7, 1, 4, 4)
    measures = [TransformationDistance(), SampleDistance(), NormalizedDistance(), SampleDistance(samples=5)]
    names = {f"{position}": measure for position, measure in enumerate(measures)}
    evaluate(nn.Flatten(), images, rotations(4), names, batch_size=64)
    assert sorted(calls) == ["GroupedPairs", "GroupedPairs", "RowDistances"]  # groups of 16 samples, groups of 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distance": "manhattan"}, "`distance` to be one of .* but got 'manhattan'"),
        ({"over": "unit"}, "`over` to be .* but got 'unit'"),
        ({"distance": "cosine"}, "scalars, but got 'cosine'"),
        ({"samples": 1}, "`samples` to be an int of at least 2, but got 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        NormalizedDistance(**arguments)


@pytest.mark.parametrize("distance", ["abs", "squared", "euclidean", "cosine"])
def test_nan_is_not_averaged_away(distance):
    st = torch.randn(6, 4, 2, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    st[1, 2, 0, 1] = float("nan")
    assert measured(NormalizedDistance(distance, "channel"), st).isnan().tolist() == [True, False]


def test_nan_of_a_sample_that_is_not_kept_is_not_lost():
    for over in ("activation", "channel"):
        st = torch.randn(300, 4, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        for row in range(0, 300, 50):
            metric = SampleDistance(over=over, samples=2)
            spoiled = st.clone()
            spoiled[row, 1, 0] = float("inf")
            parts = [SampleDistance(over=over, samples=2) for _ in range(2)]
            for part, rows in zip(parts, spoiled.split(150), strict=True):
                part.update(rows)
            parts[0].merge_state(parts[1])
            assert measured(metric, *spoiled.split(7)).isnan().tolist() == [True, False]
            assert parts[0].compute().isnan().tolist() == [True, False]


def test_fewer_samples_than_announced_are_no_zeros():
    st = torch.randn(100, 4, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = SampleDistance(samples=8)
    metric.prepare(rotations(4), (), n_samples=200)
    for rows in torch.arange(100).split(7):
        metric.update(st[rows], rows)
    # E|x − y| of two standard normal values is 2 / √π.
    assert metric.compute().mean().item() == pytest.approx(0.99 * 2 / math.sqrt(math.pi), rel=0.05)


@pytest.mark.parametrize("difference", [1e-2, 1e-4, 1e-6])
def test_the_cosine_distance_of_maps_that_are_nearly_parallel(difference):
    """float32 holds their values, but not the differences of unit vectors made of them."""
    generator = torch.Generator().manual_seed(0)
    st = 10 * (1 + difference * torch.randn(6, 4, 3, 5, 5, generator=generator))
    maps = st.numpy().astype(np.longdouble).reshape(6, 4, 3, 25)
    units = maps / np.sqrt((maps**2).sum(-1, keepdims=True))
    apart = units[:, :, None] - units[:, None]
    expected = ((apart**2).sum(-1) / 2).mean((0, 1, 2)).astype(np.float64)
    metric = TransformationDistance("cosine", over="channel")
    metric.update(st)
    np.testing.assert_allclose(metric.compute().numpy(), expected, rtol=1e-6)
    value = functional.transformation_distance(st, "cosine", over="channel")
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("shape", [(5,), (5, 1, 1), (5, 3, 2)], ids=str)
def test_distances_of_maps_some_of_which_are_zero(distance, shape):
    st = torch.randn(4, 6, *shape, generator=torch.Generator().manual_seed(0))
    st[:, 2:4, 1] = 0  # some maps of the rows
    st[1, :, 2] = 0  # all of one
    st[2, :5, 3] = 0  # all but one
    found = measured(TransformationDistance(distance, over="channel"), st[:3], st[3:])
    np.testing.assert_allclose(found.numpy(), td(st.numpy().astype(LONG), distance, "channel").astype(float), rtol=1e-6)
