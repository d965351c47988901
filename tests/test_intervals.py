"""Standard errors and intervals over samples, against derivatives of the definitions by complex steps."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from definitions import degrees_of_freedom
from torch import nn

from lightning_invariance import InvarianceResult, evaluate, quarter_turns, rotations
from lightning_invariance.measures import (
    ChannelEquivariance,
    Consistency,
    DistanceSameEquivariance,
    EffectiveInvariance,
    EquivarianceCorrelation,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    SampleVariance,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)
from lightning_invariance.results.intervals import p_value, t_quantile, t_quantiles

STEP = 1e-30


def weighted_means(w, values):
    return np.tensordot(w / w.sum(), values, 1)


def tv(w, x):
    return weighted_means(w, x.var(1, ddof=1))


def column_variances(w, x):
    n = len(x)
    return n / (n - 1) * weighted_means(w, (x - weighted_means(w, x)) ** 2)


def sv(w, x):
    return column_variances(w, x).mean(0)


def average_distances(w, x):
    return weighted_means(w, np.abs(x[:, :, None] - x[:, None]).mean((1, 2)))


def of_channels(values):
    """(C, H, W) → (C,)."""
    return values.mean((1, 2))


DEFINITIONS = {
    "TV": (TransformationVariance(), tv),
    "SV": (SampleVariance(), sv),
    "NV": (NormalizedVariance(), lambda w, x: tv(w, x) / sv(w, x)),
    "NV, response": (NormalizedVariance(response=True), lambda w, x: tv(w, x) / sv(w, x)),
    "NV, mean": (
        NormalizedVariance(aggregate="mean"),
        lambda w, x: of_channels(tv(w, x)) / of_channels(sv(w, x)),
    ),
    "NV, max": (
        NormalizedVariance(aggregate="max"),
        lambda w, x: largest(tv(w, x)) / largest(sv(w, x)),
    ),
    "NV, deviations": (
        NormalizedVariance(squared=False),
        lambda w, x: weighted_means(w, x.std(1, ddof=1)) / np.sqrt(column_variances(w, x)).mean(0),
    ),
    "TV, sum": (TransformationVariance(aggregate="sum"), lambda w, x: 16 * of_channels(tv(w, x))),
    "TV, max": (TransformationVariance(aggregate="max"), lambda w, x: largest(tv(w, x))),
    "TV, deviations": (TransformationVariance(squared=False), lambda w, x: weighted_means(w, x.std(1, ddof=1))),
    "TD": (TransformationDistance(), average_distances),
    "TD, squared": (
        TransformationDistance("squared"),
        lambda w, x: 2 * (x.shape[1] - 1) / x.shape[1] * tv(w, x),
    ),
    "TD, a function": (TransformationDistance(lambda x, y: (x - y).abs()), average_distances),
    "ND, squared": (
        NormalizedDistance("squared"),
        lambda w, x: 2 * (x.shape[1] - 1) / x.shape[1] * tv(w, x) / (2 * (len(x) - 1) / len(x) * sv(w, x)),
    ),
}


def largest(values):
    """The largest of each channel: complex numbers have no order."""
    flat = values.reshape(len(values), -1)
    return flat[np.arange(len(flat)), flat.real.argmax(1)]


def leverages(x, axes=()):
    """The part of the squared deviations from column means that leaving out each sample takes away."""
    squares = ((x - x.mean(0)) ** 2).sum(1)
    squares = squares.sum(axes, keepdims=True) if axes else squares
    return len(x) / (len(x) - 1) * squares / squares.sum(0)


def influences(definition, x):
    """ψ (n, units): n times the derivative of the value by the weight of each sample."""
    n, found = len(x), []
    for i in range(n):
        w = np.full(n, 1 / n, dtype=complex)
        w[i] += 1j * STEP
        found.append(np.atleast_1d(definition(w, x)).imag.flatten() / STEP)
    return np.array(found)


def images(n, seed=0, channels=2, size=4):
    return torch.rand(n, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network():
    return nn.Sequential(nn.Identity())


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("batch_size", [8, 64])
def test_standard_errors_equal_the_definition(name, batch_size):
    measure, definition = DEFINITIONS[name]
    x, turns = images(13), rotations(8)
    result = evaluate(network(), x, turns, {"measure": measure}, batch_size=batch_size, confidence=0.95)
    st = turns(x).numpy()
    psi, n = influences(definition, st), len(x)
    if getattr(measure, "denominator", None):
        psi = psi / (1 - leverages(st, (2, 3) if measure.aggregate else ())).reshape(n, -1)
    expected = np.sqrt((psi**2).sum(0) / (n * (n - 1)))
    torch.testing.assert_close(
        result.standard_errors["measure"]["0"].flatten(), torch.from_numpy(expected), rtol=1e-9, atol=0
    )
    interval = result.interval()["0"]
    mean = psi.mean(1) - psi.mean()
    assert interval.standard_error == pytest.approx(math.sqrt((mean**2).sum() / (n * (n - 1))), rel=1e-9)
    freedom = degrees_of_freedom(mean)
    assert interval.freedom == pytest.approx(freedom, rel=1e-9)
    t = scipy.stats.t.ppf(0.975, freedom)
    centre = interval.value / (
        1 + measure.relative_bias / n
    )  # 1 / n of the pairs of a distance are of a sample with itself
    assert interval.low == pytest.approx(centre - t * interval.standard_error, rel=1e-7)
    assert interval.high == pytest.approx(centre + t * interval.standard_error, rel=1e-7)
    low, high = result.unit_interval("0")
    kurtosis = n * (psi**4).sum(0) / (psi**2).sum(0) ** 2  # about 0
    half = scipy.stats.t.ppf(0.975, np.clip(2 * n / (kurtosis - 1) - 1, 1, n - 1)) * expected
    torch.testing.assert_close((high - low).flatten() / 2, torch.from_numpy(half), rtol=1e-3, atol=0)
    torch.testing.assert_close((high + low) / 2, result["measure"]["0"] / (1 + measure.relative_bias / n))


def test_standard_errors_of_a_quotient_are_about_those_of_a_jackknife():
    """Which leaves samples out one by one, of units of which some fire for few samples."""
    x, turns = (images(60) - 0.8).clamp_min(0), rotations(4)
    result = evaluate(network(), x, turns, confidence=0.95)
    st, n = turns(x).numpy(), len(x)
    parts = np.stack([nv_of(np.delete(st, i, 0)) for i in range(n)])
    errors = np.sqrt((n - 1) / n * ((parts - parts.mean(0)) ** 2).sum(0))
    found = result.standard_errors["NormalizedVariance"]["0"].numpy()
    np.testing.assert_allclose(found, errors, rtol=0.04)
    error = math.sqrt((n - 1) / n * ((parts.reshape(n, -1).mean(1) - parts.mean()) ** 2).sum())
    assert result.interval()["0"].standard_error == pytest.approx(error, rel=0.04)


def nv_of(st):
    return st.var(1, ddof=1).mean(0) / st.var(0, ddof=1).mean(0)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e14])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e5])
@pytest.mark.parametrize("size", [4, 12])
def test_standard_errors_of_float32_at_any_scale(scale, offset, size):
    """Float32 blocks are summed in C where it holds their numbers."""
    x = ((images(30, size=size) + offset) * scale).float()
    turns = rotations(8)
    result = evaluate(network(), x, turns, of_variances(), confidence=0.95)
    st = turns(x).double().numpy()
    w = np.full(30, 1 / 30)
    rows, centred = st.var(1, ddof=1), ((st - st.mean(0)) ** 2).mean(1) * 30 / 29
    value = {"NV": tv(w, st) / sv(w, st), "SV": sv(w, st), "TV": tv(w, st)}
    psi = {
        "NV": (rows - value["NV"] * centred) / value["SV"] / (1 - leverages(st)),
        "SV": centred - value["SV"],
        "TV": rows - value["TV"],
    }
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).numpy()
    for name, expected in psi.items():
        errors = np.sqrt((expected**2).sum(0) / (30 * 29))
        torch.testing.assert_close(
            result.standard_errors[name]["0"], torch.from_numpy(errors), rtol=2e-4, atol=1e-6 * errors.max()
        )
        on_mean = expected.reshape(30, -1).mean(1)[order]
        on_mean = on_mean - on_mean.mean()
        found = result.influences[name]["0"].numpy()
        assert abs(found.mean()) <= 1e-12 * np.abs(found).max()  # they tell what samples add to a mean
        np.testing.assert_allclose(found, on_mean, rtol=1e-3, atol=1e-4 * np.abs(on_mean).max())


def of_variances():
    return {"NV": NormalizedVariance(), "SV": SampleVariance(), "TV": TransformationVariance()}


def test_units_that_are_not_finite_do_not_count_in_c():
    class Flawed(nn.Module):
        def forward(self, x):
            x = x.flatten(1).repeat(1, 5)
            return torch.cat([x, x[:, :1] * torch.nan, x[:, :1] * 0], 1)

    x = images(20, channels=1).float()
    with pytest.warns(UserWarning, match="NaN"):
        flawed = evaluate(nn.Sequential(Flawed()), x, rotations(8), confidence=0.95)
    plain = evaluate(nn.Sequential(nn.Flatten()), x, rotations(8), confidence=0.95)
    errors = flawed.standard_errors["NormalizedVariance"]["0"]
    expected = plain.standard_errors["NormalizedVariance"]["0"].repeat(5)
    torch.testing.assert_close(errors[:80], expected, rtol=1e-4, atol=0)
    assert errors[80].isnan()
    assert errors[81] == 0
    psi = plain.influences["NormalizedVariance"]["0"] * 80 / 81  # a dead unit has no influence, but counts
    torch.testing.assert_close(flawed.influences["NormalizedVariance"]["0"], psi, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("over", ["channel", "activation"])
def test_standard_errors_of_same_equivariance(normalize, over):
    """Over whole maps and over pixels, with a network whose maps do not turn with the image."""
    x, turns = images(9, size=4), quarter_turns()

    def mapped(values):
        back = turns.inverse(values).numpy()
        norms = np.sqrt((back**2).sum((3, 4), keepdims=True))
        return back / norms if normalize else back

    weights = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    class Weighted(nn.Module):
        def forward(self, x):
            return x * weights

    model = nn.Sequential(Weighted())
    maps = mapped(turns(x) * weights)
    distance = np.abs(maps[:, :, None] - maps[:, None]) if over == "activation" else None
    if distance is None:
        distance = np.sqrt(((maps[:, :, None] - maps[:, None]) ** 2).sum((4, 5)))
    of_rows = {
        "variance": maps.var(1, ddof=1) if over == "activation" else maps.var(1, ddof=1).sum((2, 3)),
        "distance": distance.mean((1, 2)),
    }
    measures = {
        "variance": VarianceSameEquivariance(normalize=normalize, over=over),
        "distance": DistanceSameEquivariance(normalize=normalize, over=over),
        "normalised": VarianceSameEquivariance(normalize=normalize, over=over, normalized_by="samples"),
        "direct": DistanceSameEquivariance(normalize=normalize, over=over, formulation="direct"),
    }
    result = evaluate(model, x, turns, measures, confidence=0.9, layers=["0"])
    for name, rows in of_rows.items():
        expected = rows.std(0, ddof=1).flatten() / math.sqrt(len(x))
        torch.testing.assert_close(
            result.standard_errors[name]["0"].flatten(), torch.from_numpy(expected), rtol=1e-9, atol=1e-15
        )

    def quotient(w, values):
        parts = tv(w, values), sv(w, values)
        return parts[0] / parts[1] if over == "activation" else parts[0].sum((1, 2)) / parts[1].sum((1, 2))

    psi = influences(quotient, maps)
    expected = np.sqrt((psi**2).sum(0) / (len(x) * (len(x) - 1)))
    torch.testing.assert_close(
        result.standard_errors["normalised"]["0"].flatten(), torch.from_numpy(expected), rtol=1e-9, atol=1e-15
    )
    assert result.standard_errors["direct"]["0"].shape == result["direct"]["0"].shape


def test_maps_whose_channels_come_last():
    """The error of a pixel stands where its value stands."""
    scale = torch.rand(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    class Scaled(nn.Module):
        """Each pixel by another factor, which does not turn with the image."""

        def __init__(self, last):
            super().__init__()
            self.last = last

        def forward(self, x):
            x = x * scale
            return x.permute(0, 2, 3, 1) if self.last else x

    x, turns = images(9, size=4, channels=3), quarter_turns()
    measure = {"SE": VarianceSameEquivariance(over="activation", normalize=False)}
    options = {"confidence": 0.9, "layers": ["0"]}
    last = evaluate(nn.Sequential(Scaled(True)), x, turns, measure, channel_axis={"0": -1}, **options)
    first = evaluate(nn.Sequential(Scaled(False)), x, turns, measure, **options)
    errors = first.standard_errors["SE"]["0"]
    assert errors.min() > 0
    torch.testing.assert_close(last.standard_errors["SE"]["0"], errors.permute(1, 2, 0), rtol=1e-12, atol=0)
    torch.testing.assert_close(last["SE"]["0"], first["SE"]["0"].permute(1, 2, 0), rtol=1e-12, atol=0)


def groups_of_sixteen(n, seed=0):
    """The groups that follow the seeded order of n samples, a multiple of 16."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).view(-1, 16)


@pytest.mark.parametrize("measure", [SampleDistance(), NormalizedDistance()])
def test_standard_errors_of_sample_distances_are_over_groups(measure):
    x, turns = images(96), rotations(4)
    result = evaluate(network(), x, turns, [measure], confidence=0.95)
    groups = turns(x).numpy()[groups_of_sixteen(96)]
    within_rows = np.abs(groups[:, :, :, None] - groups[:, :, None]).mean((2, 3)).sum(1)
    within_columns = np.abs(groups[:, :, None] - groups[:, None]).sum((1, 2, 3))

    def value(w, both):
        rows, columns = both[:, 0] * len(both), both[:, 1] * len(both)
        sample_distance = weighted_means(w, columns) / (6 * 16 * 15 * 4) * 95 / 96
        if isinstance(measure, SampleDistance):
            return sample_distance
        return weighted_means(w, rows) / 96 / sample_distance

    psi = influences(value, np.stack([within_rows, within_columns], 1))
    name, count = type(measure).__name__, len(psi)
    expected = np.sqrt((psi**2).sum(0) / (count * (count - 1)))
    torch.testing.assert_close(
        result.standard_errors[name]["0"].flatten(), torch.from_numpy(expected), rtol=1e-9, atol=0
    )
    assert len(result.sample_keys[name]) == count
    assert "6 groups of samples" in result.interval(name)["0"].doubt


def several():
    return {
        "NV": NormalizedVariance(),
        "TV": TransformationVariance(),
        "TD": TransformationDistance(),
        "ND": NormalizedDistance(),
        "agreement": Consistency(),
        "SE": VarianceSameEquivariance(),
        "channels": ChannelEquivariance(),
        "correlation": EquivarianceCorrelation(),
        "effective": EffectiveInvariance(),
        "whole layer": NormalizedDistance("euclidean", over="layer"),
    }


def evaluated(batch_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)).double()
    return evaluate(model, images(48), rotations(4), several(), batch_size=batch_size, confidence=0.95)


def of_ranks(batch_size):
    result = evaluated(batch_size)
    return {
        **{f"influences {m} {k}": v for m, layers in result.influences.items() for k, v in layers.items()},
        **{f"errors {m} {k}": v for m, layers in result.standard_errors.items() for k, v in layers.items()},
        **{f"keys {m}": v for m, v in result.sample_keys.items()},
    }


def test_influences_do_not_depend_on_batches():
    alone = of_ranks(64)
    for other in (of_ranks(4), of_ranks(20)):
        assert other.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-13)


def test_processes_find_the_influences_of_one(ranks):
    alone = of_ranks(64)
    for found in ranks(of_ranks, 64):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-13)


def test_the_file_and_the_reduced_result_keep_the_intervals(tmp_path):
    result = evaluated(64)
    result.save(tmp_path / "result.npz")
    loaded = InvarianceResult.load(tmp_path / "result.npz")
    for name in several():
        assert loaded.interval(name) == result.interval(name)
        assert result.reduced().interval(name) == result.interval(name)
        assert loaded.interval(name).network == result.interval(name).network
        assert str(loaded.table(name)) == str(result.table(name)) == str(result.reduced().table(name))
        torch.testing.assert_close(loaded.unit_interval("0", name), result.unit_interval("0", name))
    assert loaded.confidence == 0.95
    assert "low" in str(result.table())


def test_the_interval_of_the_network():
    result = evaluated(64)
    layers = result.influences["NV"]
    psi = torch.stack(list(layers.values())).mean(0)
    interval = result.interval("NV").network
    assert interval.value == result.mean("NV")
    assert interval.standard_error == pytest.approx(float(psi.std()) / math.sqrt(48), rel=1e-6)


def test_a_layer_that_some_samples_do_not_reach():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.rarely = nn.Identity(), nn.Identity()

        def forward(self, x):
            bright = x.mean((1, 2, 3)) > 0.5
            if bright.all():
                self.rarely(x)
            return self.always(x)

    x = torch.cat([images(12) / 10, images(12) / 10 + 0.9])
    with pytest.warns(UserWarning, match="reached by some"):
        result = evaluate(Sometimes(), x, quarter_turns(), batch_size=4, confidence=0.95)
    psi = result.influences["NormalizedVariance"]["rarely"]
    assert int(psi.isnan().sum()) == 12
    alone = evaluate(network(), x[12:], quarter_turns(), confidence=0.95)
    assert result.interval()["rarely"].standard_error == pytest.approx(alone.interval()["0"].standard_error, rel=1e-9)


def test_quantiles_of_many_units_equal_students_t():
    freedom = torch.tensor([1, 1.5, 2.7, 12.3, 100.7, 255, 256, 257, 300, 1023, 1e4, 1e9], dtype=torch.float64)
    for level in (0.5, 0.95, 0.999):
        expected = scipy.stats.t.ppf((1 + level) / 2, freedom.numpy())
        np.testing.assert_allclose(t_quantiles(level, freedom).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("level", "freedom"), [*itertools.product([0.5, 0.9, 0.95, 0.999], [1, 2.5, 12, 250.3, 1e5])])
def test_students_t(level, freedom):
    t = t_quantile(level, freedom)
    assert t == pytest.approx(scipy.stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)
    for other in (0.0, 0.1, t, 5.0, 40.0):
        assert p_value(other, 1.0, freedom) == pytest.approx(2 * scipy.stats.t.sf(other, freedom), rel=1e-9, abs=1e-300)
