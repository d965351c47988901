"""Comparisons of two evaluations, against the same tests by scipy and statsmodels."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from definitions import degrees_of_freedom
from matplotlib.patches import Rectangle
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired
from torch import nn

from lightning_invariance import (
    InvarianceResult,
    TransformationSet,
    compare,
    evaluate,
    quarter_turns,
    rotations,
)
from lightning_invariance.measures import (
    Consistency,
    NormalizedVariance,
    SampleDistance,
    TransformationDistance,
    TransformationVariance,
)

TV = [TransformationVariance()]


def images(n, seed=0):
    return torch.rand(n, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Scaled(nn.Module):
    """A pixel sum that a quarter turn changes, times a number; and its square."""

    def __init__(self, scale, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(depth))
        self.scale = scale

    def forward(self, x):
        weights = torch.arange(16, dtype=x.dtype)
        x = x.flatten(1) @ weights[:, None] * self.scale
        for layer in self.layers:
            x = layer(x) ** 2
        return x


def spreads(scale, x):
    """The transformation variance of each sample in the two layers: (n, 2)."""
    sums = quarter_turns()(x).flatten(2) @ torch.arange(16, dtype=x.dtype) * scale
    return torch.stack([sums.var(1), (sums**2).var(1)], 1).numpy()


def result_of(scale, x, measures=TV, confidence=0.95, depth=2, turns=None):
    return evaluate(Scaled(scale, depth), x, turns or quarter_turns(), measures, confidence=confidence)


def test_paired_comparison_of_means_is_the_paired_t_test():
    x = images(60)
    a, b = result_of(1.0, x), result_of(1.05, x.roll(7, 0))  # the same samples in another order
    found = compare(a, b)
    assert found.unit == "the same samples"
    one, other = spreads(1.0, x), spreads(1.05, x)
    raw = []
    for i, row in enumerate(found.rows):
        difference = other[:, i] - one[:, i]
        error = difference.std(ddof=1) / math.sqrt(60)
        assert row.difference == pytest.approx(difference.mean(), rel=1e-9)
        # Student's t, with the degrees of freedom that the kurtosis of the differences leaves.
        freedom = degrees_of_freedom(difference)
        low, high = scipy.stats.t.interval(0.95, freedom, difference.mean(), error)
        assert (row.low, row.high) == pytest.approx((low, high), rel=1e-9)
        raw.append(2 * scipy.stats.t.sf(abs(difference.mean()) / error, freedom))
    adjusted = multipletests(raw, method="holm")[1]
    assert [row.p for row in found.rows] == pytest.approx(adjusted.tolist(), rel=1e-6)
    network = (other - one).mean(1)
    assert found.network.difference == pytest.approx(network.mean(), rel=1e-9)
    assert (found.network.high - found.network.low) / 2 == pytest.approx(
        network.std(ddof=1) / math.sqrt(60) * scipy.stats.t.ppf(0.975, degrees_of_freedom(network)), rel=1e-9
    )
    assert found.differing == ["layers.0", "layers.1"]
    assert found["layers.1"] is found.rows[1]


def test_other_samples_are_compared_unpaired():
    x, y = images(50), images(70, seed=1)
    found = compare(result_of(1.0, x), result_of(1.3, y))
    assert found.unit == "different samples"
    assert "unpaired" in str(found)
    one, other = spreads(1.0, x)[:, 0], spreads(1.3, y)[:, 0]
    squares = [v.var(ddof=1) / len(v) for v in (one, other)]
    freedom = sum(squares) ** 2 / sum(s**2 / degrees_of_freedom(v) for s, v in zip(squares, (one, other), strict=True))
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(squares))
    row = found["layers.0"]
    assert (row.high - row.low) / 2 == pytest.approx(half, rel=1e-9)
    assert row.difference == pytest.approx(other.mean() - one.mean(), rel=1e-9)


@pytest.mark.parametrize("batch_size", [64, 3])  # a row in one block, and in parts
def test_samples_are_the_same_wherever_in_a_network_they_are_transformed(batch_size):
    def found(seed, order):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3)).double()
        return evaluate(
            *(model, images(12).roll(order, 0), quarter_turns(), TV),
            transform_at="1",
            batch_size=batch_size,
            confidence=0.95,
        )

    assert compare(found(0, 0), found(1, 7)).unit == "the same samples"
    other = result_of(1.0, images(12))
    with pytest.raises(ValueError, match="with layers of one type, but they have none"):
        compare(found(0, 0), other, align="depth")
    other.layer_types = dict.fromkeys(other.layers, "ReLU")
    assert compare(found(0, 0), other, align="depth").unit == "the same samples"


@pytest.mark.parametrize("measure", [NormalizedVariance(), TransformationVariance(), Consistency()])
def test_rounding_is_no_difference(measure):
    x = images(64).float()
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
        a, b, c = (
            evaluate(model, data, quarter_turns(), measure, confidence=0.95, batch_size=size)
            for data, size in ((x, 64), (x.flip(0), 64), (x.double().float(), 24))
        )
        for other in (b, c):
            found = compare(a, other, margin=0.01)
            assert found.unit == "the same samples"
            assert found.differing == []
            assert found.network.p > 0.9
            assert found.equivalent == found.not_worse == [*found]


def test_samples_of_another_type_are_the_same():
    x = images(20).float()
    assert compare(result_of(1.0, x.double()), result_of(1.1, x)).unit == "the same samples"


class Routed(nn.Module):
    """A layer that a range of samples reaches, by their first pixel."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high
        self.expert, self.out = nn.Flatten(), nn.Identity()

    def forward(self, x):
        if bool((x[:, 0, 0, 0] >= self.low).all() and (x[:, 0, 0, 0] < self.high).all()):
            self.expert(x[:, 1:])
        return self.out(x[:, 1:].flatten(1))


SHRUNK = TransformationSet.from_callables(
    {str(s): lambda x, s=s: torch.cat([x[:, :1], s * x[:, 1:]], 1) for s in (1, 0.8, 0.5)}, identity="1"
)


@pytest.mark.filterwarnings("ignore:1 layer is reached:UserWarning")
def test_a_layer_that_other_samples_reach_of_each_network():
    """Σ over all samples, of which some count for one of the two alone."""
    n, generator = 80, torch.Generator().manual_seed(0)
    first = torch.rand(n, 1, 1, 1, generator=generator, dtype=torch.float64).expand(n, 1, 2, 2)
    x = torch.cat([first, torch.randn(n, 2, 2, 2, generator=generator, dtype=torch.float64)], 1)
    a, b = (evaluate(Routed(*ends), x, SHRUNK, TV, batch_size=3, confidence=0.95) for ends in ((0.0, 0.6), (0.1, 0.7)))
    u = first[:, 0, 0, 0].numpy()
    in_a, in_b = u < 0.6, (u >= 0.1) & (u < 0.7)
    spread = SHRUNK(x)[:, :, 1:].flatten(2).var(1).mean(1).numpy()
    psi = n * in_b / in_b.sum() * (spread - spread[in_b].mean()) - n * in_a / in_a.sum() * (
        spread - spread[in_a].mean()
    )
    error = math.sqrt((psi**2).sum() / (n * (n - 1)))
    t = scipy.stats.t.ppf(0.975, degrees_of_freedom(psi))
    row = compare(a, b)["expert"]
    assert row.difference == pytest.approx(spread[in_b].mean() - spread[in_a].mean(), rel=1e-9)
    assert row.high - row.difference == pytest.approx(t * error, rel=1e-9)
    deep = compare(a, b, align="depth")["expert"]
    assert (deep.low, deep.high) == pytest.approx((row.low, row.high), rel=1e-9)


def test_layers_of_one_name_and_two_shapes_are_doubted():
    x = images(20).float()
    models = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(1, 3, 3), nn.AvgPool2d(2))
    found = compare(*(evaluate(model, x, quarter_turns(), TV, confidence=0.95) for model in models))
    assert "shapes" not in found["0"].doubt
    assert found["1"].doubt == "shapes (3, 2, 2), (3, 1, 1)"


def test_groups_of_the_same_samples_in_another_order():
    x = images(64)
    a, b, c = (result_of(1.0, data, [SampleDistance()]) for data in (x, x.flip(0), images(64, seed=1)))
    found = compare(a, b)
    assert found.unit == "other groups of the same samples"
    assert found.count == (4, 4)
    assert compare(a, a).unit == "the same samples"
    assert compare(a, c).unit == "different samples"


def test_seeds_of_which_one_lacks_a_layer():
    x = images(20)
    a, b = (
        [result_of(s, x, depth=d, confidence=None) for s, d in some]
        for some in [((1, 2), (1.1, 1)), ((2, 2), (2.2, 2))]
    )
    found = compare(a, b)
    assert [*found] == ["layers.0"]
    assert found.unmatched == ["layers.1"]


def by_hand(values):
    """A result of one layer with one given value for each sample."""
    psi = torch.from_numpy(values - values.mean())
    return InvarianceResult(
        {"M": {"layer": torch.tensor([values.mean()])}},
        n_samples=len(values),
        confidence=0.95,
        influences={"M": {"layer": psi}},
        sample_keys={"M": torch.arange(len(values))},
        higher_is_better={"M": False},
    )


@pytest.mark.parametrize("margin", [0.01, 0.1, 0.3])
def test_equivalence_equals_statsmodels(margin):
    """Uniform differences have a kurtosis below 3, and so the textbook's n − 1 degrees of freedom."""
    one = np.random.default_rng(0).uniform(size=200)
    other = one + np.random.default_rng(1).uniform(-0.5, 0.6, 200)
    row = compare(by_hand(one), by_hand(other), margin=margin)["layer"]
    either, (_, above, _), _ = ttost_paired(other, one, -margin, margin)
    assert (row.equivalent, row.not_worse) == pytest.approx((either, above), rel=1e-9)
    assert row.p == pytest.approx(scipy.stats.ttest_rel(other, one).pvalue, rel=1e-9)


def test_doubts_of_either_result_are_reported():
    x = images(30)
    few = compare(result_of(1.0, x[:6]), result_of(1.0, x[:6]))["layers.0"]
    assert "6 samples" in few.doubt
    a, b = result_of(1.0, x), result_of(1.0, x)
    assert compare(a, b)["layers.0"].doubt == a.interval()["layers.0"].doubt
    b.sparse = {"TransformationVariance": {"layers.0": 0.6}}
    assert "60% of the units respond to few samples or none" in compare(a, b)["layers.0"].doubt


def test_not_worse_and_equivalent_layers():
    x = images(100)
    a, b = result_of(1.0, x, depth=1), result_of(1.05, x, depth=1)
    size = a.per_layer()["layers.0"]
    wide = compare(a, b, margin=size)
    assert wide.equivalent == wide.not_worse == ["layers.0"]
    narrow = compare(a, b, margin=size / 100)  # a is more invariant, by more than the margin
    assert narrow.equivalent == []
    assert narrow.not_worse == ["layers.0"]
    assert compare(b, a, margin=size / 100).not_worse == []
    assert "equivalent" in str(wide)


def test_seeds_are_compared_by_welch():
    x = images(20)
    scales = [1.0, 1.1, 0.95], [1.2, 1.35, 1.15, 1.3]
    a, b = ([result_of(s, x, depth=1, confidence=None) for s in some] for some in scales)
    found = compare(a, b)
    values = [[result.per_layer()["layers.0"] for result in some] for some in (a, b)]
    expected = scipy.stats.ttest_ind(values[1], values[0], equal_var=False)
    row = found["layers.0"]
    assert row.p == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.95)
    assert (row.low, row.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.unit == "seeds"
    assert found.count == (3, 4)
    assert "seeds" in str(found)


def test_layers_meet_by_depth():
    x = images(40)
    a, b = result_of(1.0, x, depth=2), result_of(0.5, x, depth=3)
    found = compare(a, b)
    assert found.unmatched == ["layers.2"]
    assert len(compare(b, a)) == 2
    deep = compare(b, a, align="depth")  # the middle one of three lies half way between two
    assert [*deep] == ["layers.0", "layers.1", "layers.2"]
    means = list(a.per_layer().values())
    assert deep["layers.1"].b == pytest.approx(sum(means) / 2)
    assert deep["layers.2"].b == pytest.approx(means[1])
    one, other = spreads(0.5, x)[:, 1], spreads(1.0, x).mean(1)
    error = (other - one).std(ddof=1) / math.sqrt(40)
    t = scipy.stats.t.ppf(0.975, degrees_of_freedom(other - one))
    assert (deep["layers.1"].high - deep["layers.1"].low) / 2 == pytest.approx(t * error, rel=1e-9)


def test_a_network_is_no_different_from_itself(tmp_path):
    x = images(30)
    a = result_of(1.0, x, [NormalizedVariance()])
    a.save(tmp_path / "a.npz")
    found = compare(tmp_path / "a.npz", str(tmp_path / "a.npz"), margin=0.1)
    assert [row.difference for row in found.rows] == [0, 0]
    assert [row.p for row in found.rows] == [1, 1]
    assert found.equivalent == ["layers.0", "layers.1"]
    assert found.differing == []


def test_the_table_and_the_frame():
    pandas = pytest.importorskip("pandas")
    x = images(30)
    found = compare(result_of(1.0, x), result_of(2.0, x))
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["layer"].tolist() == ["layers.0", "layers.1", "network"]
    assert " *" in str(found)


def test_the_picture_has_a_bar_and_an_interval_for_each_layer():
    x = images(30)
    a, b = result_of(1.0, x), result_of(1.2, x)
    found = compare(a, b, margin=1.0)
    axes = found.plot().axes[0]
    heights = sorted(
        patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_width() < 1
    )
    assert heights == pytest.approx(sorted(row.difference for row in found.rows))
    segments = axes.collections[0].get_segments()
    assert [(s[0][1], s[1][1]) for s in segments] == [pytest.approx((r.low, r.high)) for r in found.rows]


@pytest.mark.parametrize(
    ("one", "other", "units"),
    [
        (TransformationVariance(), TransformationVariance(squared=False), "activation² and of activation"),
        (SampleDistance(), SampleDistance("squared"), "activation and of activation²"),
        (TransformationDistance("cosine", over="channel"), TransformationDistance(), "no unit and of activation"),
    ],
)
def test_values_in_other_units_do_not_compare(one, other, units):
    network = nn.Conv2d(1, 2, 3, dtype=torch.float64)
    a, b = (evaluate(network, images(20), quarter_turns(), [m], confidence=0.95) for m in (one, other))
    with pytest.raises(ValueError, match=f"same arguments, .* in units of {units}"):
        compare(a, b)


def test_results_that_do_not_compare_are_refused():
    x = images(20)
    a = result_of(1.0, x)
    without = result_of(1.0, x, confidence=None)
    with pytest.raises(ValueError, match="influences"):
        compare(a, without)
    with pytest.raises(ValueError, match="same transformations"):
        compare(a, result_of(1.0, x, turns=rotations(6)))
    gray, white = (result_of(1.0, x, turns=rotations(4, fill=fill)) for fill in (0.5, 1.0))
    for other in (a, white):
        with pytest.raises(ValueError, match="same transformations, but got other parameters: angle .*, fill"):
            compare(gray, other)
    with pytest.raises(ValueError, match="Expected results of NormalizedVariance"):
        compare(a, a, "NormalizedVariance")
    with pytest.raises(ValueError, match="several of each"):
        compare([a, a], a)
    with pytest.raises(ValueError, match="margin"):
        compare(a, a, margin=-1)
    with pytest.raises(ValueError, match="margin"):
        compare(a, a, margin=float("nan"))
    with pytest.raises(ValueError, match="confidence"):
        compare(a, a, confidence=95)
    with pytest.raises(ValueError, match="align"):
        compare(a, a, align="width")
    with pytest.raises(ValueError, match="at least one"):
        compare([], [])
    renamed = evaluate(Scaled(1.0), x, quarter_turns(), TV, layers={"layers.0": "x"}, confidence=0.95)
    with pytest.raises(ValueError, match="no"):
        compare(a, renamed)
    with pytest.raises(KeyError, match="No layer"):
        compare(a, a)["x"]


def test_holm_equals_statsmodels():
    from lightning_invariance.results.comparison import holm

    p = np.random.default_rng(0).uniform(size=40) ** 4
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist())
    assert math.isnan(holm([0.5, math.nan, 0.01])[1])
    assert holm([0.5, math.nan, 0.01])[2] == pytest.approx(0.02)


def test_results_without_influences_compare_by_seeds_only():
    old = InvarianceResult({"M": {"a": torch.tensor([1.0])}})
    new = InvarianceResult({"M": {"a": torch.tensor([2.0])}})
    with pytest.raises(ValueError, match="influences"):
        compare(old, new)
    assert compare([old, new], [new, old]).rows[0].difference == 0
