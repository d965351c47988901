"""The sums in C, against their definitions in float64 and against PyTorch's operations."""

import pytest
import torch

from lightning_invariance import STLoader, evaluate, rotations
from lightning_invariance.measures import (
    Anova,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleVariance,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
    kernels,
    pairs,
)

needs_kernels = pytest.mark.skipif(kernels._kernels is None, reason="the kernels were not compiled here")

SIZES = [(4, 16, 4096), (1, 256, 64), (16, 16, 65), (3, 5, 1000), (7, 2, 2049), (128, 2, 64), (1, 3, 5000)]
SIZES += [(4, 16, 10), (4, 16, 1), (70, 16, 130)]  # fewer than are read together; more values than at once


@pytest.fixture(params=["in C", "by PyTorch"])
def way(request, monkeypatch):
    if request.param == "by PyTorch":
        monkeypatch.setattr(kernels, "_kernels", None)
    elif kernels._kernels is None:
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
    n, far = torch.tensor(0), []
    for block in blocks:
        far.append(kernels.Adder(block, n, row_spread, column_spread, centres, parts)(block))
    assert n == sum(map(len, blocks))
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
    monkeypatch.setattr(kernels, "_kernels", None)
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
            for number in range(metric.passes):
                if number:
                    metric.end_pass()
                for cube in cubes:
                    metric.update(cube)
            torch.testing.assert_close(result[name][layer], metric.compute(), rtol=1e-5, atol=0, equal_nan=True)


@needs_kernels
def test_rows_and_sums_that_do_not_fit_are_refused():
    def adder(n, m, k, offsets=None, squares=1):
        offsets = torch.zeros(k // 64, m, 64) if offsets is None else offsets
        spread = torch.zeros(k, dtype=torch.float64), torch.zeros(squares, k, dtype=torch.float64)
        return kernels.Adder(torch.zeros(n, m, k), torch.tensor(0), *spread, torch.zeros(k), offsets)

    assert adder(16, 16, 128)(torch.zeros(16, 16, 128)) is False
    strided = torch.zeros(2, 64, 16).movedim(1, 2)
    for bad in (
        {"m": 257},
        {"offsets": strided},
        {"offsets": torch.zeros(2, 16, 64, dtype=torch.float64)},
        {"squares": 16},
    ):
        with pytest.raises(ValueError, match="that the kernels add"):
            adder(**{"n": 4, "m": 16, "k": 128, **bad})
    with pytest.raises(ValueError, match="sums by 64 or all"):
        adder(4, 16, 130, torch.zeros(2, 16, 65))(torch.zeros(4, 16, 130))


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
