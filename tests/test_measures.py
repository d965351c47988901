"""Every measure under every check of MeasureTester, and measures together."""

from functools import partial

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_invariance import evaluate, functional, rotations
from lightning_invariance.measures import (
    Anova,
    ChannelEquivariance,
    Consistency,
    DistanceSameEquivariance,
    EffectiveInvariance,
    EquivarianceCorrelation,
    Goodfellow,
    IntraclassCorrelation,
    MainEffect,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    SampleVariance,
    Stratified,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)
from lightning_invariance.testing import LABELS, MeasureTester, assert_close, feed

TURNS = rotations(4)


def mean_squares(st):
    """Mean squares of samples, transformations and residuals in the two-way layout."""
    n, m = st.shape[:2]
    grand, rows, columns = st.mean((0, 1)), st.mean(1), st.mean(0)
    rest = st - rows[:, None] - columns[None] + grand
    return (
        m * (rows - grand).square().sum(0) / (n - 1),
        n * (columns - grand).square().sum(0) / (m - 1),
        rest.square().sum((0, 1)) / ((n - 1) * (m - 1)),
    )


def correlation(st, agreement=False):
    samples, transformations, rest = mean_squares(st)
    n, m = st.shape[:2]
    return (samples - rest) / (samples + (m - 1) * rest + agreement * m / n * (transformations - rest))


def main_effect(st):
    columns = st.mean(0)
    return (columns - columns.mean(0)).square().sum(0) / (st.shape[1] - 1) / functional.transformation_variance(st)


def consistency(st):
    m = st.shape[1]
    counts = torch.nn.functional.one_hot(st.argmax(2), st.shape[2]).double().sum(1)
    return (counts * (counts - 1)).sum(-1).mean() / (m * (m - 1))


def effective(st):
    chance, winner = st.softmax(2).max(2)
    agreement = torch.where(winner[:, 1:] == winner[:, :1], (chance[:, 1:] * chance[:, :1]).sqrt(), 0.0)
    return agreement.flatten(1).mean(1).mean()


def correlations(st, turns):
    found = [torch.corrcoef(torch.stack(pair)) for pair in zip(*turned_pairs(st, turns), strict=True)]
    return torch.stack(found)[:, 0, 1].view(len(turns) - 1, -1).mean(0)


def turned_pairs(st, turns):
    """The values of t(f(x)) and f(t x), a row for each transformation but the identity and each channel."""
    moved = turns.of_maps(st[:, 0])
    white = turns.of_maps(torch.ones(1, 1, *st.shape[3:], dtype=st.dtype))[0, :, 0] > 1 - 1e-4
    for each in (moved, st):
        yield [each[:, j, c][:, white[j]].flatten() for j in range(1, len(turns)) for c in range(st.shape[2])]


def channels_stay(st, turns):
    back = turns.inverse(st)
    residuals = (back - back[:, :1]).square().sum((0, 3, 4))
    return (1 - residuals / (back - back.mean(0)).square().sum((0, 3, 4)))[1:].mean(0)


def of_classes(st):
    return torch.stack([functional.normalized_variance(st[label == LABELS]) for label in range(3)]).mean(0)


#: How each measure is made, and its definition.
MEASURES = {
    "TV": (TransformationVariance, functional.transformation_variance),
    "SV": (SampleVariance, functional.sample_variance),
    "NV": (NormalizedVariance, functional.normalized_variance),
    "NV of deviations": (
        partial(NormalizedVariance, squared=False),
        partial(functional.normalized_variance, squared=False),
    ),
    "NV with response": (partial(NormalizedVariance, response=True), functional.normalized_variance),
    "TD": (TransformationDistance, functional.transformation_distance),
    "SD": (SampleDistance, functional.sample_distance),
    "ND": (NormalizedDistance, functional.normalized_distance),
    "euclidean ND of feature maps": (
        partial(NormalizedDistance, "euclidean", over="channel"),
        partial(functional.normalized_distance, distance="euclidean", over="channel"),
    ),
    "squared ND": (
        partial(NormalizedDistance, "squared"),
        partial(functional.normalized_distance, distance="squared"),
    ),
    "F": (partial(Anova, "f"), lambda st: functional.anova(st)[0]),
    "paired p": (partial(Anova, "p", paired=True), lambda st: functional.anova(st, paired=True)[1]),
    "effect": (partial(Anova, "effect"), lambda st: functional.anova(st)[2]),
    "Goodfellow": (partial(Goodfellow, 0.1), partial(functional.goodfellow, alpha=0.1)),
    "Goodfellow in two passes": (partial(Goodfellow, 0.1, capacity=2), partial(functional.goodfellow, alpha=0.1)),
    "Goodfellow by quantile": (
        partial(Goodfellow, 0.1, threshold="quantile", sign=-1),
        partial(functional.goodfellow, alpha=0.1, threshold="quantile", sign=-1),
    ),
    "VSE": (
        partial(VarianceSameEquivariance, TURNS),
        partial(functional.variance_same_equivariance, transformations=TURNS),
    ),
    "DSE": (
        partial(DistanceSameEquivariance, TURNS, normalized_by="samples"),
        partial(functional.distance_same_equivariance, transformations=TURNS, normalized_by="samples"),
    ),
    "Stratified": (partial(Stratified, NormalizedVariance(), 3), of_classes),
    "ICC": (IntraclassCorrelation, correlation),
    "ICC of agreement": (partial(IntraclassCorrelation, agreement=True), partial(correlation, agreement=True)),
    "main effect": (MainEffect, main_effect),
    "consistency": (Consistency, consistency),
    "effective invariance": (EffectiveInvariance, effective),
    "correlation": (partial(EquivarianceCorrelation, TURNS), partial(correlations, turns=TURNS)),
    "channels": (partial(ChannelEquivariance, TURNS, "identity"), partial(channels_stay, turns=TURNS)),
    "ND of layers": (
        partial(NormalizedDistance, "euclidean", over="layer"),
        partial(functional.normalized_distance, distance="euclidean", over="layer"),
    ),
    "pooled NV": (
        partial(NormalizedVariance, aggregate="layer"),
        lambda st: functional.transformation_variance(st).sum() / functional.sample_variance(st).sum(),
    ),
}


class TestEveryMeasure(MeasureTester):
    """All checks of each measure; pytest makes the measure known before each check."""

    name = "TV"

    @pytest.fixture(autouse=True, params=MEASURES)
    def _one_of_the_measures(self, request):
        self.name = request.param
        self.fixed_transformations = self.name in ("VSE", "DSE", "correlation", "channels")

    def make(self):
        return MEASURES[self.name][0]()

    def definition(self, st):
        return MEASURES[self.name][1](st)


CUBE = TestEveryMeasure().cube()
EVERY = pytest.mark.parametrize(("make", "definition"), MEASURES.values(), ids=MEASURES)


@EVERY
def test_operations_of_other_devices_give_the_definition(make, definition, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)  # which is the CPU
    value = feed([make()], CUBE.float(), [[slice(0, 7), slice(7, 13)]])
    assert_close(value, definition(CUBE.float().double()), rtol=1e-5, atol=1e-7)


@EVERY
def test_plots_go_into_axes_of_their_own_or_given_ones(make, definition):
    metric = make()
    feed([metric], CUBE, [[slice(0, 13)]])
    figure, axes = metric.plot()
    assert axes.figure is figure
    assert metric.plot(ax=axes) == (figure, axes)
    assert isinstance(hash(metric), int)


def test_a_collection_of_all_measures_of_one_pass():
    one_pass = {name.replace(" ", "_"): both for name, both in MEASURES.items() if name != "Goodfellow in two passes"}
    metrics = MetricCollection({name: make() for name, (make, _) in one_pass.items()})
    for rows in (slice(0, 6), slice(6, 13)):
        metrics.update(CUBE[rows], labels=LABELS[rows])
    values = metrics.compute()
    assert values.keys() == one_pass.keys()
    for name, (_, definition) in one_pass.items():
        assert_close(values[name], definition(CUBE))


def test_measures_of_one_family_share_their_update():
    metrics = MetricCollection([TransformationVariance(), SampleVariance(), NormalizedVariance()])
    for rows in (slice(0, 6), slice(6, 13)):
        metrics.update(CUBE[rows])
    assert len(metrics.compute_groups) == 1
    assert_close(metrics.compute()["SampleVariance"], functional.sample_variance(CUBE))


def test_the_example_of_shrout_and_fleiss():
    """Table 2 of their paper of 1979: four judges rate six targets; ICC(2,1) is .29, ICC(3,1) .71."""
    ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    st = torch.tensor(ratings, dtype=torch.float64)
    assert float(IntraclassCorrelation()(st)) == pytest.approx(0.7148, abs=5e-5)
    assert float(IntraclassCorrelation(agreement=True)(st)) == pytest.approx(0.2898, abs=5e-5)


def test_the_normalised_variance_follows_from_the_components():
    samples, transformations, rest = mean_squares(CUBE)
    n, m = CUBE.shape[:2]
    of_samples, of_transformations = (samples - rest) / m, (transformations - rest) / n
    nv = 1 - feed([IntraclassCorrelation()], CUBE, [[slice(0, 13)]]) + of_transformations / (of_samples + rest)
    assert_close(nv, functional.normalized_variance(CUBE), rtol=1e-9)


def test_constant_units_have_no_correlation_and_no_effect():
    constant = torch.ones(5, 4, 2)
    assert IntraclassCorrelation()(constant).isnan().all()
    assert MainEffect()(constant).isnan().all()
    shifted = torch.arange(5.0)[:, None, None] + torch.arange(4.0)[:, None]
    assert_close(IntraclassCorrelation()(shifted).squeeze(), torch.tensor(1.0, dtype=torch.float64))
    assert_close(MainEffect()(shifted).squeeze(), torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="agreement"):
        IntraclassCorrelation("yes")


def test_consistency_of_predictions():
    st = torch.tensor([[[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    assert float(Consistency()(st)) == pytest.approx((1 / 3 + 1) / 2)
    st[0, 0, 0] = torch.nan
    assert Consistency()(st).isnan().all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 2, 2)])
def test_where_one_unit_competes_consistency_is_undefined(shape):
    assert Consistency()(torch.rand(4, 3, *shape)).isnan().all()


@pytest.mark.filterwarnings("ignore:NaN, and left out of all means")
def test_layers_without_consistency_have_no_interval_and_other_layers_keep_theirs():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3), torch.nn.Linear(3, 1))
    x = torch.rand(50, 1, 4, 4)
    both, alone = (evaluate(model, x, TURNS, Consistency(), layers=of, confidence=0.95) for of in (["1", "2"], ["1"]))
    assert both["Consistency"]["2"].isnan()
    assert both.interval()["2"].doubt == "undefined"
    assert both.interval()["1"] == alone.interval()["1"]


def test_consistency_has_an_interval():
    x = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
    result = evaluate(model, x, TURNS, Consistency(), layers=["1"], confidence=0.95)
    winners = model(TURNS(x).flatten(0, 1)).argmax(1).view(50, 4)
    counts = torch.nn.functional.one_hot(winners).sum(1).double()
    each = (counts * (counts - 1)).sum(1) / 12
    interval = result.interval()["1"]
    assert interval.value == pytest.approx(float(each.mean()))
    assert interval.standard_error == pytest.approx(float(each.std()) / 50**0.5, rel=1e-9)
    assert result.table()[0].shape == ()


def test_dead_units_are_counted_as_the_values_are():
    class Half(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x, 0 * x], 1)

    x = torch.rand(6, 2, 4, 4)
    measures = [NormalizedVariance(), NormalizedVariance(aggregate="mean"), Consistency()]
    result = evaluate(torch.nn.Sequential(Half()), x, TURNS, dict(zip("abc", measures, strict=True)))
    assert [result.table(name)[0].dead for name in "abc"] == [32, 2, 0]
    assert [result.table(name)[0].share_dead for name in "abc"] == [0.5, 0.5, 0]
