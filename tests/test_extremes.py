"""Any shape, split, order of merging and value, however small, large, equal or missing."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_invariance import functional
from lightning_invariance.measures import (
    Anova,
    IntraclassCorrelation,
    MainEffect,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    SampleVariance,
    TransformationDistance,
    TransformationVariance,
)

MEASURES = {
    "TV": (TransformationVariance, functional.transformation_variance),
    "SV": (SampleVariance, functional.sample_variance),
    "NV": (NormalizedVariance, functional.normalized_variance),
    "TD": (TransformationDistance, functional.transformation_distance),
    "SD": (SampleDistance, functional.sample_distance),
    "ND": (NormalizedDistance, functional.normalized_distance),
    "effect": (lambda: Anova("effect"), lambda cube: functional.anova(cube)[2]),
}
#: Values that are zero, denormal (in float32), small, plain, large, or whose squares leave float32.
VALUES = [0.0, -0.0, 1e-40, -3e-39, 2e-20, 1e-3, 1.0, -1.0, 1e4 + 1, 1e4, 3e17, 1e30, -1e30]


@st.composite
def cubes(draw, values, dtype):
    n, m, k = draw(st.integers(2, 7)), draw(st.integers(2, 5)), draw(st.integers(2, 4))  # one value would be a scalar
    flat = draw(st.lists(st.sampled_from(values), min_size=n * m * k, max_size=n * m * k))
    return torch.tensor(flat, dtype=dtype).view(n, m, k)


@st.composite
def splits(draw, n):
    """Rows of some processes, each in blocks, and an order in which to merge them."""
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=3)))
    parts = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    return draw(st.permutations(parts)), draw(st.integers(1, n))


def measured(make, cube, split):
    parts, size = split
    metrics = []
    for part in parts:
        metric = make()
        for block in cube[part].split(size):
            metric.update(block)
        metrics.append(metric)
    for metric in metrics[1:]:
        metrics[0].merge_state(metric)
    return metrics[0].compute()


def assert_the_definition(name, cube, split, tolerance):
    make, definition = MEASURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # parts without rows
        value = measured(make, cube, split)
    rounding = 1e-12 if name == "effect" else 0  # a difference of sums in proportion to their size
    torch.testing.assert_close(value, definition(cube.double()), rtol=tolerance, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("name", MEASURES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_extreme_values(name, data):
    dtype, tolerance = data.draw(st.sampled_from([(torch.float32, 1e-4), (torch.float64, 1e-9)]))
    cube = data.draw(cubes(VALUES, dtype))
    assert_the_definition(name, cube, data.draw(splits(len(cube))), tolerance)


@pytest.mark.parametrize("name", MEASURES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_equal_values(name, data):
    cube = data.draw(st.sampled_from([torch.float32, torch.float64]).flatmap(lambda dtype: cubes([1.0], dtype)))
    cube = cube * data.draw(st.sampled_from(VALUES))
    assert_the_definition(name, cube, data.draw(splits(len(cube))), 0)


@pytest.mark.parametrize("name", MEASURES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_one_bad_value_spoils_its_own_activation_only(name, data):
    cube = data.draw(cubes([-1.0, 0.5, 2.0, 3.0], torch.float32))
    n, m, k = cube.shape
    place = tuple(data.draw(st.integers(0, size - 1)) for size in (n, m, k))
    bad = cube.clone()
    bad[place] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    split = data.draw(splits(n))
    make, definition = MEASURES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        value = measured(make, bad, split)
    assert not value[place[2]].isfinite()
    others = [i for i in range(k) if i != place[2]]
    expected = definition(cube.double())
    rounding = 1e-12 if name == "effect" else 0  # a difference of sums in proportion to their size
    torch.testing.assert_close(value[others], expected[others], rtol=1e-4, atol=rounding, equal_nan=True)


@pytest.mark.parametrize("measure", [make for make, _ in MEASURES.values()])
def test_layers_without_activations_are_refused(measure):
    with pytest.raises(ValueError, match=r"non-empty argument `st_block` .* but got \(4, 5, 3, 0\)"):
        measure().update(torch.zeros(4, 5, 3, 0))


@pytest.fixture(params=["cpu", "device"])
def anywhere(request, monkeypatch):
    """On the CPU, and with the operations of other devices."""
    if request.param == "device":
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)


def value_of(measure, st, rows):
    for block in st.split(rows):
        measure.update(block)
    return measure.compute()


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("m", [16, 33, 256])
@pytest.mark.parametrize("k", [64, 2048])
def test_variances_where_the_first_transformation_alone_changes_the_activation(m, k, squared, anywhere):
    st = torch.zeros(8, m, k)
    st[:, 0] = torch.rand(8, k, generator=torch.Generator().manual_seed(0)) + 0.1
    found = value_of(TransformationVariance(squared), st, 4)
    expected = st[:, 0].double().square() / m  # v^2 (1 - 1 / m) / (m - 1)
    expected = (expected if squared else expected.sqrt()).mean(0)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


def two_way(st):
    """ICC(C,1) and the main effect by the two-way layout in float64."""
    x = st.double()
    n, m = x.shape[:2]
    of_rows, of_columns, grand = x.mean(1, keepdim=True), x.mean(0, keepdim=True), x.mean((0, 1), keepdim=True)
    rest = (x - of_rows - of_columns + grand).square().sum((0, 1)) / ((n - 1) * (m - 1))
    samples = m * (of_rows - grand).square().sum((0, 1)) / (n - 1)
    effect = n * (of_columns - grand).square().sum((0, 1)) / (x - of_rows).square().sum((0, 1))
    return (samples - rest) / (samples + (m - 1) * rest), effect


@pytest.mark.parametrize(("shift", "change"), [(1000.0, 1.0), (0.0, 1e-5), (3.0, 1e-3)])
@pytest.mark.parametrize("k", [64, 2048])
def test_components_of_variance_that_are_small_beside_the_others(k, shift, change, anywhere):
    generator = torch.Generator().manual_seed(0)
    st = torch.randn(60, 1, k, generator=generator) + change * torch.randn(60, 4, k, generator=generator)
    st += shift * torch.arange(4.0).view(1, 4, 1)
    correlation, effect = two_way(st)
    torch.testing.assert_close(value_of(IntraclassCorrelation(), st, 7), correlation, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(value_of(MainEffect(), st, 7), effect, rtol=1e-6, atol=1e-9)
