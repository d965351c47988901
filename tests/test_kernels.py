"""Sums in C and by PyTorch's operations, against their definitions in float64."""

import pytest
import torch

from lightning_invariance.accumulators.backends import c_kernels, pairs
from lightning_invariance.measures import (
    NormalizedVariance,
    SampleVariance,
    TransformationDistance,
    TransformationVariance,
)

needs_kernels = pytest.mark.skipif(c_kernels._kernels is None, reason="the kernels were not compiled here")

#: (n, m, k), how wide a tile of offsets is, whether there are centres, and threads. Some layers are narrower than what
#: C reads together, some blocks have more values than one step, and some activations are left over.
CASES = [
    ((4, 16, 4096), None, True, 1),
    ((4, 16, 4096), 64, True, 2),
    ((3, 5, 1920), 128, False, 1),
    ((1, 256, 64), None, False, 1),
    ((16, 16, 65), None, True, 1),
    ((7, 2, 2049), None, False, 2),
    ((128, 2, 64), None, True, 1),
    ((1, 3, 5000), None, False, 1),
    ((4, 16, 1), None, True, 1),
    ((70, 16, 130), None, False, 1),
]


@pytest.fixture(params=["in C", "by PyTorch"])
def way(request, monkeypatch):
    if request.param == "by PyTorch":
        monkeypatch.setattr(c_kernels, "_kernels", None)
    elif c_kernels._kernels is None:
        pytest.skip("the kernels were not compiled here")
    return request.param


def rows(n, m, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(n, 1, k, generator=generator) + 0.3 * torch.randn(n, m, k, generator=generator)


def updated(metric, x, size=4):
    for block in x.split(size):
        metric.update(block)
    return metric


def tv(x):
    return x.double().var(1).mean(0)


def sv(x):
    return x.double().var(0).mean(0)


def spreads(x):
    """Squared deviations within rows and columns, summed."""
    x = x.double()
    return (x - x.mean(1, keepdim=True)).square().sum((0, 1)), (x - x.mean(0)).square().sum((0, 1))


def sums_of(blocks, centres, offsets, width=None):
    """Row spread (k,), column spread (k,) and means (m, k) in C, and whether columns were far apart for each block."""
    m, k = blocks[0].shape[1:]
    row_spread, column_spread = torch.zeros(k, dtype=torch.float64), torch.zeros(1, k, dtype=torch.float64)
    parts = offsets.view(m, -1, width or k).movedim(1, 0).clone(memory_format=torch.contiguous_format)
    n, far = 0, []
    for block in blocks:
        far.append(c_kernels.add_deviations(block, n, row_spread, column_spread, centres, parts))
        n += len(block)
    return row_spread, column_spread[0], centres.double() + parts.double().movedim(1, 0).flatten(1), far


@pytest.fixture
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "width", "centred", "threads"), CASES)
def test_sums_of_deviations_are_the_definition(size, width, centred, threads, dtype, threads_as_before):
    """With means in float32, and in float64, where everything is: then also of blocks of very different sizes."""
    wide = dtype == torch.float64
    blocks = [1e6 * rows(*size) if wide else rows(*size), rows(*size, seed=1)]
    first = blocks[0][0].to(dtype)
    centres = first[0] if centred else torch.zeros(size[2], dtype=dtype)
    torch.set_num_threads(threads)
    row_spread, column_spread, means, far = sums_of(blocks, centres, first - centres, width)
    x = torch.cat(blocks)
    tolerance = 1e-11 if wide else 1e-5
    for found, expected in zip((row_spread, column_spread), spreads(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(means, x.double().mean(0), rtol=tolerance / 10, atol=tolerance / 10)
    assert not wide or far == [False, False]


def test_small_layers_are_measured_in_float64(way):
    x = rows(50, 16, 10)
    torch.testing.assert_close(updated(TransformationVariance(), x).compute(), tv(x), rtol=1e-9, atol=0)
    torch.testing.assert_close(updated(SampleVariance(), x).compute(), sv(x), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("squared", [True, False])
def test_what_is_constant_adds_exactly_nothing_to_a_measure(squared, dtype, way):
    x = rows(8, 16, 200).to(dtype)
    x[..., 3] = x[:, :1, 3]
    x[..., 100] = 2 + 0.01 * torch.arange(16.0).div(3)  # with a centre
    x[..., 130] = 2 + torch.arange(16.0).div(3)  # without
    x[..., 150] = 0.1
    tv, sv = (updated(made(squared=squared), x).compute() for made in (TransformationVariance, SampleVariance))
    assert (tv == 0).nonzero().flatten().tolist() == [3, 150]
    assert (sv == 0).nonzero().flatten().tolist() == [100, 130, 150]


@needs_kernels
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e20, 1e-30, 1e-42])
def test_squares_that_float32_does_not_hold_are_taken_in_float64(scale):
    x, some = rows(8, 16, 2051), [0, 1500, 2050]
    x[4:, :, some] *= scale
    x[:4, :, some] = 0
    found = sums_of([x[:4], x[4:]], torch.zeros(2051), x[0])[:2]
    known = torch.ones(2051, dtype=torch.bool)
    known[some] = scale < 1e30
    for sums, expected in zip(found, spreads(x), strict=True):
        assert not sums[~known].isfinite().any()
        torch.testing.assert_close(sums[known], expected[known], rtol=1e-5, atol=0)


def test_a_small_spread_beside_large_squares_is_not_lost(way):
    x = rows(8, 16, 2000)
    x[..., 4] = 1.0
    x[3, :, 4] = 1e-30 * torch.arange(16.0)
    torch.testing.assert_close(updated(TransformationVariance(), x).compute(), tv(x), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_means_far_from_zero_and_values_of_any_size_keep_their_digits(scale, dtype, way):
    x = (scale * (1e4 + rows(12, 16, 130))).to(dtype)
    torch.testing.assert_close(updated(NormalizedVariance(), x).compute(), tv(x) / sv(x), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("apart", "order"), [(1, "any"), (30, "any"), (10, "rising")])
def test_columns_that_differ_in_the_same_way_for_every_sample_cost_no_digits(way, apart, order):
    # Plain sums of the columns would round in one direction a thousand times.
    generator = torch.Generator().manual_seed(0)
    x = apart * torch.randn(16, 128, generator=generator) + torch.randn(800, 1, 128, generator=generator)
    x = x.sort(0).values if order == "rising" else x
    tolerance = 1e-5 if order == "any" else 1e-4
    torch.testing.assert_close(updated(SampleVariance(), x).compute(), sv(x), rtol=tolerance, atol=0)


def test_columns_far_apart_have_means_in_float64(way):
    generator = torch.Generator().manual_seed(0)
    x = rows(40, 16, 1100)
    x[..., 1099] = 1e4 * torch.randn(16, generator=generator) + torch.randn(40, 16, generator=generator)
    metric = updated(SampleVariance(), x)
    assert metric.offsets.dtype == torch.float64
    torch.testing.assert_close(metric.compute(), sv(x), rtol=1e-5, atol=0)


@needs_kernels
def test_other_means_are_float32():
    """From eight rows on, also if they are far from zero; fewer do not tell how far columns are apart."""
    far, alike, one_by_one = 1e5 + rows(40, 4, 520), rows(40, 16, 1100), rows(40, 16, 1100)
    alike[:4, :, 7] = 3 * torch.arange(16.0) + 1e-3 * alike[:4, :, 7]
    for x, sizes in ((far, [4] * 10), (alike, [4] * 10), (one_by_one, [1, 1, 38])):
        metric, n = SampleVariance(), 0
        for block in x.split(sizes):
            metric.update(block)
            n += len(block)
            assert metric.offsets.dtype == (torch.float64 if n < 8 else torch.float32)
        torch.testing.assert_close(metric.compute(), sv(x), rtol=1e-5, atol=0)


@needs_kernels
def test_small_deviations_that_cancel_are_not_lost():
    x = torch.zeros(8, 4, 640)  # so many that means are float32
    x[::2], x[1::2] = 1e-25, -1e-25  # the second block is as often above the mean as below
    torch.testing.assert_close(updated(SampleVariance(), x).compute(), sv(x), rtol=1e-5, atol=0)


@needs_kernels
@pytest.mark.parametrize(("m", "k"), [(2, 64), (3, 100), (7, 3001), (16, 64), (33, 100), (64, 100)])
def test_differences_within_rows_are_the_definition(m, k):
    x = rows(3, m, k)
    expected = (x.double()[:, :, None] - x.double()[:, None]).abs().sum((1, 2))
    torch.testing.assert_close(pairs.absolute_differences(x), expected.sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(pairs.absolute_differences(x, of_rows=True), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(pairs.absolute_differences(x.double(), of_rows=True), expected, rtol=1e-12, atol=0)


def test_nan_and_infinite_values_stay_where_they_are(way):
    x = rows(3, 7, 128)
    x[1, 2, 5], x[0, 3, 6], x[2, 0, 7] = float("nan"), float("inf"), float("inf")
    found = [pairs.absolute_differences(x), updated(NormalizedVariance(), x, 2).compute()]
    found.append(updated(NormalizedVariance(squared=False), x, 2).compute())
    for values in found:
        assert (~values.isfinite()).nonzero().flatten().tolist() == [5, 6, 7]
        assert values[5].isnan()


def test_measures_have_their_values_either_way(way):
    x = rows(40, 16, 200)
    x[..., :10] = x[:, :1, :10]
    x[..., 10:20] = 0
    x[7, 3, 25] = float("nan")
    nv, td = (updated(metric, x).compute() for metric in (NormalizedVariance(), TransformationDistance()))
    expected = tv(x) / sv(x)
    expected[10:20] = 1
    torch.testing.assert_close(nv, expected, rtol=1e-4, atol=0, equal_nan=True)
    assert (nv[:10] == 0).all()
    pairwise = (x.double()[:, :, None] - x.double()[:, None]).abs().mean((1, 2)).mean(0)
    torch.testing.assert_close(td, pairwise, rtol=1e-5, atol=0, equal_nan=True)


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


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_of_any_layout_and_type_add_to_the_same_sums(way, order):
    whole = rows(33, 16, 10)
    blocks = [whole[:, :8], rows(9, 8, 10, seed=1), rows(9, 8, 10, seed=2).double(), whole[:, :8].flip(0)]
    for numbers in (order, (*order, 2), (2, *order), (*order, 3)):
        metric = NormalizedVariance()
        for number in numbers:
            metric.update(blocks[number])
        x = torch.cat([blocks[number].double() for number in numbers])
        torch.testing.assert_close(metric.compute(), tv(x) / sv(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mean", [0.0, 1e7])
@pytest.mark.parametrize("squared", [True, False])
def test_any_split_and_merge_gives_the_same_in_float64(squared, mean):
    x = mean + rows(60, 8, 50).double()
    whole = updated(NormalizedVariance(squared=squared), x, 60).compute()
    for sizes in ([1, 1, 58], [7, 20, 33], [30, 29, 1]):
        one, *others = [updated(NormalizedVariance(squared=squared), part, 5) for part in x.split(sizes)]
        for other in others:
            one.merge_state(other)
        torch.testing.assert_close(one.compute(), whole, rtol=1e-9, atol=0)


def sums(m=16, k=128, width=64, dtype=torch.float32):
    wide = {"dtype": torch.float64}
    spread = torch.zeros(k, **wide), torch.zeros(1, k, **wide)
    return [*spread, torch.zeros(k, dtype=dtype), torch.zeros(k // width, m, width, dtype=dtype)]


@needs_kernels
def test_tensors_that_c_does_not_take_are_left_alone():
    assert c_kernels.add_deviations(torch.rand(4, 16, 128), 0, *sums()) is False
    cases = [
        (torch.rand(4, 257, 128), sums(257)),  # too many columns
        (torch.rand(4, 16, 128).double(), sums()),
        (torch.rand(4, 16, 128), [*sums()[:3], sums(dtype=torch.float64)[3]]),
        (torch.rand(4, 16, 128), [*sums()[:3], torch.zeros(2, 64, 16).movedim(1, 2)]),
        (torch.rand(4, 16, 128), [sums()[0].float(), *sums()[1:]]),
    ]
    for x, tensors in cases:
        assert c_kernels.add_deviations(x, 0, *tensors) is None
        assert not any(tensor.any() for tensor in tensors)


def at(tensor):
    return tensor.data_ptr(), tensor.numel()


def assert_refused(function, fine, wrong):
    """A function in C takes arguments, and refuses them if one is wrong: name → [(value, words of the error)]."""
    function(**fine)
    for name, cases in wrong.items():
        for value, words in cases:
            with pytest.raises(ValueError, match=words):
                function(**{**fine, name: value})
        with pytest.raises(TypeError):
            function(**{other: value for other, value in fine.items() if other != name})
        with pytest.raises(TypeError):
            function(**{**fine, name: "text"})


@needs_kernels
def test_c_refuses_sizes_that_do_not_fit_before_it_uses_a_pointer():
    x, changes = torch.rand(4, 16, 128), torch.zeros(16, 4, dtype=torch.float64)
    row_spread, column_spread, centres, offsets = sums()
    fine = {"block": (*at(x), 4, 16, 128), "before": 0, "row_spread": at(row_spread)}
    fine |= {"column_spread": at(column_spread), "centres": at(centres), "offsets": at(offsets), "width": 64}
    fine |= {
        "wide": False,
        "limits": c_kernels.LIMITS,
        "changes": at(changes),
        "inner": 32,
        "reference": 0,
        "threads": 1,
    }
    address, number = at(x)
    block, other = "another number of values", "other sizes"
    wrong = {
        "block": [
            ((address, number, 5, 16, 128), block),
            ((address, number, -4, 16, 128), block),
            ((address, number, 4, 16, 2**62), block),
            ((address, number - 1, 4, 16, 128), block),
            ((0, number, 4, 16, 128), block),
            ((address, number, 1, 512, 16), "too many columns"),
        ],
        "before": [(-1, block)],
        "row_spread": [((row_spread.data_ptr(), 64), other), (None, other)],
        "column_spread": [((column_spread.data_ptr(), 16 * 128), other), (None, other)],
        "centres": [((0, 128), other)],
        "offsets": [((offsets.data_ptr(), 2047), other)],
        "width": [(96, "another width"), (0, "another width"), (32, "another width")],
        "changes": [((changes.data_ptr(), size), "changes are of other sizes") for size in (63, 0, 16 * 3)],
        "inner": [(size, "changes are of other sizes") for size in (0, 48)],
        "reference": [(column, "changes are of other sizes") for column in (-2, 16)],
    }
    assert_refused(c_kernels._kernels.add_deviations, fine, wrong)


@needs_kernels
def test_c_refuses_distances_and_influences_of_other_sizes():
    x, network = torch.rand(4, 16, 128), torch.tensor([[0, 1], [1, 15]], dtype=torch.int32)
    total, beyond = torch.zeros(4, 128, dtype=torch.float64), torch.tensor([[0, 16]], dtype=torch.int32)
    fine = {"block": (*at(x), 4, 16, 128), "strides": (16 * 128, 128), "network": at(network)}
    fine |= {"differences": at(total), "of_rows": True, "threads": 1}
    block = "another number of values"
    wrong = {
        "block": [((*at(x), 5, 16, 128), block), ((*at(x), 4, 0, 128), block), ((0, x.numel(), 4, 16, 128), block)],
        "strides": [((16 * 128 + 1, 128), block), ((2**62, 128), block), ((16 * 128, -1), block)],
        "network": [((network.data_ptr(), 3), "other sizes"), (at(beyond), "columns that the block does not have")],
        "differences": [((total.data_ptr(), 128), "other sizes")],
    }
    assert_refused(c_kernels._kernels.absolute_differences, fine, wrong)
    means, weights = torch.rand(16, 128), torch.rand(4, 128)
    squares, fourths = torch.zeros(2, 128, dtype=torch.float64)
    counts, on_sum = -torch.ones(128, dtype=torch.int32), torch.zeros(4, dtype=torch.float64)
    factors, changes, spread = torch.rand(128), torch.zeros(4, 16, dtype=torch.float64), torch.zeros(4, 128)
    fine = {"block": (*at(x), 4, 16, 128), "means": at(means), "weights": at(weights), "counts": at(counts)}
    fine |= {"squares": at(squares), "fourths": at(fourths), "on_sum": at(on_sum), "factors": at(factors)}
    fine |= {"reference": 1, "changes": at(changes), "spreads": at(spread), "threads": 1}
    wrong = {"block": [((*at(x), 2, 16, 128), block)], "factors": [((factors.data_ptr(), 127), "of other sizes")]}
    wrong["reference"] = [(-1, "of other sizes"), (16, "of other sizes")]
    for name in ("means", "weights", "counts", "squares", "fourths", "on_sum", "changes", "spreads"):
        address, number = fine[name]
        wrong[name] = [((address, number - 1), "of other sizes"), ((0, number), "of other sizes")]
    assert_refused(c_kernels._kernels.add_influences, fine, wrong)


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
    with pytest.raises(ValueError, match="sums are missing or of other sizes"):
        broken.update(rows(4, 16, 2048))
