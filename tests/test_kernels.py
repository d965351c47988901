"""The sums in C, against their definitions in float64 and against PyTorch's operations."""

import pytest
import torch

from lightning_invariance import STLoader, evaluate, rotations
from lightning_invariance.measures import (
    Anova,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
    kernels,
    pairs,
)

needs_kernels = pytest.mark.skipif(kernels._kernels is None, reason="the kernels were not compiled here")

SIZES = [(4, 16, 4096), (1, 256, 64), (16, 16, 65), (3, 5, 1000), (7, 2, 2049), (128, 2, 64), (1, 3, 5000)]


@pytest.fixture(params=["in C", "by PyTorch"])
def way(request, monkeypatch):
    if request.param == "by PyTorch":
        monkeypatch.setattr(kernels, "_kernels", None)
    elif kernels._kernels is None:
        pytest.skip("the kernels were not compiled here")


def rows(n, m, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(n, 1, k, generator=generator) + 0.3 * torch.randn(n, m, k, generator=generator)


def sums_of(blocks, centres, width=None):
    """Moments (2, k), columns (m, k) and what was said of each block, with sums in parts of so many activations."""
    m, k = blocks[0].shape[1:]
    width = width or k
    n, moments = torch.tensor(0), torch.zeros(k // width, 2, width, dtype=torch.float64)
    columns, centres = torch.zeros(k // width, m, width), centres.view(-1, 1, width)
    clear = [kernels.Adder(block, n, centres, moments, columns)(block) for block in blocks]
    assert n == sum(len(block) for block, found in zip(blocks, clear, strict=True) if found is not None)
    return moments.movedim(1, 0).flatten(1), columns.movedim(1, 0).flatten(1), clear


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("size", "width"), [*((size, None) for size in SIZES), ((4, 16, 4096), 64), ((3, 5, 1920), 128)]
)
def test_sums_of_deviations_are_the_definition(size, threads, width):
    blocks = [rows(*size), rows(*size, seed=1)]
    centres = blocks[0][0, 0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        moments, columns, _ = sums_of(blocks, centres, width)
    finally:
        torch.set_num_threads(before)
    x = torch.cat(blocks).double()
    deviation = x - centres
    torch.testing.assert_close(moments[0], x.var(1, correction=0).sum(0) * size[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(moments[1], deviation.square().sum((0, 1)), rtol=1e-5, atol=0)
    torch.testing.assert_close(columns.double(), deviation.sum(0), rtol=1e-5, atol=1e-4)


@needs_kernels
def test_rows_that_are_constant_have_no_spread():
    x = rows(8, 16, 200)
    x[..., 3] = x[:, :1, 3]
    x[..., 150] = 0.1
    moments, _, _ = sums_of([x], x[0, 0])
    assert moments[0, [3, 150]].tolist() == [0, 0]
    assert moments[1, 3] > 0
    assert moments[1, 150] == 0
    assert (moments[0] > 0).sum() == 198


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20, 1e-30])
@pytest.mark.parametrize("where", [0, 1500, 2050])
def test_rows_that_float32_does_not_hold_are_taken_away_again(bad, where):
    good, flawed = rows(4, 16, 2051), rows(4, 16, 2051, seed=1)
    flawed[..., where] = bad * torch.arange(1.0, 17)  # also where no square is left, of 1e-30
    good[..., where] = 0
    moments, columns, clear = sums_of([good, flawed], good[0, 0])
    assert clear[1] is None
    expected, expected_columns, _ = sums_of([good], good[0, 0])
    torch.testing.assert_close(moments, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(columns, expected_columns, rtol=1e-5, atol=1e-4)


def test_a_small_spread_beside_large_squares_is_not_lost(way):
    x = rows(8, 16, 2000)
    x[..., 4] = 1.0
    x[3, :, 4] = 1e-30 * torch.arange(16.0)
    metric = TransformationVariance()
    metric.update(x[:4])
    metric.update(x[4:])
    torch.testing.assert_close(metric.compute(), x.double().var(1).mean(0), rtol=1e-4, atol=0)


@needs_kernels
def test_a_spread_of_columns_that_drowns_is_told():
    x = rows(8, 16, 300)
    assert sums_of([x], x[0, 0])[2] == [True]
    x[..., 299] = 100 * torch.arange(16.0) + 0.1 * torch.randn(8, 16)
    assert sums_of([x], x.mean((0, 1)))[2] == [False]


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
def test_sums_that_the_loop_cannot_add_to_are_refused():
    def adder(n, m, k, width):
        columns = torch.zeros(k // width, m, width)
        moments = torch.zeros(k // width, 2, width, dtype=torch.float64)
        return kernels.Adder(torch.zeros(n, m, k), torch.tensor(0), torch.zeros(k // width, 1, width), moments, columns)

    assert adder(16, 16, 128, 64)(torch.zeros(16, 16, 128)) is True
    for sizes in ((17, 16, 128, 64), (4, 16, 130, 65)):
        with pytest.raises(ValueError, match="at most 256 values of each activation, and sums by 64 or all"):
            adder(*sizes)(torch.zeros(sizes[:3]))
    strided = torch.zeros(1, 100, 16).movedim(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.Adder(torch.zeros(1, 16, 100), torch.tensor(0), strided[:, :1], strided[:, :2].double(), strided)
