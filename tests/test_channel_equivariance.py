"""Channels that transformations permute or mix: known networks, the definition on a stored cube, orbits, errors."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from lightning_invariance import (
    InvarianceResult,
    TransformationSet,
    compare,
    evaluate,
    flips,
    quarter_turns,
    rotations,
    translations,
)
from lightning_invariance.accumulators.channel_moments import fold_of
from lightning_invariance.measures import ChannelEquivariance, EffectiveInvariance, EquivarianceCorrelation, Stratified
from lightning_invariance.testing import assert_equivariant

ALL = {how: ChannelEquivariance(channels=how) for how in ("identity", "permutation", "linear")}


def images(n=48, size=24, dtype=torch.float32):
    noise = torch.randn(n, 1, size + 4, size + 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return nn.functional.avg_pool2d(noise, 5, 1)


def layer_of(filters, dtype=torch.float32):
    model = nn.Sequential(nn.Conv2d(1, len(filters), filters.shape[-1], padding="same", bias=False), nn.ReLU())
    model[0].weight.data = filters
    return model.to(dtype)


def filters(n, size=5, seed=1):
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


def turned(n):
    """Copies of n filters under quarter turns, in a random order of channels."""
    every = torch.cat([torch.rot90(filters(n), turns, (2, 3)) for turns in range(4)])
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(2))]


def test_turned_copies_are_orbits_of_four():
    result = evaluate(layer_of(turned(4)), images(), quarter_turns(), ALL)
    assert result.per_layer("permutation")["1"] == pytest.approx(1, abs=1e-9)
    assert result.per_layer("identity")["1"] < 0
    orbits, maps = result.orbits("1"), result.channel_maps["1"]
    assert [len(orbit.channels) for orbit in orbits] == [4] * 4
    weights = turned(4)
    for orbit in orbits:  # the copies of one filter
        first = weights[orbit.channels[0]]
        assert all(
            any(torch.equal(weights[c], torch.rot90(first, k, (1, 2))) for k in range(4)) for c in orbit.channels
        )
    for j in range(4):  # where a filter goes, there is its turned copy
        torch.testing.assert_close(weights[maps[j]], torch.rot90(weights, j, (2, 3)))
    assert float(result.details["permutation"]["1"]["closure"]) == 1
    assert "4 orbits: 4 of size 4" in str(orbits)


def test_random_filters_have_no_orbits_but_a_linear_map():
    both = [evaluate(layer_of(filters(16, seed=seed)), images(), quarter_turns(), ALL) for seed in (3, 4)]
    for result in both:  # the second is the control: another network that learned nothing
        assert result.per_layer("permutation")["1"] < 0.1
        assert result.per_layer("linear")["0"] > 0.8
        assert not result.orbits("1")
        assert -1.3 < float(result.details["permutation"]["1"]["shuffled"]) < -0.9


def test_a_channel_that_explains_another_one_badly_joins_no_orbit():
    maps = torch.tensor([[0, 1, 2], [1, 0, 2], [0, 2, 1]])
    scores = torch.tensor([[1.0, 1.0, 1.0], [0.9, 0.9, 0.9], [0.9, 0.2, 0.2]], dtype=torch.float64)
    result = InvarianceResult(
        {"it": {"a": scores[1:].mean(0)}},
        transformations=["0°", "90°", "180°"],
        identity="0°",
        details={"it": {"a": {"channel_map": maps, "scores": scores}}},
    )
    assert [orbit.channels for orbit in result.orbits("a")] == [(0, 1), (2,)]
    assert [orbit.score for orbit in result.orbits("a")] == pytest.approx([0.725, 0.55])
    assert [orbit.channels for orbit in result.orbits("a", least=0.1)] == [(0, 1, 2)]


def test_isotropic_filters_stay_where_they_are():
    isotropic = sum(torch.rot90(filters(6), turns, (2, 3)) for turns in range(4))
    result = evaluate(layer_of(isotropic), images(), quarter_turns(), ALL)
    for how in ("identity", "permutation"):
        assert result.per_layer(how)["1"] == pytest.approx(1, abs=1e-9)
    assert result.per_layer("linear")["1"] > 0.99
    assert [orbit.channels for orbit in result.orbits("1")] == [(c,) for c in range(6)]


def test_mirrored_pairs_are_orbits_of_two():
    up_down = filters(3) + filters(3).flip(-2)  # a vertical flip does not change them
    result = evaluate(layer_of(torch.cat([up_down, up_down.flip(-1)])), images(), flips(), ALL)
    assert [orbit.channels for orbit in result.orbits("1")] == [(0, 3), (1, 4), (2, 5)]
    assert result.channel_maps["1"].tolist() == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2]] * 2


@pytest.mark.parametrize("channels", [16, 64, 512])
def test_the_permutation_is_recovered_in_float32(channels):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, channels, 3, 3, generator=generator) * 2 + 30
    goes = torch.stack([torch.arange(channels), *(torch.randperm(channels, generator=generator) for _ in range(3))])
    st = torch.empty(64, 4, channels, 3, 3)
    turns = quarter_turns()
    for j in range(4):
        moved = torch.empty_like(base)
        moved[:, goes[j]] = base
        st[:, j] = turns[j].of_maps(moved)
    measure = ChannelEquivariance(turns)
    for rows in (slice(0, 24), slice(24, 64)):
        measure.update(st[rows])
    assert torch.equal(measure.details(measure.sums())["channel_map"], goes)
    torch.testing.assert_close(measure.compute(), torch.ones(channels, dtype=torch.float64), rtol=0, atol=1e-9)


def cube(n=14, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    samples = torch.randn(n, 1, 4, 7, 7, generator=generator, dtype=dtype)
    return samples + 0.4 * torch.randn(n, 6, 4, 7, 7, generator=generator, dtype=dtype) + 3


def by_definition(st, turns, how, ridge=1e-3):
    """R² of all samples, each half scored with what the other half found: (transformations, channels)."""
    white = torch.ones(1, 1, *st.shape[3:], dtype=torch.float64)
    inside = (turns.inverse(turns.of_maps(white)) > 1 - 1e-4)[0, :, 0].all(0).numpy()
    b = turns.inverse(st).numpy()[..., inside]
    a, (n, m, channels, _) = b[:, 0], b.shape
    residuals = np.zeros((m, channels))
    folds = fold_of(torch.arange(n)).numpy()
    for half in (0, 1):
        train, test = folds != half, folds == half
        for j in range(m):
            target = b[test, j]
            if how == "linear":
                x, y = (each[train].transpose(1, 0, 2).reshape(channels, -1) for each in (a, b[:, j]))
                mean_x, mean_y = x.mean(1, keepdims=True), y.mean(1, keepdims=True)
                gram = (x - mean_x) @ (x - mean_x).T
                weights = np.linalg.solve(
                    gram + ridge * np.trace(gram) / channels * np.eye(channels), (x - mean_x) @ (y - mean_y).T
                ).T
                found = np.einsum("ck,nkp->ncp", weights, a[test] - mean_x) + mean_y
            else:
                source = np.arange(channels)
                if how == "permutation":
                    costs = ((b[train, j][:, :, None] - a[train][:, None]) ** 2).sum((0, 3))
                    totals = ((b[:, j] - b[:, j].mean(0)) ** 2).sum((0, 2))
                    source = linear_sum_assignment(costs / totals[:, None])[1]
                found = a[test][:, source]
            residuals[j] += ((target - found) ** 2).sum((0, 2))
    return torch.from_numpy(1 - residuals / ((b - b.mean(0)) ** 2).sum((0, 3)))


@pytest.mark.parametrize("how", ALL)
def test_any_split_and_merge_gives_the_definition(how):
    turns, st, numbers = rotations(6), cube(), torch.arange(14)
    expected = by_definition(st, turns, how)
    whole, parts = ChannelEquivariance(turns, how), [ChannelEquivariance(turns, how) for _ in range(3)]
    whole.update(st, numbers)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    for part, places in zip(parts, order.split([1, 9, 4]), strict=True):
        for some in places.split(3):
            part.update(st[some], numbers[some])
    for other in parts[1:]:
        parts[0].merge_state(other)
    for measure in (whole, parts[0]):
        torch.testing.assert_close(measure.scores(measure.sums())[1:], expected[1:], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(measure.compute(), expected[1:].mean(0), rtol=1e-9, atol=1e-9)


def test_the_control_is_the_mean_over_all_pairs_of_different_samples():
    turns, st = quarter_turns(), cube()[:, :4]
    measure = ChannelEquivariance(turns, "identity")
    measure.update(st)
    back = turns.inverse(st)
    residuals = sum((back[i] - back[k, 0]).square().sum((2, 3)) for i in range(14) for k in range(14) if i != k) / 13
    expected = 1 - residuals / (back - back.mean(0)).square().sum((0, 3, 4))
    found = measure.details(measure.sums())["shuffled"]
    torch.testing.assert_close(found, expected[1:].mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("measure", [ChannelEquivariance(), ChannelEquivariance(channels="identity")])
def test_intervals_are_those_of_leaving_samples_out(measure):
    """Samples are left out with the assignments and the halves of all samples, which no single sample changes."""
    x, turns = images(40, 12, torch.float64), rotations(6)
    model = layer_of(turned(2), torch.float64)
    result = evaluate(model, x, turns, {"it": measure}, confidence=0.95)
    back = turns.inverse(torch.stack([model(column) for column in turns(x).unbind(1)], 1).detach())
    white = torch.ones(1, 1, 12, 12, dtype=torch.float64)
    back = back[..., (turns.inverse(turns.of_maps(white)) > 1 - 1e-4)[0, :, 0].all(0)]
    sources, folds = torch.arange(8).expand(2, 6, 8), fold_of(torch.arange(40))
    if measure.channels == "permutation":
        halves = [ChannelEquivariance(turns), ChannelEquivariance(turns)]
        st = torch.stack([model(column) for column in turns(x).unbind(1)], 1).detach()
        for half, other in zip(halves, (1, 0), strict=True):  # what the other half finds, from all of its samples twice
            half.update(st[folds == other].repeat_interleave(2, 0), torch.arange(40))
        sources = torch.stack([half.details(half.sums())["channel_map"].argsort(1) for half in halves])
    residuals = torch.stack(
        [
            torch.stack([(b[j] - b[0, sources[folds[i], j]]).square().sum(1) for j in range(6)])
            for i, b in enumerate(back)
        ]
    )

    def value(kept):
        total = (back[kept] - back[kept].mean(0)).square().sum((0, 3))
        return (1 - residuals[kept].sum(0) / total)[1:].mean(0)

    left_out = torch.stack([value([k for k in range(40) if k != i]) for i in range(40)])
    error = (39 / 40 * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    torch.testing.assert_close(result["it"]["1"], value([*range(40)]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.standard_errors["it"]["1"], error, rtol=0.1, atol=0)


def test_layers_without_positions_are_measured_and_wide_ones_named():
    model = nn.Sequential(*layer_of(turned(2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 20))
    with pytest.warns(UserWarning, match=r"leaves out 1 layer: 4 \(20 channels are more than `max_channels=8`\)"):
        result = evaluate(model, images(), quarter_turns(), ChannelEquivariance(max_channels=8))
    assert result.per_layer()["2"] == pytest.approx(1, abs=1e-6)
    assert result.skipped == {"ChannelEquivariance": ["4"]}
    both = evaluate(model, images(), quarter_turns(), ALL)
    assert both.per_layer("linear")["4"] > 0.9


def test_a_result_keeps_maps_and_orbits(tmp_path):
    model = layer_of(turned(2))
    result = evaluate(model, images(), quarter_turns(), ChannelEquivariance(), confidence=0.95)
    result.save(tmp_path / "result.npz")
    loaded = InvarianceResult.load(tmp_path / "result.npz")
    assert loaded.orbits("1") == result.orbits("1")
    assert torch.equal(loaded.channel_maps["1"], result.channel_maps["1"])
    assert result.response["ChannelEquivariance"]["1"][0] == 0
    assert result.quality("ChannelEquivariance") == "equivariant"
    random = evaluate(layer_of(filters(8)), images(), quarter_turns(), ChannelEquivariance(), confidence=0.95)
    assert "more" in compare(result, random, names=("turned", "random")).verdict
    with pytest.raises(KeyError, match="No channel maps of layer 'x'"):
        result.orbits("x")
    plain = evaluate(model, images(), quarter_turns())
    with pytest.raises(ValueError, match=r'ChannelEquivariance\(channels="permutation"\)'):
        plain.orbits("1")


def test_dead_and_constant_channels_are_nan():
    model = layer_of(torch.cat([turned(1), torch.zeros(1, 1, 5, 5)]))
    with pytest.warns(UserWarning, match="NaN"):
        result = evaluate(model, images(), quarter_turns(), ChannelEquivariance())
    assert result["ChannelEquivariance"]["1"].isnan().tolist() == [False] * 4 + [True]
    assert result.dead["1"].flatten(1).all(1).tolist() == [False] * 4 + [True]
    assert result.orbits("1")[0].channels == (0, 1, 2, 3)


def test_halves_are_random_and_balanced_and_one_without_samples_is_nan():
    folds = fold_of(torch.arange(1000))
    assert int(folds.sum()) == 500
    assert 200 < int(folds[::2].sum()) < 300  # also of every other sample, as of one of two classes
    measure = ChannelEquivariance(quarter_turns())
    measure.update(cube()[:, :4], (folds == 0).nonzero().flatten()[:14])
    assert measure.compute().isnan().all()
    data = torch.utils.data.TensorDataset(images(), torch.arange(48) % 6)
    result = evaluate(layer_of(turned(2)), data, quarter_turns(), Stratified(ChannelEquivariance(), 6))
    with pytest.warns(UserWarning, match="Stratified leaves out 2 layers"):
        wide = evaluate(layer_of(turned(2)), data, quarter_turns(), Stratified(ChannelEquivariance(max_channels=7), 6))
    assert wide.skipped == {"Stratified": ["0", "1"]}
    classes = result.by_class["Stratified"]["1"]
    torch.testing.assert_close(classes[classes.isfinite()], torch.ones_like(classes[classes.isfinite()]))


@pytest.mark.parametrize("value", [0.1, 0.125])
def test_a_constant_channel_is_nan_in_float64_and_leaves_the_others_alone(value):
    model = layer_of(torch.cat([turned(1), torch.zeros(1, 1, 5, 5)]), torch.float64)
    model[0].bias = nn.Parameter(torch.tensor([0.0] * 4 + [value], dtype=torch.float64))
    measures = [ChannelEquivariance(), EquivarianceCorrelation()]
    with pytest.warns(UserWarning, match="NaN"):
        result = evaluate(model, images(dtype=torch.float64), rotations(8), measures)
    alone = evaluate(layer_of(turned(1), torch.float64), images(dtype=torch.float64), rotations(8), measures)
    for name in alone:
        torch.testing.assert_close(result[name]["1"][:4], alone[name]["1"], rtol=1e-9, atol=1e-9)
        assert result[name]["1"][4].isnan()
        only = evaluate(model, images(dtype=torch.float64), quarter_turns(), {name: measures[[*alone].index(name)]})
        assert only.dead_channels("1").tolist() == [False] * 4 + [True]


def test_a_channel_that_is_nan_makes_its_layer_undefined():
    st = cube()[:, :4]
    st[:, :, 0] = torch.nan
    for how, undefined in (
        ("identity", [True, False, False, False]),
        ("permutation", [True] * 4),
        ("linear", [True] * 4),
    ):
        measure = ChannelEquivariance(quarter_turns(), how)
        measure.update(st)
        assert measure.compute().isnan().tolist() == undefined


def test_assertions():
    assert_equivariant(layer_of(turned(2)), images(), quarter_turns(), within=1e-6, channels="permutation")
    with pytest.raises(AssertionError, match="ChannelEquivariance above 0.9 with 95% confidence"):
        assert_equivariant(layer_of(filters(8)), images(), quarter_turns(), within=0.1, channels="permutation")
    with pytest.raises(ValueError, match="one of the arguments `measure` and `channels`"):
        assert_equivariant(
            layer_of(filters(8)), images(), flips(), within=0.1, channels="identity", measure=EquivarianceCorrelation()
        )


def test_positive_maps_do_not_look_alike_to_a_correlation():
    positive = layer_of(filters(8)).append(nn.Softplus())
    result = evaluate(positive, images(), quarter_turns(), EquivarianceCorrelation())
    assert result.per_layer()["2"] < 0.5
    assert result.floor["EquivarianceCorrelation"].item() == pytest.approx(1)


@pytest.mark.parametrize("measure", [ChannelEquivariance, EquivarianceCorrelation, EffectiveInvariance])
def test_sets_without_what_is_needed(measure):
    with pytest.raises(ValueError, match="to include the identity"):
        evaluate(layer_of(filters(2)), images(), translations(), measure())
    if measure is not EffectiveInvariance:
        with pytest.raises(ValueError, match="to have inverses"):
            measure(TransformationSet.from_callables({"a": torch.clone, "b": torch.neg}, identity="a"))


def test_bad_arguments():
    for arguments, message in (
        ({"channels": "mixed"}, "`channels` to be one of"),
        ({"ridge": 0}, "`ridge` to be above 0"),
        ({"ridge": "a"}, "`ridge` to be above 0"),
        ({"mask": -1}, "`mask`"),
        ({"max_channels": 0}, "`max_channels`"),
    ):
        with pytest.raises(ValueError, match=message):
            ChannelEquivariance(**arguments)
    with pytest.raises(ValueError, match=r"\(samples, transformations, channels, height, width\)"):
        ChannelEquivariance(quarter_turns()).update(torch.rand(4, 4, 3, 3))
    few = ChannelEquivariance(quarter_turns())
    few.update(torch.rand(3, 4, 2, 4, 4))
    with pytest.warns(UserWarning, match="at least 4 samples"):
        assert few.compute().isnan().all()
