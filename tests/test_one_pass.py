"""Influences on means over samples, which need one pass: the sums behind them, and when a second pass is taken."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_invariance import evaluate, quarter_turns, rotations
from lightning_invariance.accumulators import Deviations, Rows
from lightning_invariance.accumulators.backends import c_kernels, pairs
from lightning_invariance.engine.influence_on_mean import InfluenceOnMean
from lightning_invariance.measures import (
    Consistency,
    DistanceSameEquivariance,
    NormalizedVariance,
    Sums,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

needs_kernels = pytest.mark.skipif(c_kernels._kernels is None, reason="the kernels were not compiled here")


@pytest.fixture(params=["in C", "by PyTorch"])
def way(request, monkeypatch):
    if request.param == "by PyTorch":
        monkeypatch.setattr(c_kernels, "_kernels", None)


def images(n, channels=2, size=4, dtype=torch.float32):
    return torch.rand(n, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))


class Counted(nn.Module):
    """Counts the inputs that it gets."""

    def __init__(self, change=None):
        super().__init__()
        self.inner, self.change, self.inputs = nn.Identity(), change, 0

    def forward(self, x):
        self.inputs += len(x)
        return self.inner(x if self.change is None else self.change(x))


def errors_of(values):
    """Standard errors of the mean over the first axis."""
    return values.std(0, ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize(
    "measure",
    [
        TransformationVariance(),
        TransformationVariance(squared=False),
        TransformationVariance(aggregate="mean"),
        TransformationDistance(),
        TransformationDistance("euclidean", over="channel"),
        VarianceSameEquivariance(mask=True),
        VarianceSameEquivariance(over="activation", normalize=False),
        DistanceSameEquivariance(),
        DistanceSameEquivariance(formulation="direct"),
        Consistency(),
    ],
)
def test_means_over_samples_need_one_pass(measure, way):
    numbers = []
    for confidence in (None, 0.95):
        model = Counted(lambda x: x * torch.arange(1, 37).view(6, 6))
        x = images(32, channels=3, size=6)
        result = evaluate(model, x, quarter_turns(), [measure], layers=["inner"], confidence=confidence)
        numbers.append(model.inputs)
    assert numbers[0] == numbers[1]
    assert result.interval()["inner"].standard_error > 0


def test_quotients_and_largest_values_need_two_passes():
    for measure in (NormalizedVariance(), TransformationVariance(aggregate="max")):
        models = Counted(), Counted()
        for model, confidence in zip(models, (None, 0.95), strict=True):
            evaluate(model, images(32), quarter_turns(), [measure], confidence=confidence)
        assert models[1].inputs >= models[0].inputs + 32 * 4


def test_a_unit_that_is_not_finite_takes_a_second_pass():
    """Its values would be in the sum over units of every sample."""

    def infinite(x):
        flat = x.flatten(1)
        return torch.cat([flat, flat[:, :1] / 0], 1)

    model = Counted(infinite)
    x = images(24, dtype=torch.float64)
    with pytest.warns(UserWarning, match="NaN"):
        result = evaluate(model, x, rotations(8), [TransformationVariance()], layers=["inner"], confidence=0.95)
    rows = rotations(8)(x).flatten(2).numpy().var(1, ddof=1)
    errors = result.standard_errors["TransformationVariance"]["inner"]
    assert errors[-1].isnan()
    np.testing.assert_allclose(errors[:-1].numpy(), errors_of(rows), rtol=1e-9)
    found = result.interval()["inner"].standard_error
    assert found == pytest.approx(errors_of(rows.mean(1)), rel=1e-9)


def test_maps_that_are_zero_throughout_stay_out_in_one_pass(way):
    def darkened(x):
        return torch.cat([x, torch.zeros_like(x[:, :1])], 1)

    x, measure = images(20, channels=3, size=6), [VarianceSameEquivariance()]
    plain, dark = Counted(), Counted(darkened)
    expected = evaluate(plain, x, rotations(8), measure, layers=["inner"], confidence=0.95)
    with pytest.warns(UserWarning, match="undefined"):
        found = evaluate(dark, x, rotations(8), measure, layers=["inner"], confidence=0.95)
    assert dark.inputs == plain.inputs
    name = "VarianceSameEquivariance"
    torch.testing.assert_close(found.standard_errors[name]["inner"][:3], expected.standard_errors[name]["inner"])
    assert found.standard_errors[name]["inner"][3].isnan()
    torch.testing.assert_close(found.influences[name]["inner"], expected.influences[name]["inner"])


def test_a_map_that_is_lit_late_counts_in_one_pass():
    """The first block says nothing of a channel that is zero there."""

    def late(x):
        bright = x.mean((1, 2, 3), keepdim=True) > 0.5
        return torch.cat([x, torch.where(bright, x[:, :1], 0.0)], 1)

    x = torch.cat([images(37, channels=1, size=6) * 0.5, images(3, channels=1, size=6) * 0.4 + 0.6]).double()
    turns, measure = quarter_turns(), [VarianceSameEquivariance()]
    weights = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = Counted(lambda x: late(x) * weights)
    result = evaluate(model, x, turns, measure, layers=["inner"], batch_size=4, confidence=0.95)
    maps = torch.stack([late(column) * weights for column in turns(x).unbind(1)], 1)
    back = turns.inverse(maps).numpy()
    norms = np.sqrt((back**2).sum((3, 4), keepdims=True))
    rows = (back / np.where(norms > 0, norms, 1)).var(1, ddof=1).sum((2, 3))
    errors = result.standard_errors["VarianceSameEquivariance"]["inner"].numpy()
    np.testing.assert_allclose(errors, errors_of(rows), rtol=1e-9)
    assert model.inputs < 2 * 160


def test_a_measure_that_only_says_that_it_is_a_mean_takes_a_second_pass():
    class Root(TransformationVariance):
        """Not linear, although its parent is."""

        def of_variances(self, transformation, sample):
            return transformation.sqrt()

    x, model = images(24, dtype=torch.float64), Counted()
    result = evaluate(model, x, rotations(8), [Root()], layers=["inner"], confidence=0.95)
    rows = rotations(8)(x).numpy().var(1, ddof=1)
    expected = errors_of(rows) / (2 * np.sqrt(rows.mean(0)))  # the delta method
    np.testing.assert_allclose(result.standard_errors["Root"]["inner"].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 0.0])
def test_samples_that_are_nearly_alike(spread, way):
    """The rounding of float32 rows is not taken for differences between samples."""
    generator = torch.Generator().manual_seed(0)
    sizes = 1 + spread * torch.rand(100, 1, 1, 1, generator=generator)
    x, turns = torch.randn(1, 2, 6, 6, generator=generator) * sizes, quarter_turns()
    model = Counted(lambda x: x * torch.arange(1, 37).view(6, 6))
    result = evaluate(model, x, turns, [TransformationVariance()], layers=["inner"], confidence=0.95)
    weighted = (turns(x) * torch.arange(1, 37).view(6, 6)).double().numpy()
    errors = result.standard_errors["TransformationVariance"]["inner"].numpy()
    np.testing.assert_allclose(errors, errors_of(weighted.var(1, ddof=1)), rtol=1e-4, atol=1e-12)
    assert (model.inputs >= 800) == (spread == 1e-4)  # 400 in each pass, and a probe


def on_rows(measure, blocks):
    """The influences of blocks of rows, not finished."""
    [accumulator] = measure.needs
    states, before = accumulator.empty(), 0
    n = sum(map(len, blocks))
    influence = InfluenceOnMean(measure, [accumulator], lambda: Sums(states, n, 8, (30,)))
    for block in blocks:
        rows = Rows(block, torch.arange(before, before + len(block)), before=before, keep_shares=True)
        accumulator.add_(states, rows)
        influence.add(rows)
        before += len(block)
    return influence


def assert_is_mean_of(influence, values, rtol):
    spreads = {"row_spread": torch.from_numpy(7 * values.sum(0)), "column_spread": torch.ones(1, 30).double()}
    assert influence.finish(Sums(spreads, len(values), 8, (30,)))
    psi = values - values.mean(0)
    np.testing.assert_allclose(influence.states["squares"], (psi**2).sum(0), rtol=rtol)
    np.testing.assert_allclose(influence.states["fourths"], (psi**4).sum(0), rtol=rtol)
    scale = np.abs(psi.mean(1)).max()
    np.testing.assert_allclose(influence.states["on_mean"], psi.mean(1), rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("places", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_merges_in_any_order(places, way):
    x = torch.randn(60, 8, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    parts = [on_rows(TransformationVariance(), [x[:1]]), on_rows(TransformationVariance(), [x[1:20], x[20:40]])]
    parts.append(on_rows(TransformationVariance(), [x[40:]]))
    a, b, c = (parts[place].states for place in places)
    whole = on_rows(TransformationVariance(), [x])
    none = on_rows(TransformationVariance(), []).states
    whole.states = InfluenceOnMean.merged(none, InfluenceOnMean.merged(InfluenceOnMean.merged(a, b), c))
    rows = x.numpy().var(1, ddof=1)
    order = np.concatenate([[np.arange(1), np.arange(1, 40), np.arange(40, 60)][place] for place in places])
    assert_is_mean_of(whole, rows[order], rtol=1e-10)


def test_a_process_that_saw_no_row_finds_the_same():
    measure = VarianceSameEquivariance(quarter_turns())
    [accumulator] = measure.needs
    maps = torch.rand(20, 4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps[:, :, 1] = 0  # has no value, so that responses are those of two channels
    rows, states = Rows(maps, torch.arange(20), keep_shares=True), accumulator.empty()
    accumulator.add_(states, rows)
    sums = Sums(states, 20, 4, (3, 6, 6))
    seen, unseen = (InfluenceOnMean(measure, [accumulator], lambda: sums) for _ in range(2))
    seen.add(rows)
    unseen.states = {name: state.clone() for name, state in InfluenceOnMean.merged(unseen.states, seen.states).items()}
    assert seen.finish(sums)
    assert unseen.finish(sums)
    assert len(seen.states["response_squares"]) == 4
    for name, state in seen.states.items():
        torch.testing.assert_close(unseen.states[name], state, rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(0, 5), (1, 1), (3, 64), (7, 1500), (40, 5000)])
def test_powers_of_shares(dtype, n, k):
    generator = torch.Generator().manual_seed(n + k)
    shares, centre = torch.rand(n, k, dtype=dtype, generator=generator), torch.rand(k, generator=generator).double()
    powers = torch.ones(4, k, dtype=torch.float64)
    on_sum = c_kernels.add_powers(shares, 0.25, centre, powers)
    values = shares.double().numpy() / 4
    expected = np.stack([((values - centre.numpy()) ** power).sum(0) for power in (1, 2, 3, 4)]) + 1
    np.testing.assert_allclose(powers.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(on_sum.numpy(), values.sum(1), rtol=1e-12)


@needs_kernels
@pytest.mark.parametrize("n", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("k", [1, 63, 64, 200, 3000])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e17])
def test_spreads_of_rows(n, k, scale):
    """Of each row, whether float32 holds the squares of the block or not."""
    x = (torch.rand(n, 16, k, generator=torch.Generator().manual_seed(k)) - 0.5) * scale
    rows = Rows(x, keep_shares=True)
    accumulator = Deviations()
    accumulator.add_(accumulator.empty(), rows)
    found = accumulator.shares(rows, None)["row_spread"]
    wide = x.double().numpy()
    expected = 16 * wide.var(1)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=1e-5)
    assert found.dtype == torch.float32


@needs_kernels
@pytest.mark.parametrize("k", [1, 64, 200])
def test_absolute_differences_of_each_row(k):
    x = torch.rand(5, 9, k, generator=torch.Generator().manual_seed(k))
    wide = x.double().numpy()
    expected = np.abs(wide[:, :, None] - wide[:, None]).sum((1, 2))
    np.testing.assert_allclose(pairs.absolute_differences(x, of_rows=True).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(pairs.absolute_differences(x.double(), of_rows=True).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(pairs.absolute_differences(x).numpy(), expected.sum(0), rtol=1e-5)


@needs_kernels
@pytest.mark.parametrize(("n", "m", "k"), [(1, 16, 64), (5, 3, 200), (40, 16, 1500), (3, 256, 70)])
def test_changes_of_samples_from_any_column(n, m, k):
    """In C, in more than one step where there are more values than at once."""
    generator = torch.Generator().manual_seed(n + k)
    x, means, weights = (torch.rand(*size, generator=generator) for size in ((n, m, k), (m, k), (3, k)))
    counts, factors = -torch.ones(k, dtype=torch.int32), torch.rand(k, generator=generator)
    squares, fourths = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    of_changes = c_kernels.ChangesOfSamples(factors, m - 2)
    found = c_kernels.add_influences(x, means, weights, counts, squares, fourths, of_changes)
    wide, mean, (w, v, b) = x.double().numpy(), means.double().numpy(), weights.double().numpy()
    spreads = ((wide - mean) ** 2).sum(1)
    psi = w * m * wide.var(1) + v * spreads - b
    np.testing.assert_allclose(found.on_sum.numpy(), psi.sum(1), rtol=1e-5)
    np.testing.assert_allclose(squares.numpy(), (psi**2).sum(0), rtol=1e-4)
    np.testing.assert_allclose(found.spreads.numpy(), spreads, rtol=1e-4)
    changes = ((wide - wide[:, [m - 2]]) ** 2) @ factors.double().numpy()
    np.testing.assert_allclose(found.changes.numpy(), changes, rtol=1e-5)
    with pytest.raises(ValueError, match="factors, the changes or the spreads"):
        c_kernels.add_influences(x, means, weights, counts, squares, fourths, of_changes._replace(reference=m))
    with pytest.raises(ValueError, match="factors, the changes or the spreads"):
        c_kernels.add_influences(x, means, weights, counts, squares, fourths, of_changes._replace(factors=factors[1:]))
    many = torch.rand(2, c_kernels.MOST_COLUMNS + 1, k, generator=generator)
    before = squares.clone()
    assert c_kernels.add_influences(many, many[0], weights, counts, squares, fourths) is None
    torch.testing.assert_close(squares, before, rtol=0, atol=0)
