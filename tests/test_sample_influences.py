"""Influences of samples: their sums in C and by PyTorch, and standard errors of means over samples."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_invariance import evaluate, quarter_turns, rotations
from lightning_invariance.accumulators import Deviations, Rows
from lightning_invariance.accumulators.backends import c_kernels
from lightning_invariance.measures import TransformationVariance, VarianceSameEquivariance

needs_kernels = pytest.mark.skipif(c_kernels._kernels is None, reason="the kernels were not compiled here")
WEIGHTS = torch.arange(1, 37).view(6, 6)


@pytest.fixture(params=["in C", "by PyTorch"])
def way(request, monkeypatch):
    if request.param == "by PyTorch":
        monkeypatch.setattr(c_kernels, "_kernels", None)


def images(n, channels=2, size=6, dtype=torch.float32):
    return torch.rand(n, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """Changes its input, and shows the result as the output of a layer."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = nn.Identity(), change

    def forward(self, x):
        return self.inner(self.change(x))


def measured(change, x, transformations, measure, **options):
    options = {"layers": ["inner"], "confidence": 0.95, "progress": False, **options}
    return evaluate(Layer(change), x, transformations, {"measure": measure}, **options)


def errors_of(values):
    """Standard errors of the mean over the first axis."""
    return values.std(0, ddof=1) / math.sqrt(len(values))


@pytest.mark.parametrize("spread", [1.0, 1e-4, 0.0])
def test_samples_that_are_nearly_alike(spread, way):
    """The rounding of float32 rows is not taken for differences between samples."""
    generator = torch.Generator().manual_seed(0)
    sizes = 1 + spread * torch.rand(100, 1, 1, 1, generator=generator)
    x, turns = torch.randn(1, 2, 6, 6, generator=generator) * sizes, quarter_turns()
    result = measured(lambda x: x * WEIGHTS, x, turns, TransformationVariance())
    rows = (turns(x) * WEIGHTS).double().numpy().var(1, ddof=1)
    errors = result.standard_errors["measure"]["inner"].numpy()
    np.testing.assert_allclose(errors, errors_of(rows), rtol=1e-4, atol=1e-7 * rows.max() * (spread == 0))


def test_a_unit_that_is_not_finite_stays_out_of_the_mean(way):
    """Its values would be in the sum over units of every sample."""
    x = images(24, size=4)
    with pytest.warns(UserWarning, match="NaN"):
        result = measured(
            lambda x: torch.cat([x.flatten(1), x.flatten(1)[:, :1] / 0], 1), x, rotations(8), TransformationVariance()
        )
    rows = rotations(8)(x).flatten(2).double().numpy().var(1, ddof=1)
    errors = result.standard_errors["measure"]["inner"]
    assert errors[-1].isnan()
    np.testing.assert_allclose(errors[:-1].numpy(), errors_of(rows), rtol=1e-4)
    assert result.interval()["inner"].standard_error == pytest.approx(errors_of(rows.mean(1)), rel=1e-4)


def test_a_map_that_is_lit_late_counts_and_one_that_is_always_zero_does_not():
    """The first block says nothing of a channel that is zero there."""

    def late(x):
        bright = x.mean((1, 2, 3), keepdim=True) > 0.5
        return torch.cat([x, torch.where(bright, x[:, :1], 0.0)], 1) * WEIGHTS

    x = torch.cat([images(37, channels=1) * 0.5, images(3, channels=1) * 0.4 + 0.6]).double()
    turns, measure = quarter_turns(), VarianceSameEquivariance()
    result = measured(late, x, turns, measure, batch_size=4)
    maps = torch.stack([late(column) for column in turns(x).unbind(1)], 1)
    back = turns.inverse(maps).numpy()
    norms = np.sqrt((back**2).sum((3, 4), keepdims=True))
    rows = (back / np.where(norms > 0, norms, 1)).var(1, ddof=1).sum((2, 3))
    np.testing.assert_allclose(result.standard_errors["measure"]["inner"].numpy(), errors_of(rows), rtol=1e-9)
    with pytest.warns(UserWarning, match="undefined"):
        dark = measured(lambda x: torch.cat([late(x), 0 * x], 1), x, turns, measure, batch_size=4)
    errors = dark.standard_errors["measure"]["inner"]
    np.testing.assert_allclose(errors[:2].numpy(), errors_of(rows), rtol=1e-9)
    assert errors[2].isnan()
    torch.testing.assert_close(dark.influences["measure"]["inner"], result.influences["measure"]["inner"])


def test_a_value_that_is_not_linear_in_the_sums_follows_the_delta_method():
    class Root(TransformationVariance):
        def of_variances(self, transformation, sample):
            return transformation.sqrt()

    x = images(24, dtype=torch.float64)
    result = measured(lambda x: x, x, rotations(8), Root())
    rows = rotations(8)(x).numpy().var(1, ddof=1)
    expected = errors_of(rows) / (2 * np.sqrt(rows.mean(0)))
    np.testing.assert_allclose(result.standard_errors["measure"]["inner"].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("squared", [True, False])
def test_deviations_of_samples_add_up_to_the_sums(squared):
    x = torch.randn(20, 6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    accumulator, rows = Deviations(squared, response=True, reference=1), Rows(x)
    states = accumulator.empty()
    accumulator.add(states, rows)
    shares = accumulator.shares(rows, states)
    assert shares["column_spread"].shape == (20, 1 if squared else 6, 12)
    for name, share in shares.items():
        torch.testing.assert_close(share.sum(0), states[name], rtol=1e-12, atol=1e-12)
    wide = x.double().flatten(2)
    of_rows = 5 * wide.var(1) if squared else wide.std(1)
    torch.testing.assert_close(shares["row_spread"], of_rows, rtol=1e-12, atol=0)


@needs_kernels
@pytest.mark.parametrize(("n", "m", "k"), [(1, 16, 64), (40, 16, 1500), (3, 256, 70)])
def test_sums_in_c_are_the_definition(n, m, k):
    """Where there are more values than at once, in more than one step."""
    generator = torch.Generator().manual_seed(n + k)
    x, means, weights = (torch.rand(*size, generator=generator) for size in ((n, m, k), (m, k), (4, k)))
    weights[3] /= 50 * m  # the last ones leave more than the least part
    counts, factors = -(torch.rand(k, generator=generator) > 0.2).int(), torch.rand(k, generator=generator)
    squares, fourths = torch.zeros(2, k, dtype=torch.float64)
    found = c_kernels.add_influences(
        x, means, weights, counts, squares, fourths, c_kernels.ChangesOfSamples(factors, m - 2)
    )
    wide, mean, (w, v, b, s) = x.double().numpy(), means.double().numpy(), weights.double().numpy()
    spreads = ((wide - mean) ** 2).sum(1)
    psi = np.where(counts < 0, (w * m * wide.var(1) + v * spreads - b) / (1 - s * spreads), 0)
    np.testing.assert_allclose(found.on_sum.numpy(), psi.sum(1), rtol=1e-5)
    np.testing.assert_allclose(squares.numpy(), (psi**2).sum(0), rtol=1e-4)
    np.testing.assert_allclose(fourths.numpy(), (psi**4).sum(0), rtol=1e-4)
    np.testing.assert_allclose(found.spreads.numpy(), spreads, rtol=1e-4)
    changes = ((wide - wide[:, [m - 2]]) ** 2) @ factors.double().numpy()
    np.testing.assert_allclose(found.changes.numpy(), changes, rtol=1e-5)
    many = torch.rand(2, c_kernels.MOST_COLUMNS + 1, k, generator=generator)
    before = squares.clone()
    assert c_kernels.add_influences(many, many[0], weights, counts, squares, fourths) is None
    torch.testing.assert_close(squares, before, rtol=0, atol=0)
