"""Assertions about models."""

import pytest
import torch
from torch import nn

from lightning_invariance import TransformationSet, quarter_turns, rotations
from lightning_invariance.measures import Goodfellow, NormalizedVariance, SampleVariance, TransformationVariance
from lightning_invariance.testing import assert_equivariant, assert_invariant


def images(n=40):
    return torch.rand(n, 2, 6, 6, generator=torch.Generator().manual_seed(0))


POOL = nn.Sequential(nn.AdaptiveAvgPool2d(1))


def test_a_network_that_is_invariant_passes():
    result = assert_invariant(POOL, images(), quarter_turns(), within=1e-6)
    assert result.interval("NormalizedVariance")["0"].high < 1e-6
    assert_invariant(POOL, torch.ones(20, 1, 4, 4), quarter_turns(), within=1.01)  # dead: 1


def test_a_layer_that_is_not_fails_with_its_interval_and_the_worst_transformation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(
        AssertionError, match=r"of 2 layers 2 are not:\n  0: .* \[.*\]; most by \d+° \(.*\)\n  1: "
    ) as told:
        assert_invariant(model, images(), rotations(4), within=0.01)
    assert "below 0.01 with 95% confidence" in str(told.value)
    assert_invariant(model, images(), rotations(4), within=10)


def test_layers_that_never_change_pass_with_a_warning():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
    nn.init.constant_(model[0].bias, -100)
    with pytest.warns(UserWarning, match=r"1 layer never changed, which says nothing of invariance: 1\."):
        assert_invariant(model, images(), rotations(4), within=10, measure=TransformationVariance())


def test_only_some_layers_count():
    model = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    assert_invariant(model, images(), quarter_turns(), within=1e-6, layers=["1"])
    with pytest.raises(AssertionError):
        assert_invariant(model, images(), quarter_turns(), within=1e-6)


def test_a_value_below_the_limit_with_an_upper_bound_above_it_fails():
    value = float(NormalizedVariance()(quarter_turns()(images())).mean())
    few, model = images()[:6], nn.Sequential(nn.Identity())
    assert_invariant(model, images(), quarter_turns(), within=2 * value)
    estimate = float(NormalizedVariance()(quarter_turns()(few)).mean())
    with pytest.raises(AssertionError):
        assert_invariant(model, few, quarter_turns(), within=1.001 * estimate)


def test_many_layers_are_counted():
    model = nn.Sequential(*(nn.ReLU() for _ in range(9)))
    with pytest.raises(AssertionError, match="and 4 more layers"):
        assert_invariant(model, images(), quarter_turns(), within=0.1)


def test_equivariance():
    assert_equivariant(nn.Sequential(nn.ReLU()), images(), quarter_turns(), within=0)
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="equivariant"):
        assert_equivariant(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), images(), quarter_turns(), within=0.01)
    with pytest.raises(AssertionError, match=r"equivariant.*\n  0: .*; most by (?!0°)"):
        # The identity alone does not interpolate, and so differs most from what the others have in common.
        assert_equivariant(nn.Sequential(nn.ReLU()), images(), rotations(8), within=0.01)
    with pytest.raises(AssertionError, match="defined"):
        assert_equivariant(nn.Sequential(nn.Flatten()), images(), quarter_turns(), within=0.01)


def test_wrong_arguments():
    for within in (-1, float("nan")):
        with pytest.raises(ValueError, match="within"):
            assert_invariant(POOL, images(), quarter_turns(), within=within)
    with pytest.raises(ValueError, match="confidence"):
        assert_invariant(POOL, images(), quarter_turns(), within=1, confidence=95)
    for measure in (Goodfellow(), SampleVariance()):
        with pytest.raises(ValueError, match="measure"):
            assert_invariant(POOL, images(), quarter_turns(), within=1, measure=measure)


@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_units_that_are_infinite_or_nan_fail(value):
    class Mostly(nn.Module):
        """The mean of an image, which is invariant, and units that the transformation alone changes, or NaN."""

        def forward(self, x):
            upper = x[:, :, :3].mean((1, 2, 3)) > x[:, :, 3:].mean((1, 2, 3))
            return torch.cat([x.mean((1, 2, 3))[:, None], value * upper[:, None].expand(len(x), 9).float()], 1)

    turned = TransformationSet.from_callables({"same": lambda x: x, "turned": lambda x: x.flip(-2)}, identity="same")
    x = images() + torch.linspace(5, 0, 6)[:, None]
    with pytest.warns(UserWarning, match="left out"), pytest.raises(AssertionError, match="90% left out"):
        assert_invariant(nn.Sequential(Mostly()), x, turned, within=0.2)
