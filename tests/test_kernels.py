"""The sums in C, against their definitions in float64 and against PyTorch's operations."""

import pytest
import torch

from lightning_invariance import STLoader, evaluate, rotations
from lightning_invariance.accumulators.backends import c_kernels, pairs
from lightning_invariance.accumulators.deviations import LIMITS
from lightning_invariance.measures import (
    Anova,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleVariance,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

needs_kernels = pytest.mark.skipif(c_kernels._kernels is None, reason="the kernels were not compiled here")

SIZES = [(4, 16, 4096), (1, 256, 64), (16, 16, 65), (3, 5, 1000), (7, 2, 2049), (128, 2, 64), (1, 3, 5000)]
SIZES += [(4, 16, 10), (4, 16, 1), (70, 16, 130)]  # fewer than are read together; more values than at once


@pytest.fixture(params=["in C", "by PyTorch"])
def way(request, monkeypatch):
    if request.param == "by PyTorch":
        monkeypatch.setattr(c_kernels, "_kernels", None)
    elif c_kernels._kernels is None:
        pytest.skip("the kernels were not compiled here")


def rows(n, m, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(n, 1, k, generator=generator) + 0.3 * torch.randn(n, m, k, generator=generator)


def sums_of(blocks, centres, offsets, width=None):
    """Row spread (k,), column spread (k,) and means (m, k), and what was said of each block."""
    m, k = blocks[0].shape[1:]
    width = width or k
    row_spread, column_spread = torch.zeros(k, dtype=torch.float64), torch.zeros(1, k, dtype=torch.float64)
    parts = offsets.view(m, -1, width).movedim(1, 0).clone(memory_format=torch.contiguous_format)
    n, far = 0, []
    for block in blocks:
        far.append(c_kernels.add_deviations(block, n, row_spread, column_spread, centres, parts, LIMITS))
        n += len(block)
    return row_spread, column_spread[0], centres.double() + parts.double().movedim(1, 0).flatten(1), far


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("size", "width"), [*((size, None) for size in SIZES), ((4, 16, 4096), 64), ((3, 5, 1920), 128)]
)
def test_sums_of_deviations_are_the_definition(size, centred, threads, width):
    blocks = [rows(*size), rows(*size, seed=1)]
    first = blocks[0][0]
    centres = first[0] if centred else torch.zeros(size[2])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        row_spread, column_spread, means, _ = sums_of(blocks, centres, first - centres, width)
    finally:
        torch.set_num_threads(before)
    x = torch.cat(blocks).double()
    torch.testing.assert_close(row_spread, x.var(1, correction=0).sum(0) * size[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(column_spread, (x - x.mean(0)).square().sum((0, 1)), rtol=1e-5, atol=0)
    torch.testing.assert_close(means, x.mean(0), rtol=1e-6, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("size", "width"), [*((size, None) for size in SIZES), ((4, 16, 4096), 64), ((3, 5, 1920), 128)]
)
def test_with_means_in_float64_everything_is(size, centred, width):
    blocks = [1e6 * rows(*size), rows(*size, seed=1)]
    first = blocks[0][0].double()
    centres = first[0] if centred else torch.zeros(size[2], dtype=torch.float64)
    row_spread, column_spread, means, far = sums_of(blocks, centres, first - centres, width)
    x = torch.cat(blocks).double()
    torch.testing.assert_close(row_spread, x.var(1, correction=0).sum(0) * size[1], rtol=1e-11, atol=0)
    torch.testing.assert_close(column_spread, (x - x.mean(0)).square().sum((0, 1)), rtol=1e-11, atol=0)
    torch.testing.assert_close(means, x.mean(0), rtol=1e-11, atol=1e-11)
    assert far == [False, False]


def test_small_layers_are_measured_in_float64(way):
    x = rows(50, 16, 10)
    metrics = {"TV": TransformationVariance(), "SV": SampleVariance(), "paired": Anova("f", paired=True)}
    for metric in metrics.values():
        for block in x.split(4):
            metric.add(block)
    wide = x.double()
    torch.testing.assert_close(metrics["TV"].compute(), wide.var(1).mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["SV"].compute(), wide.var(0).mean(0), rtol=1e-9, atol=0)
    between = 50 * wide.mean(0).var(0)
    rest = wide - wide.mean(0) - wide.mean(1, keepdim=True) + wide.mean((0, 1))
    expected = between / (rest.square().sum((0, 1)) / (49 * 15))
    torch.testing.assert_close(metrics["paired"].compute(), expected, rtol=1e-9, atol=0)


@needs_kernels
@pytest.mark.parametrize("centred", [True, False])
def test_what_is_constant_has_no_spread(centred):
    x = rows(8, 16, 200)
    x[..., 3] = x[:, :1, 3]
    x[..., 100] = x[:1, :, 100]
    x[..., 150] = 0.1
    centres = x[0, 0] if centred else torch.zeros(200)
    row_spread, column_spread, _, _ = sums_of([x[:4], x[4:]], centres, x[0] - centres)
    assert (row_spread == 0).nonzero().flatten().tolist() == [3, 150]
    assert (column_spread == 0).nonzero().flatten().tolist() == ([100, 150] if not centred else [150])
    assert column_spread[100] < 1e-12


@needs_kernels
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e20, 1e-30, 1e-42])
@pytest.mark.parametrize("where", [0, 1500, 2050])
def test_squares_that_float32_does_not_hold_are_taken_in_float64(scale, where):
    x = rows(8, 16, 2051)
    x[4:, :, where] *= scale
    x[:4, :, where] = 0
    row_spread, column_spread, _, _ = sums_of([x[:4], x[4:]], torch.zeros(2051), x[0])
    wide = x.double()
    finite = torch.arange(2051) != where if not scale < 1e30 else torch.ones(2051, dtype=torch.bool)
    assert not row_spread[~finite].isfinite().any()
    assert not column_spread[~finite].isfinite().any()
    expected = wide.var(1).sum(0) * 15, wide.var(0).sum(0) * 7
    for found, value in zip((row_spread, column_spread), expected, strict=True):
        torch.testing.assert_close(found[finite], value[finite], rtol=1e-5, atol=0)


def test_a_small_spread_beside_large_squares_is_not_lost(way):
    x = rows(8, 16, 2000)
    x[..., 4] = 1.0
    x[3, :, 4] = 1e-30 * torch.arange(16.0)
    metric = TransformationVariance()
    metric.update(x[:4])
    metric.update(x[4:])
    torch.testing.assert_close(metric.compute(), x.double().var(1).mean(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("order", ["any", "rising"])
@pytest.mark.parametrize("apart", [1, 10, 30])
def test_columns_that_differ_in_the_same_way_for_every_sample_cost_no_digits(way, apart, order):
    # Sums of the columns would round a thousand times in the same way.
    generator = torch.Generator().manual_seed(0)
    x = apart * torch.randn(16, 128, generator=generator) + torch.randn(4096, 1, 128, generator=generator)
    x = x.sort(0).values if order == "rising" else x
    metric = SampleVariance()
    for block in x.split(4):
        metric.add(block)
    tolerance = 1e-5 if order == "any" else 1e-4
    torch.testing.assert_close(metric.compute(), x.double().var(0).mean(0), rtol=tolerance, atol=0)


def test_columns_far_apart_have_means_in_float64(way):
    generator = torch.Generator().manual_seed(0)
    x = rows(200, 16, 1100)
    x[..., 1099] = 1e4 * torch.randn(16, generator=generator) + torch.randn(200, 16, generator=generator)
    metric = SampleVariance()
    for block in x.split(4):
        metric.add(block)
    assert metric.offsets.dtype == torch.float64
    torch.testing.assert_close(metric.compute(), x.double().var(0).mean(0), rtol=1e-5, atol=0)


@needs_kernels
@pytest.mark.parametrize("m", [2, 3, 7, 16, 33, 64])
@pytest.mark.parametrize("k", [64, 100, 3001])
def test_differences_within_rows_are_the_definition(m, k):
    x = rows(3, m, k)
    expected = (x.double()[:, :, None] - x.double()[:, None]).abs().sum((0, 1, 2))
    torch.testing.assert_close(pairs.absolute_differences(x), expected, rtol=1e-5, atol=0)


def test_nan_and_infinite_values_stay_where_they_are(way):
    x = rows(3, 7, 128)
    x[1, 2, 5], x[0, 3, 6], x[2, 0, 7] = float("nan"), float("inf"), float("inf")
    found = pairs.absolute_differences(x)
    assert found[5].isnan()
    assert not found[6].isfinite()
    assert not found[7].isfinite()
    assert found.isfinite().sum() == 125


def test_measures_have_their_values_either_way(way):
    x = rows(40, 16, 3000)
    x[..., :10] = x[:, :1, :10]
    x[..., 10:20] = 0
    x[7, 3, 25] = float("nan")
    metrics = [NormalizedVariance(), TransformationDistance()]
    for metric in metrics:
        for block in x.split(4):
            metric.update(block)
    nv, td = (metric.compute() for metric in metrics)
    wide = x.double()
    expected = wide.var(1).mean(0) / wide.var(0).mean(0)
    expected[10:20] = 1
    torch.testing.assert_close(nv, expected, rtol=1e-4, atol=0, equal_nan=True)
    assert (nv[:10] == 0).all()
    pairwise = (wide[:, :, None] - wide[:, None]).abs().mean((1, 2)).mean(0)
    torch.testing.assert_close(td, pairwise, rtol=1e-5, atol=0, equal_nan=True)


@needs_kernels
def test_a_network_has_the_same_values_without_kernels(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU())
    images = torch.rand(24, 3, 20, 20)
    measures = [NormalizedVariance(), NormalizedDistance(), Anova(statistic="f")]
    with_kernels = evaluate(model, images, rotations(16), measures, progress=False)
    monkeypatch.setattr(c_kernels, "_kernels", None)
    without = evaluate(model, images, rotations(16), measures, progress=False)
    for measure in without:
        for layer, value in without[measure].items():
            torch.testing.assert_close(with_kernels[measure][layer], value, rtol=1e-4, atol=1e-9, equal_nan=True)


def test_blocks_by_hand_leave_earlier_states_alone(way):
    metric = NormalizedVariance()
    blocks = rows(12, 16, 2000).split(4)
    metric.update(blocks[0])
    metric.update(blocks[1])
    held = dict(metric.metric_state)
    copies = {name: state.clone() for name, state in held.items()}
    metric.update(blocks[2])
    for name, state in held.items():
        assert torch.equal(state, copies[name])


@pytest.mark.filterwarnings("ignore:NaN")
def test_a_walk_adds_what_updates_add(way):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ELU(), torch.nn.MaxPool2d(2)).eval()
    images, turns = torch.rand(30, 1, 16, 16), rotations(16)
    measures = {
        "NV": NormalizedVariance(),
        "with response": NormalizedVariance(response=True),
        "squared": TransformationDistance(distance="squared"),
        "Goodfellow": Goodfellow(),
        "VSE": VarianceSameEquivariance(turns),
    }
    blocks = list(STLoader(images, turns))  # the last is smaller
    result = evaluate(model, images, turns, measures)
    for layer in ("0", "2"):
        with torch.no_grad():
            found = [model[: int(layer) + 1](block.inputs.flatten(0, 1)) for block in blocks]
        cubes = [x.unflatten(0, block.inputs.shape[:2]) for x, block in zip(found, blocks, strict=True)]
        wide = torch.cat(cubes).double()
        torch.testing.assert_close(result["NV"][layer], wide.var(1).mean(0) / wide.var(0).mean(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(result["with response"][layer], result["NV"][layer], rtol=1e-5, atol=0)
        pairs_of_rows = (wide[:, :, None] - wide[:, None]).square().mean((0, 1, 2))
        torch.testing.assert_close(result["squared"][layer], pairs_of_rows, rtol=1e-5, atol=0)
        for name in ("Goodfellow", "VSE"):
            metric = measures[name].clone()
            metric.prepare(turns, (1, 16, 16), 30)
            for cube in cubes:
                metric.update(cube)
            if not metric.complete:
                metric.end_pass()
                for cube in cubes:
                    metric.update(cube)
            torch.testing.assert_close(result[name][layer], metric.compute(), rtol=1e-5, atol=0, equal_nan=True)


def sums(m=16, k=128, width=64, dtype=torch.float32, squares=1):
    wide = {"dtype": torch.float64}
    spread = torch.zeros(k, **wide), torch.zeros(squares, k, **wide)
    return [*spread, torch.zeros(k, dtype=dtype), torch.zeros(k // width, m, width, dtype=dtype)]


@needs_kernels
def test_sums_that_c_cannot_add_to_are_left_alone():
    assert c_kernels.add_deviations(torch.rand(4, 16, 128), 0, *sums(), LIMITS) is False
    cases = [
        (torch.rand(4, 257, 128), sums(257)),  # too many columns
        (torch.rand(4, 16, 128).double(), sums()),
        (torch.rand(4, 16, 130), sums(k=130, width=65)),  # a width that C does not read
        (torch.rand(4, 8, 128), sums()),  # other columns
        (torch.rand(4, 16, 128), sums(squares=16)),  # standard deviations
        (torch.rand(4, 16, 128), [*sums()[:3], sums(dtype=torch.float64)[3]]),
        (torch.rand(4, 16, 128), [*sums()[:3], torch.zeros(2, 64, 16).movedim(1, 2)]),
        (torch.rand(4, 16, 128), [torch.zeros(64, dtype=torch.float64), *sums()[1:]]),
        (torch.rand(4, 16, 128), [sums()[0], torch.zeros(128, dtype=torch.float64), *sums()[2:]]),
    ]
    for x, tensors in cases:
        assert c_kernels.add_deviations(x, 0, *tensors, LIMITS) is None
        assert not any(tensor.any() for tensor in tensors)


@needs_kernels
def test_c_refuses_sizes_that_do_not_fit_before_it_uses_a_pointer():
    x, tensors = torch.rand(4, 16, 128), sums()
    pointers = [number for tensor in (x, *tensors) for number in (tensor.data_ptr(), tensor.numel())]
    fine = [4, 16, 128, 1, 0, 64, False, *pointers, *[0] * 6, *LIMITS]
    assert c_kernels._kernels.add_deviations(*fine) is False
    for place, value, words in [
        (0, 5, "another number of values"),
        (0, -4, "another number of values"),
        (2, 2**62, "another number of values"),
        (5, 96, "another width"),
        (5, 0, "another width"),
        (7, 0, "pointer"),
        (4, -1, "pointer or the number of rows"),
        (10, 64, "other sizes"),
        (16, 2047, "other sizes"),
    ]:
        with pytest.raises(ValueError, match=words):
            c_kernels._kernels.add_deviations(*fine[:place], value, *fine[place + 1 :])
    with pytest.raises(TypeError, match="Expected 28 arguments"):
        c_kernels._kernels.add_deviations(*fine[1:])
    network = torch.tensor([[0, 1], [1, 200]], dtype=torch.int32)
    total = torch.zeros(128, dtype=torch.float64)
    with pytest.raises(ValueError, match="columns that the block does not have"):
        c_kernels.absolute_differences(x, network)
    about = [number for tensor in (x, network, total) for number in (tensor.data_ptr(), tensor.numel())]
    fine = [4, 16, 128, 1, 2, 16 * 128, 128, *about, False]
    for place, value, words in [
        (4, 3, "of other sizes"),
        (13, True, "of other sizes"),
        (5, 16 * 128 + 1, "another number of values"),
        (6, 2**62, "another number of values"),
        (6, -1, "another number of values"),
    ]:
        with pytest.raises(ValueError, match=words):
            c_kernels._kernels.absolute_differences(*fine[:place], value, *fine[place + 1 :])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_of_any_layout_and_type_add_to_the_same_sums(way, order):
    whole = rows(33, 16, 10)
    blocks = [whole[:, :8], rows(9, 8, 10, seed=1), rows(9, 8, 10, seed=2).double(), whole[:, :8].flip(0)]
    for numbers in (order, (*order, 2), (2, *order), (*order, 3)):
        metric = NormalizedVariance()
        for number in numbers:
            metric.update(blocks[number])
        x = torch.cat([blocks[number].double() for number in numbers])
        torch.testing.assert_close(metric.compute(), x.var(1).mean(0) / x.var(0).mean(0), rtol=1e-5, atol=0)


def test_a_value_is_computed_anew_after_rows_are_added(way):
    a, b, c = rows(12, 16, 2000).split(4)
    metric = NormalizedVariance()
    metric.add(a)
    metric.add(b)
    metric.compute()
    metric.add(c)
    wide = torch.cat([a, b, c]).double()
    torch.testing.assert_close(metric.compute(), wide.var(1).mean(0) / wide.var(0).mean(0), rtol=1e-5, atol=0)


@needs_kernels
def test_states_of_other_sizes_do_not_reach_c():
    metric = NormalizedVariance()
    metric.update(rows(4, 16, 2048))
    metric.persistent(True)
    state = metric.state_dict()
    state["row_spread"] = state["row_spread"][:7]
    broken = NormalizedVariance()
    broken.persistent(True)
    broken.load_state_dict(state)
    with pytest.raises(RuntimeError):
        broken.update(rows(4, 16, 2048))


def test_means_far_from_zero_cost_no_digits(way):
    x = 1e5 + rows(500, 4, 4096)
    metric = SampleVariance()
    for block in x.split(4):
        metric.add(block)
    assert metric.offsets.dtype == torch.float32
    torch.testing.assert_close(metric.compute(), x.double().var(0).mean(0), rtol=1e-5, atol=0)


def test_few_rows_that_are_alike_do_not_tell_how_far_columns_are_apart(way):
    x = rows(40, 16, 1100)
    x[:4, :, 7] = 3 * torch.arange(16.0) + 1e-3 * x[:4, :, 7]
    metric = SampleVariance()
    for block in x.split(4):
        metric.add(block)
        assert metric.offsets.dtype == torch.float32
    torch.testing.assert_close(metric.compute(), x.double().var(0).mean(0), rtol=1e-5, atol=0)


@needs_kernels
def test_small_deviations_that_cancel_are_not_lost():
    x = torch.zeros(8, 4, 128)
    x[::2], x[1::2] = 1e-25, -1e-25  # the second block is as often above the mean as below
    metric = SampleVariance()
    for block in x.split(4):
        metric.add(block)
    torch.testing.assert_close(metric.compute(), x.double().var(0).mean(0), rtol=1e-5, atol=0)


@needs_kernels
def test_c_refuses_spreads_and_powers_of_other_sizes():
    x, tensors, spreads = torch.rand(4, 16, 128), sums(), torch.zeros(4, 128)
    pointers = [number for tensor in (x, *tensors) for number in (tensor.data_ptr(), tensor.numel())]
    with pytest.raises(ValueError, match="spreads are of another size"):
        c_kernels._kernels.add_deviations(
            4, 16, 128, 1, 0, 64, False, *pointers, *[0] * 4, spreads.data_ptr(), 3 * 128, *LIMITS
        )
    shares, centre = torch.rand(4, 128), torch.zeros(128, dtype=torch.float64)
    powers, on_sum = torch.zeros(4, 128, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    pointers = [number for tensor in (shares, centre, powers) for number in (tensor.data_ptr(), tensor.numel())]
    fine = [4, 128, 1, False, *pointers, on_sum.data_ptr(), 4, 0.5]
    c_kernels._kernels.add_powers(*fine)
    torch.testing.assert_close(on_sum, shares.double().sum(1) / 2)
    for place, value, words in [
        (0, 5, "another number of values"),
        (7, 64, "other sizes"),
        (9, 3 * 128, "other sizes"),
        (11, 0, "other sizes"),
        (4, 0, "pointer"),
        (8, 0, "pointer"),
    ]:
        with pytest.raises(ValueError, match=words):
            c_kernels._kernels.add_powers(*fine[:place], value, *fine[place + 1 :])
