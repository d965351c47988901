"""Every measure under every check of MeasureTester, and what they are together."""

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_invariance import functional, rotations
from lightning_invariance.measures import (
    Anova,
    DistanceSameEquivariance,
    Goodfellow,
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
    assert len(values) == 17
    for tester in ONE_PASS:
        assert_close(values[type(tester).__name__], tester.definition(CUBE))


def test_measures_of_one_family_share_their_update():
    metrics = MetricCollection([TransformationVariance(), SampleVariance(), NormalizedVariance()])
    for rows in (slice(0, 6), slice(6, 13)):
        metrics.update(CUBE[rows])
    assert len(metrics.compute_groups) == 1
    assert_close(metrics.compute()["SampleVariance"], functional.sample_variance(CUBE))
