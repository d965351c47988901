"""Intervals of responses over samples, against derivatives of the definitions by complex steps."""

import numpy as np
import pytest
import torch
from definitions import half_width
from test_intervals import influences, weighted_means
from torch import nn

from lightning_invariance import InvarianceResult, evaluate, plots, quarter_turns, rotations
from lightning_invariance.accumulators.backends import c_kernels
from lightning_invariance.measures import (
    NormalizedVariance,
    TransformationVariance,
    VarianceSameEquivariance,
)


def images(n, channels=3, size=6, dtype=torch.float64):
    return torch.rand(n, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))


def changes(w, x, reference=0):
    """Half the mean squared change from a column, (m, channels)."""
    return weighted_means(w, (x - x[:, [reference]]) ** 2 / 2).mean((2, 3))


def sample_variances(w, x):
    """(channels,); n / (n - 1) does not change with the weights."""
    n = len(x)
    return (n / (n - 1) * weighted_means(w, (x - weighted_means(w, x)) ** 2)).mean((0, 2, 3))


RESPONSES = {
    "NV": (NormalizedVariance(response=True), lambda w, x: (changes(w, x) / sample_variances(w, x)).mean(1)),
    "NV of maps": (
        NormalizedVariance(response=True, aggregate="mean"),
        lambda w, x: (changes(w, x) / sample_variances(w, x)).mean(1),
    ),
    "TV": (TransformationVariance(response=True), lambda w, x: changes(w, x).mean(1)),
    "TV, largest": (TransformationVariance(response=True, aggregate="max"), lambda w, x: changes(w, x).mean(1)),
}


@pytest.fixture(params=["in C", "by PyTorch"])
def way(request, monkeypatch):
    if request.param == "by PyTorch":
        monkeypatch.setattr(c_kernels, "_kernels", None)


def assert_bounds(result, name, layer, expected, rtol):
    """The bounds lie around the response, as far as expected; under the identity they are 0."""
    response = np.array(result.response[name][layer])
    low, high = np.array(result.response_bounds[name][layer])
    known = expected > 0
    np.testing.assert_allclose(((high - low) / 2)[known], expected[known], rtol=rtol)
    np.testing.assert_allclose((high + low) / 2, response, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("batch_size", [8, 64])
def test_bounds_equal_the_definition(name, batch_size):
    measure, definition = RESPONSES[name]
    x, turns = images(13), rotations(8)
    model = nn.Sequential(nn.Identity())
    result = evaluate(model, x, turns, {"measure": measure}, batch_size=batch_size, confidence=0.95)
    psi = influences(definition, turns(x).numpy())
    with np.errstate(invalid="ignore"):
        assert_bounds(result, "measure", "0", half_width(psi), rtol=3e-5)


class Reshaped(nn.Module):
    """Maps with the channels first or last, tokens, or single units, so that tiles of C hold one or more channels."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "units":
            return x.flatten(1)
        if self.how == "last":
            return x.permute(0, 2, 3, 1)
        return x.flatten(2) if self.how == "tokens" else x


@pytest.mark.parametrize(
    ("size", "batch_size", "how"),
    [(4, 8, "first"), (4, 24, "last"), (4, 1024, "units"), (13, 8, "tokens"), (13, 24, "first"), (13, 1024, "last")],
)
def test_bounds_in_float32_of_any_layout(how, batch_size, size, way):
    """The smaller batch holds one sample, the largest more than a step of C."""
    x, turns = images(40, channels=3, size=size, dtype=torch.float32), rotations(8)
    model = nn.Sequential(Reshaped(how))
    axes = {"0": -1} if how == "last" else {"0": 0}
    measure = {"NV": NormalizedVariance(response=True)}
    result = evaluate(model, x, turns, measure, batch_size=batch_size, channel_axis=axes, confidence=0.95)
    st = turns(x).double()
    if how == "units":
        st = st.flatten(2)[..., None, None]
    psi = influences(RESPONSES["NV"][1], st.numpy())
    with np.errstate(invalid="ignore"):
        expected = half_width(psi)
    assert_bounds(result, "NV", "0", expected, rtol=1e-3)


def test_bounds_without_an_identity_are_of_changes_from_the_mean():
    turns = rotations(8)[1:]
    x = images(15)

    def definition(w, x):
        apart = weighted_means(w, (x - x.mean(1, keepdims=True)) ** 2).mean((2, 3)) * 7 / 6
        return (apart / sample_variances(w, x)).mean(1)

    model = nn.Sequential(nn.Identity())
    result = evaluate(model, x, turns, {"NV": NormalizedVariance(response=True)}, confidence=0.9)
    psi = influences(definition, turns(x).numpy())
    assert_bounds(result, "NV", "0", half_width(psi, 0.9), rtol=3e-5)


def test_bounds_of_the_response_of_same_equivariance():
    x, turns = images(20), quarter_turns()
    weights = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    class Weighted(nn.Module):
        """The last map is always zero, and has no value."""

        def forward(self, x):
            return torch.cat([x * weights, x[:, :1] * 0], 1)

    with pytest.warns(UserWarning, match="undefined"):
        result = evaluate(nn.Sequential(Weighted()), x, turns, {"SE": VarianceSameEquivariance()}, confidence=0.95)
    back = turns.inverse(turns(x) * weights).numpy()
    unit = back / np.sqrt((back**2).sum((3, 4), keepdims=True))
    values = (0.5 * (unit - unit[:, :1]) ** 2).sum((3, 4)).mean(2)  # changes from the upright map
    assert_bounds(result, "SE", "0", half_width(values - values.mean(0)), rtol=3e-5)


@pytest.mark.filterwarnings("ignore:NaN")
@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_dead_and_undefined_channels_stay_out_of_the_bounds(value, way):
    class Spoiled(nn.Module):
        def forward(self, x):
            return torch.cat([x, torch.full_like(x[:, :1], value)], 1)

    x, turns, measure = images(20, dtype=torch.float32), rotations(8), {"NV": NormalizedVariance(response=True)}
    plain, spoiled = (
        evaluate(nn.Sequential(layer), x, turns, measure, confidence=0.95) for layer in (nn.Identity(), Spoiled())
    )
    np.testing.assert_allclose(spoiled.response_bounds["NV"]["0"], plain.response_bounds["NV"]["0"], rtol=1e-4)


@pytest.mark.parametrize("parent", [NormalizedVariance, TransformationVariance])
def test_a_response_that_is_not_linear_has_no_bounds(parent):
    class Root(parent):
        def response_of(self, sums):
            return super().response_of(sums).sqrt()

    result = evaluate(nn.Sequential(nn.Identity()), images(20), rotations(8), [Root(response=True)], confidence=0.95)
    assert len(result.response["Root"]["0"]) == 8
    assert result.response_bounds == {}
    assert result.interval()["0"].standard_error > 0


def test_the_file_keeps_the_bounds_and_the_picture_has_bands(tmp_path):
    measure = {"NV": NormalizedVariance(response=True)}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double()
    plain, result = (evaluate(model, images(20), rotations(8), measure, confidence=level) for level in (None, 0.95))
    assert plain.response_bounds == {}
    result.save(tmp_path / "result.npz")
    loaded = InvarianceResult.load(tmp_path / "result.npz")
    assert loaded.response_bounds == result.response_bounds
    assert result.reduced().response_bounds == result.response_bounds
    bands = [len(plots.response(each).axes[0].collections) for each in (plain, result)]
    assert bands == [0, 2]
    band = plots.response(result).axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(max(result.response_bounds["NV"]["0"][1]))


@pytest.mark.parametrize("with_response", [NormalizedVariance(response=True), TransformationVariance(response=True)])
@pytest.mark.parametrize("without", [NormalizedVariance(), NormalizedVariance(aggregate="mean")])
def test_a_measure_without_a_response_has_none_beside_one_with(with_response, without):
    """The two share an accumulator, whose sums of changes belong to the first one alone."""
    measures = {"with": with_response, "without": without}
    model, x, turns = nn.Sequential(nn.Conv2d(3, 4, 3).double()), images(12), quarter_turns()
    together = evaluate(model, x, turns, measures, confidence=0.95)
    assert together.response.keys() == {"with"}
    assert together.response_bounds.keys() <= {"with"}
    for name, measure in measures.items():
        alone = evaluate(model, x, turns, {name: measure}, confidence=0.95)
        torch.testing.assert_close(together.standard_errors[name]["0"], alone.standard_errors[name]["0"])
        torch.testing.assert_close(together[name]["0"], alone[name]["0"])
        assert together.response.get(name) == alone.response.get(name)
