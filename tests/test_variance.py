"""The variance measures against hand calculations and the definitions in float64."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torchmetrics import Metric

from lightning_invariance import functional
from lightning_invariance.measures import NormalizedVariance, SampleVariance, TransformationVariance

CASES = [
    (TransformationVariance, functional.transformation_variance),
    (SampleVariance, functional.sample_variance),
    (NormalizedVariance, functional.normalized_variance),
]


def cube(n=37, m=5, shape=(3, 4), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(n, 1, *shape, generator=generator, dtype=torch.float64)
    return (3 * samples + torch.randn(n, m, *shape, generator=generator, dtype=torch.float64)).to(dtype)


def measured(measure, blocks):
    for block in blocks:
        measure.update(block)
    return measure.compute()


@pytest.mark.parametrize(("measure", "definition"), CASES)
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("size", [1, 64])
def test_float32_far_from_zero(measure, definition, squared, size):
    # Sample spreads from a hundredth to a hundred times the spread of rows; the mean is 10⁴ times the spread of rows.
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(400, 1, 50, generator=generator) * torch.logspace(-2, 2, 50)
    tensor = 1e4 + samples + torch.randn(400, 16, 50, generator=generator)
    value = measured(measure(squared=squared), tensor.split(size))
    torch.testing.assert_close(value, definition(tensor.double(), squared), rtol=1e-4, atol=0)


def wide(mean=0.0, sparse=False, n=160, m=16, k=2048):
    """A float32 layer large enough for the fast sums; samples vary from a tenth to ten times as much as rows."""
    generator = torch.Generator().manual_seed(6)
    samples = torch.randn(n, 1, k, generator=generator) * torch.logspace(-1, 1, k)
    tensor = samples + torch.randn(n, m, k, generator=generator)
    if sparse:
        tensor = (tensor - 2 * tensor.std((0, 1))).relu()  # most rows of a block are zero
        tensor[..., :100] = 0.3  # dead
    return tensor + mean


@pytest.mark.parametrize(("measure", "definition"), CASES)
@pytest.mark.parametrize("size", [1, 7, 160])
@pytest.mark.parametrize(("mean", "sparse"), [(0.0, False), (1e4, False), (0.0, True)])
def test_wide_float32_layers_in_few_numbers(measure, definition, size, mean, sparse):
    tensor = wide(mean, sparse)
    metric = measure()
    value = measured(metric, tensor.split(size))
    torch.testing.assert_close(value, definition(tensor.double()), rtol=1e-4, atol=0)
    assert metric.dead().tolist() == [sparse] * 100 + [False] * 1948
    numbers = sum(state.numel() for state in metric.metric_state.values())
    assert numbers <= (16 + 4) * 2048 + 5  # and the shape and the numbers of samples


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 4, (torch.float64, torch.float32) * 2, (torch.float32, torch.float64) * 2]
)
def test_wide_layers_merge_with_constant_rows_and_other_types(dtypes):
    tensor = wide(mean=100.0)
    tensor[100:] = tensor[100:, :1]  # these rows do not change with the transformation
    parts = [NormalizedVariance() for _ in range(4)]
    for part, rows, dtype in zip(parts, tensor.split([50, 42, 8, 60]), dtypes, strict=True):
        measured(part, rows.to(dtype).split(4))
        assert part.offsets.dtype == dtype
    for one, other in ((2, 0), (1, 3), (1, 2)):
        parts[one].merge_state(parts[other])
    assert parts[1].offsets.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    torch.testing.assert_close(parts[1].compute(), functional.normalized_variance(tensor.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("types", list(itertools.product([torch.float32, torch.float64], repeat=3)))
def test_blocks_of_different_types_add_up(types):
    tensor = wide(n=60)
    metric = NormalizedVariance()
    for rows, dtype in zip(tensor.split(20), types, strict=True):
        metric.update(rows.to(dtype))
    assert metric.offsets.dtype == (torch.float64 if torch.float64 in types else torch.float32)
    torch.testing.assert_close(metric.compute(), functional.normalized_variance(tensor.double()), rtol=1e-5, atol=0)


def test_invariant_and_infinite_units_of_a_wide_layer_are_exact():
    tensor = wide()
    tensor[..., :50] = tensor[:, :1, :50]
    tensor[..., 50:100] = tensor[:1, :, 50:100]
    value = measured(NormalizedVariance(), tensor.split(4))
    assert (value[:50] == 0).all()
    assert (value[50:100] == float("inf")).all()
    expected = functional.normalized_variance(tensor[..., 100:].double())
    torch.testing.assert_close(value[100:], expected, rtol=1e-4, atol=0)


def test_nearly_invariant_units_of_a_wide_layer_keep_their_digits():
    tensor = wide()
    rows = torch.randn(tensor[..., :50].shape, generator=torch.Generator().manual_seed(7))
    tensor[..., :50] = tensor[:, :1, :50] + 1e-4 * rows  # NV of about 1e-8
    value = measured(NormalizedVariance(), tensor.split(4))
    torch.testing.assert_close(value, functional.normalized_variance(tensor.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("effect", [30, 1000])
def test_units_of_a_wide_layer_that_come_to_vary_with_the_transformation_most(in_place, effect):
    tensor = wide(n=400)
    tensor[8:, :, :50] += effect * torch.randn(16, 50)
    metric = SampleVariance()
    metric.in_place = in_place
    value = measured(metric, tensor.split(4))
    torch.testing.assert_close(value, functional.sample_variance(tensor.double()), rtol=1e-4, atol=0)


def test_wide_float32_layers_with_constant_rows_need_few_numbers():
    tensor = wide()
    tensor[..., :1000] = tensor[:, :1, :1000]  # invariant
    metric = NormalizedVariance()
    value = measured(metric, tensor.split(4))
    assert (value[:1000] == 0).all()
    assert sum(state.numel() for state in metric.metric_state.values()) <= (16 + 4) * 2048 + 5


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 1e30])
def test_wide_float32_layers_out_of_range_of_squares(scale):
    tensor = wide(n=8) * scale
    value = measured(NormalizedVariance(), tensor.split(4))
    torch.testing.assert_close(value, functional.normalized_variance(tensor.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("squared", [True, False])
def test_an_outlier_in_the_first_row_does_not_cost_digits(squared):
    # About the first row, 10,000 equal squares would all be rounded the same way.
    tensor = torch.zeros(10_000, 2, 100)
    tensor[0] = 0.1 + torch.rand(2, 100, generator=torch.Generator().manual_seed(3))
    value = measured(SampleVariance(squared=squared), tensor.split(4))
    torch.testing.assert_close(value, functional.sample_variance(tensor.double(), squared), rtol=1e-4, atol=0)


@pytest.mark.parametrize("squared", [True, False])
def test_an_outlier_in_the_first_column_does_not_cost_digits(squared):
    tensor = torch.zeros(3, 10_000, 20)
    tensor[:, 0] = 0.1 + torch.rand(3, 20, generator=torch.Generator().manual_seed(3))
    value = measured(TransformationVariance(squared=squared), tensor.split(2))
    torch.testing.assert_close(value, functional.transformation_variance(tensor.double(), squared), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_special_cases_are_exact(dtype, squared, size):
    generator = torch.Generator().manual_seed(4)
    samples, transformations = torch.rand(11, 1, generator=generator), torch.rand(1, 6, generator=generator)
    dead = torch.full((11, 6), 0.1)
    tensor = torch.stack([samples.expand(11, 6), transformations.expand(11, 6), dead], dim=2).to(dtype)
    for rows in (tensor, tensor.flip(0)):
        measure = NormalizedVariance(squared=squared)
        assert measured(measure, rows.split(size)).tolist() == [0, float("inf"), 1]
        assert measure.dead().tolist() == [False, False, True]


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-22, 1e18, 1e30, 1e37])
@pytest.mark.parametrize("squared", [True, False])
def test_float32_squares_out_of_range(scale, squared):
    tensor = torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(5)) * scale
    value = measured(NormalizedVariance(squared=squared), tensor.split(2))
    torch.testing.assert_close(value, functional.normalized_variance(tensor.double(), squared), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25, 1e37])
def test_float32_samples_out_of_range_of_squares(scale):
    samples = torch.randn(9, 1, 5, generator=torch.Generator().manual_seed(5)) * scale
    measure = NormalizedVariance()
    assert measured(measure, samples.expand(9, 4, 5).split(3)).tolist() == [0] * 5
    assert not measure.dead().any()
    spread = SampleVariance()
    expected = functional.sample_variance(samples.double().expand(9, 4, 5))
    torch.testing.assert_close(measured(spread, samples.expand(9, 4, 5).split(3)), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"\(samples, transformations, \*activation_shape\), but got \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.long), TypeError, "torch.int64"),
        (torch.zeros(3, 4, dtype=torch.complex64), TypeError, "torch.complex64"),
        ([1.0], TypeError, "list"),
        (torch.zeros(2, 3, 7), ValueError, "with 4 transformations, but got 3"),
        (torch.zeros(2, 4, 8), ValueError, r"of shape \(7,\), but got \(8,\)"),
    ],
)
def test_blocks_that_do_not_fit(block, error, message):
    metric = NormalizedVariance()
    metric.update(torch.rand(2, 4, 7))
    with pytest.raises(error, match=message):
        metric.update(block)


def test_states_of_other_activations_do_not_merge():
    one, other = NormalizedVariance(), NormalizedVariance()
    one.update(torch.rand(2, 4, 6))
    other.update(torch.rand(2, 4, 2, 3))
    with pytest.raises(ValueError, match="of one shape"):
        one.merge_state(other)
    with pytest.raises(ValueError, match="squared"):
        NormalizedVariance(squared=2)


def test_update_does_not_change_its_input():
    for dtype in (torch.float32, torch.float64):
        tensor = cube(dtype=dtype)
        before = tensor.clone()
        measured(NormalizedVariance(), tensor.split(4))
        assert torch.equal(tensor, before)


def test_a_value_computed_before_a_merge_is_not_kept():
    one, other = NormalizedVariance(), NormalizedVariance()
    one.update(cube()[:20])
    other.update(cube()[20:])
    one.compute()
    one.merge_state(other)
    torch.testing.assert_close(one.compute(), functional.normalized_variance(cube()))


def test_states_made_in_inference_mode_go_on_outside():
    metric, tensor = NormalizedVariance(), cube(n=80, dtype=torch.float32)

    def update():
        for position, rows in enumerate(tensor.split(4)):
            with torch.inference_mode(position % 2 == 0):
                metric.update(rows)

    with ThreadPoolExecutor(1) as pool:  # a new thread has no buffers of earlier tests
        pool.submit(update).result()
    expected = functional.normalized_variance(tensor.double())
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-5, atol=0)


def test_plot_returns_figure_and_axes():
    metric: Metric = NormalizedVariance()
    metric.update(cube())
    figure, axes = metric.plot()
    assert axes.figure is figure
    # The mean over the spatial axes of each of the 3 channels.
    expected = functional.normalized_variance(cube()).mean(1)
    torch.testing.assert_close(torch.tensor([bar.get_height() for bar in axes.patches]), expected, check_dtype=False)


@pytest.mark.parametrize("rows", [1, 4])
def test_first_rows_that_float32_cannot_hold_stay_exact(rows):
    generator = torch.Generator().manual_seed(0)
    st = torch.randn(60, 8, 4096, generator=generator)
    st[..., 0] = st[:1, :, 0]  # changes with the transformation alone
    st[..., 1] = st[:, :1, 1]  # invariant
    metric = NormalizedVariance()
    for block in st.split(rows):
        metric.update(block)
    found = metric.compute()
    assert found[0] == math.inf
    assert found[1] == 0
    expected = functional.normalized_variance(st[..., 2:].double())
    torch.testing.assert_close(found[2:], expected, rtol=1e-5, atol=0)


def test_rows_that_grow_beyond_what_the_first_promised_are_exact():
    generator = torch.Generator().manual_seed(0)
    st = torch.randn(64, 8, 4096, generator=generator)
    st[32:] = 1e4 + 0.5 * st[32:]  # far from the centre that the first rows gave
    metric = NormalizedVariance()
    for block in st.split(4):
        metric.update(block)
    torch.testing.assert_close(metric.compute(), functional.normalized_variance(st.double()), rtol=1e-4, atol=0)


@pytest.mark.parametrize("how", ["update", "forward"])
@pytest.mark.parametrize("size", [1, 4])
def test_columns_a_million_standard_deviations_apart(how, size):
    generator = torch.Generator().manual_seed(0)
    columns = 1e6 * torch.randn(1, 16, 1, generator=generator)
    st = columns + torch.randn(64, 16, 2048, generator=generator)  # float32 means would do, were columns close
    metric = SampleVariance()
    for block in st.split(size):
        getattr(metric, how)(block)
    torch.testing.assert_close(metric.compute(), st.double().var(0).mean(0), rtol=1e-4, atol=0)
