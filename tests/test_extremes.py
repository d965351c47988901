"""Any shape, split, order of merging and value, however small, large, equal or missing."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_invariance import functional
from lightning_invariance.measures import (
    Anova,
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
    torch.testing.assert_close(value[others], expected[others], rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("measure", [make for make, _ in MEASURES.values()])
def test_layers_without_activations_are_refused(measure):
    with pytest.raises(ValueError, match=r"non-empty argument `st_block` .* but got \(4, 5, 3, 0\)"):
        measure().update(torch.zeros(4, 5, 3, 0))
