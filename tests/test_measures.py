"""Every measure under every check of MeasureTester, and what they are together."""

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_invariance import evaluate, functional, rotations
from lightning_invariance.measures import (
    Anova,
    Consistency,
    DistanceSameEquivariance,
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


class TestTransformationVariance(MeasureTester):
    def make(self):
        return TransformationVariance()

    def definition(self, st):
        return functional.transformation_variance(st)


class TestSampleVariance(MeasureTester):
    def make(self):
        return SampleVariance()

    def definition(self, st):
        return functional.sample_variance(st)


class TestNormalizedVariance(MeasureTester):
    def make(self):
        return NormalizedVariance()

    def definition(self, st):
        return functional.normalized_variance(st)


class TestNormalizedVarianceWithResponse(TestNormalizedVariance):
    def make(self):
        return NormalizedVariance(response=True)


class TestTransformationDistance(MeasureTester):
    def make(self):
        return TransformationDistance()

    def definition(self, st):
        return functional.transformation_distance(st)


class TestSampleDistance(MeasureTester):
    def make(self):
        return SampleDistance()

    def definition(self, st):
        return functional.sample_distance(st)


class TestNormalizedDistance(MeasureTester):
    def make(self):
        return NormalizedDistance()

    def definition(self, st):
        return functional.normalized_distance(st)


class TestEuclideanDistanceOfFeatureMaps(MeasureTester):
    def make(self):
        return NormalizedDistance("euclidean", over="channel")

    def definition(self, st):
        return functional.normalized_distance(st, "euclidean", "channel")


class TestSquaredDistance(MeasureTester):
    def make(self):
        return NormalizedDistance("squared")

    def definition(self, st):
        return functional.normalized_distance(st, "squared")


class TestAnovaF(MeasureTester):
    def make(self):
        return Anova("f")

    def definition(self, st):
        return functional.anova(st)[0]


class TestPairedAnovaP(MeasureTester):
    def make(self):
        return Anova("p", paired=True)

    def definition(self, st):
        return functional.anova(st, paired=True)[1]


class TestAnovaEffect(MeasureTester):
    def make(self):
        return Anova("effect")

    def definition(self, st):
        return functional.anova(st)[2]


class TestGoodfellow(MeasureTester):
    def make(self):
        return Goodfellow(0.1)

    def definition(self, st):
        return functional.goodfellow(st, 0.1)


class TestGoodfellowInTwoPasses(MeasureTester):
    def make(self):
        return Goodfellow(0.1, capacity=2)

    def definition(self, st):
        return functional.goodfellow(st, 0.1)


class TestGoodfellowByQuantile(MeasureTester):
    def make(self):
        return Goodfellow(0.1, threshold="quantile", sign=-1)

    def definition(self, st):
        return functional.goodfellow(st, 0.1, "quantile", -1)


class TestVarianceSameEquivariance(MeasureTester):
    fixed_transformations = True

    def make(self):
        return VarianceSameEquivariance(TURNS)

    def definition(self, st):
        return functional.variance_same_equivariance(st, TURNS)


class TestDistanceSameEquivariance(MeasureTester):
    fixed_transformations = True

    def make(self):
        return DistanceSameEquivariance(TURNS, normalized_by="samples")

    def definition(self, st):
        return functional.distance_same_equivariance(st, TURNS, normalized_by="samples")


class TestStratified(MeasureTester):
    def make(self):
        return Stratified(NormalizedVariance(), 3)

    def definition(self, st):
        return torch.stack([functional.normalized_variance(st[label == LABELS]) for label in range(3)]).mean(0)


def mean_squares(st):
    """Those of the two-way layout, each as the sum of squares of its effect."""
    n, m = st.shape[:2]
    grand, rows, columns = st.mean((0, 1)), st.mean(1), st.mean(0)
    rest = st - rows[:, None] - columns[None] + grand
    return (
        m * (rows - grand).square().sum(0) / (n - 1),
        n * (columns - grand).square().sum(0) / (m - 1),
        rest.square().sum((0, 1)) / ((n - 1) * (m - 1)),
    )


class TestIntraclassCorrelation(MeasureTester):
    def make(self):
        return IntraclassCorrelation()

    def definition(self, st):
        samples, _, rest = mean_squares(st)
        return (samples - rest) / (samples + (st.shape[1] - 1) * rest)


class TestIntraclassCorrelationOfAgreement(MeasureTester):
    def make(self):
        return IntraclassCorrelation(agreement=True)

    def definition(self, st):
        samples, transformations, rest = mean_squares(st)
        n, m = st.shape[:2]
        return (samples - rest) / (samples + (m - 1) * rest + m / n * (transformations - rest))


class TestMainEffect(MeasureTester):
    def make(self):
        return MainEffect()

    def definition(self, st):
        columns = st.mean(0)
        return (columns - columns.mean(0)).square().sum(0) / (st.shape[1] - 1) / functional.transformation_variance(st)


class TestConsistency(MeasureTester):
    def make(self):
        return Consistency()

    def definition(self, st):
        m = st.shape[1]
        winners = torch.nn.functional.one_hot(st.argmax(2), st.shape[2]).double()
        counts = winners.sum(1)
        return (counts * (counts - 1)).sum(-1).mean() / (m * (m - 1))


CLASSES = [*MeasureTester.__subclasses__(), *TestNormalizedVariance.__subclasses__()]
TESTERS = [cls() for cls in CLASSES if cls.__module__ == __name__]  # and not those of other files
ONE_PASS = [tester for tester in TESTERS if not tester.two_passes]
CUBE = TESTERS[0].cube()


@pytest.mark.parametrize("tester", TESTERS, ids=lambda tester: type(tester).__name__)
def test_what_is_done_on_another_device_gives_the_definition(tester, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)  # which is the CPU
    value = feed([tester.make()], CUBE.float(), [[slice(0, 7), slice(7, 13)]])
    assert_close(value, tester.definition(CUBE.float().double()), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tester", TESTERS, ids=lambda tester: type(tester).__name__)
def test_plots_go_into_axes_of_their_own_or_given_ones(tester):
    metric = tester.make()
    feed([metric], CUBE, [[slice(0, 13)]])
    figure, axes = metric.plot()
    assert axes.figure is figure
    assert metric.plot(ax=axes) == (figure, axes)
    assert isinstance(hash(metric), int)


def test_a_collection_of_all_measures_of_one_pass():
    metrics = MetricCollection({type(tester).__name__: tester.make() for tester in ONE_PASS})
    for rows in (slice(0, 6), slice(6, 13)):
        metrics.update(CUBE[rows], labels=LABELS[rows])
    values = metrics.compute()
    assert len(values) == 21
    for tester in ONE_PASS:
        assert_close(values[type(tester).__name__], tester.definition(CUBE))


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


def test_the_normalised_variance_is_told_by_the_components():
    samples, transformations, rest = mean_squares(CUBE)
    n, m = CUBE.shape[:2]
    of_samples, of_transformations = (samples - rest) / m, (transformations - rest) / n
    nv = 1 - feed([IntraclassCorrelation()], CUBE, [[slice(0, 13)]]) + of_transformations / (of_samples + rest)
    assert_close(nv, functional.normalized_variance(CUBE), rtol=1e-9)


def test_what_never_changes_has_no_correlation_and_no_effect():
    constant = torch.ones(5, 4, 2)
    assert IntraclassCorrelation()(constant).isnan().all()
    assert MainEffect()(constant).isnan().all()
    shifted = torch.arange(5.0)[:, None, None] + torch.arange(4.0)[:, None]
    assert_close(IntraclassCorrelation()(shifted), torch.tensor(1.0, dtype=torch.float64))
    assert_close(MainEffect()(shifted), torch.tensor(1.0, dtype=torch.float64))
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
def test_layers_without_consistency_have_no_interval_and_leave_that_of_the_others():
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
