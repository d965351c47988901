"""Intervals that cannot be trusted say why; and how many samples would do."""

import math

import pytest
import scipy.stats
import torch
from test_intervals import evaluated, images, network
from torch import nn

from lightning_invariance import InvarianceResult, TransformationSet, compare, evaluate, quarter_turns, rotations
from lightning_invariance.measures import (
    Consistency,
    DistanceSameEquivariance,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    TransformationDistance,
    TransformationVariance,
)
from lightning_invariance.plots import evolution


def test_dead_and_infinite_units():
    class Odd(nn.Module):
        """A usual unit, one that never changes, and one that changes with the transformation alone."""

        def forward(self, x):
            usual = x.flatten(1).mul(torch.arange(16, dtype=x.dtype)).sum(1)
            place = x.flatten(1).argmax(1).to(x.dtype)
            return torch.stack([usual, torch.zeros_like(usual), place], 1)

    x = images(12, channels=1)
    x[:, 0, 0, 0] = 10

    with pytest.warns(UserWarning, match="infinite"):
        result = evaluate(nn.Sequential(Odd()), x, quarter_turns(), batch_size=8, confidence=0.95)
    errors = result.standard_errors["NormalizedVariance"]["0"]
    assert errors[0] > 0
    assert errors[1] == 0
    assert errors[2].isnan()
    interval = result.interval()["0"]
    assert interval.standard_error == pytest.approx(float(errors[0]) / 2, rel=1e-2)
    assert "33% left out" in interval.doubt
    assert "33% left out" in result.interval().network.doubt


def test_intervals_leave_out_the_bias_of_a_value_whose_definition_depends_on_the_number_of_samples(tmp_path):
    """Distances of a sample to itself are 1 / n of all, so that SD is (n - 1) / n of its value for many samples."""
    columns = TransformationSet.from_callables([lambda x, j=j: x[:, j] for j in range(4)])
    measures = [TransformationDistance(), SampleDistance(), NormalizedDistance(), NormalizedVariance()]
    doubts = {}
    for units in (2, 1000):  # the more units, the narrower the interval of their mean
        x = torch.randn(256, 4, units, generator=torch.Generator().manual_seed(0))
        network = nn.Sequential(nn.Identity())
        result = evaluate(network, x, columns, measures, confidence=0.95, progress=False)
        result.save(tmp_path / "result.npz")
        assert InvarianceResult.load(tmp_path / "result.npz").interval("SampleDistance") == result.interval(
            "SampleDistance"
        )
        doubts[units] = {name: result.interval(name)["0"].doubt for name in result}
    assert not any("of many samples" in doubt for doubt in doubts[2].values())
    assert not any("of many samples" in doubt for doubt in doubts[1000].values())


def test_how_many_samples_would_do():
    result = evaluated(64)
    interval = result.interval()["1"]
    half = (interval.high - interval.low) / 2
    assert result.samples_for(half, layer="1") == 48

    def width(count, of):  # of more samples there are more degrees of freedom, in the same proportion
        freedom = min(count - 1, (of.freedom + 1) * count / 48 - 1)
        return scipy.stats.t.ppf(0.975, freedom) * of.standard_error * math.sqrt(48 / count)

    for part in (1.5, 2, 7):
        count = result.samples_for(half / part, layer="1")
        assert width(count, interval) <= half / part < width(count - 1, interval)
    counts = [result.samples_for(0.01, layer=layer) for layer in result.interval()]
    assert result.samples_for(0.01) == max(counts)


def test_without_an_interval_no_number_of_samples_would_do():
    x = images(20)
    columns = TransformationSet.from_callables({str(j): lambda x, j=j: torch.full_like(x, j) for j in range(3)})
    with pytest.warns(UserWarning, match="is infinite"):
        result = evaluate(network(), x, columns, confidence=0.95)
    with pytest.raises(ValueError, match="there is none"):
        result.samples_for(0.1)


def test_repeated_samples_are_doubted():
    x = images(30)
    once, often = (evaluate(network(), data, quarter_turns(), confidence=0.95) for data in (x, x.repeat(4, 1, 1, 1)))
    for name in ("0", "network"):
        found = [each.interval().network if name == "network" else each.interval()[name] for each in (once, often)]
        assert "repeat" not in found[0].doubt
        assert "75% of the samples repeat others" in found[1].doubt


def test_samples_of_which_none_differs_are_doubted():
    class Alike(nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(x.flatten(1).argmax(1) % 2, 2).double() * 0 + torch.tensor([1.0, 0.0])

    x = images(12)
    found = evaluate(nn.Sequential(Alike()), x, quarter_turns(), Consistency(), confidence=0.95, layers=["0"])
    assert found.interval()["0"].doubt == "no sample differs from another"


def test_a_bias_is_one_of_the_samples_that_reach_a_layer():
    """1/n of a quotient by squared distances of samples, whoever divides by them."""
    x, turns = images(12), quarter_turns()
    measures = [
        NormalizedDistance("squared"),
        DistanceSameEquivariance(distance="squared", normalized_by="samples", normalize=False),
        DistanceSameEquivariance(distance="squared", normalize=False),
    ]
    found = [evaluate(nn.Sequential(nn.Conv2d(2, 2, 1).double()), x, turns, each, confidence=0.95) for each in measures]
    assert [next(iter(result.biases.values())) for result in found] == [1, 1, 0]
    few = found[0].interval()["0"]
    found[0].n_samples, found[0].reached = 1200, {"0": 12}  # as if the others had not reached it
    assert found[0].interval()["0"] == few


def test_the_network_has_no_interval_where_a_layer_has_none():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.rarely = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.always(self.rarely(x) if (x.mean((1, 2, 3)) > 1).all() else x)

    x = images(12)
    x[3] += 2  # reaches the layer, alone
    with pytest.warns(UserWarning, match="reached by some"):
        result = evaluate(Rare(), x, quarter_turns(), TransformationVariance(), batch_size=4, confidence=0.95)
    assert math.isfinite(result.mean())
    assert [*result.interval()] == ["always"]
    assert math.isnan(result.interval().network.low)
    both = compare(result, result)
    assert math.isnan(both["rarely"].p)
    assert both["always"].p == 1
    assert both.network.a == result.per_layer()["always"]
    assert both.network.doubt.startswith("without 1 layer")
    assert evolution([result, result]) is not None


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5, "high", True])
def test_a_confidence_out_of_range_is_refused(confidence):
    with pytest.raises(ValueError, match=r"confidence.*in \(0, 1\)"):
        evaluate(network(), images(4), quarter_turns(), confidence=confidence)


def test_wrong_arguments():
    result = evaluated(64)
    with pytest.raises(ValueError, match="confidence"):
        result.interval(confidence=2)
    with pytest.raises(ValueError, match="half_width"):
        result.samples_for(0)
    with pytest.raises(KeyError, match="Did you mean"):
        result.samples_for(1, layer="0 ")
    with pytest.raises(KeyError, match="layer 'x'"):
        result.unit_interval("x")
    with pytest.raises(ValueError, match="reduced to channels"):
        result.reduced().unit_interval("0")
    without = evaluate(network(), images(4), quarter_turns())
    with pytest.raises(ValueError, match="confidence=0.95"):
        without.interval()
    with pytest.raises(ValueError, match="confidence"):
        evaluate(network(), images(4), rotations(16), confidence=0.9, state_budget=3000)
