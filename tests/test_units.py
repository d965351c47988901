"""Which axis of an activation holds the units, and what follows it: channels, responses, same-equivariance."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from lightning_invariance import InvarianceMonitor, InvarianceResult, evaluate, functional, quarter_turns, rotations
from lightning_invariance.measures import (
    DistanceSameEquivariance,
    NormalizedDistance,
    NormalizedVariance,
    TransformationDistance,
    VarianceSameEquivariance,
)

IMAGES = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TURNS = rotations(4)


class Pointwise(nn.Module):
    """A 1×1 convolution, on maps with the channels first or last."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Conv2d(3, 5, 1)
        if last:
            weights = self.map.state_dict()
            self.map = nn.Linear(3, 5)
            self.map.load_state_dict({"weight": weights["weight"].flatten(1), "bias": weights["bias"]})
        self.act, self.last = nn.ReLU(), last

    def forward(self, x):
        return self.act(self.map(x.permute(0, 2, 3, 1) if self.last else x))


SAME = [
    VarianceSameEquivariance(),
    VarianceSameEquivariance(over="activation", mask=True),
    VarianceSameEquivariance(normalized_by="samples"),
    DistanceSameEquivariance(normalized_by="samples", samples=10),
    DistanceSameEquivariance(over="activation"),
    DistanceSameEquivariance(formulation="direct"),
    NormalizedDistance("euclidean", over="channel", samples=10),
    NormalizedDistance("squared", over="channel"),
    TransformationDistance(aggregate="mean"),
    NormalizedVariance(aggregate="max"),
    NormalizedVariance(response=True),
]


@pytest.mark.parametrize("turns", [TURNS, quarter_turns()], ids=["rotations", "quarter turns"])
def test_maps_with_channels_last_have_the_values_of_maps_with_channels_first(turns):
    measures = {str(i): measure for i, measure in enumerate(SAME)}
    first, last = (
        evaluate(Pointwise(last).double(), IMAGES, turns, measures, progress=False) for last in (False, True)
    )
    assert first.channel_axis == {"map": 0, "act": 0}
    assert last.channel_axis == {"map": 2, "act": 2}
    for name in measures:
        for layer in ("map", "act"):
            one, other = first[name][layer], last[name][layer]
            other = other.movedim(-1, 0) if other.ndim == 3 else other
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12, equal_nan=True)
            channels = last.per_channel(name, layer)
            torch.testing.assert_close(channels, first.per_channel(name, layer), rtol=1e-9, atol=1e-12, equal_nan=True)
    for name in first.response:
        assert last.response[name]["act"] == pytest.approx(first.response[name]["act"], rel=1e-9, abs=1e-12)
    for layer in ("map", "act"):
        assert torch.equal(last.dead[layer].movedim(-1, 0), first.dead[layer])


def test_an_equivariant_linear_layer_scores_exactly_zero():
    result = evaluate(Pointwise(True).double(), IMAGES, quarter_turns(), VarianceSameEquivariance(normalize=False))
    assert (result["VarianceSameEquivariance"]["map"] == 0).all()


class Block(nn.Module):
    """Tokens, maps, and what keeps the shape of its input."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 2, 2)
        self.norm, self.drop, self.lin = nn.LayerNorm(6), nn.Dropout(), nn.Linear(6, 9)
        self.other, self.maps, self.bn = nn.Identity(), nn.Identity(), nn.BatchNorm2d(6)
        self.head = nn.Flatten()

    def forward(self, x):
        y = self.patch(x)
        tokens = self.drop(self.norm(y.flatten(2).transpose(1, 2)))  # the shape of its input: of the norm
        self.other(gelu(self.lin(tokens)))  # an input that no module has returned: the usual axis
        self.maps(self.bn(y))
        return self.head(y)


def test_the_axis_comes_from_the_module_its_input_or_the_shape():
    result = evaluate(Block().double(), IMAGES, TURNS, NormalizedVariance(), progress=False)
    shapes = {layer: tuple(value.shape) for layer, value in result["NormalizedVariance"].items()}
    units = {layer: shapes[layer][axis] for layer, axis in result.channel_axis.items()}
    assert units == {"patch": 6, "norm": 6, "lin": 9, "other": 9, "bn": 6}
    assert shapes["lin"] == (16, 9)
    assert result.per_channel("NormalizedVariance", "lin").shape == (9,)
    torch.testing.assert_close(
        result.per_channel("NormalizedVariance", "lin"), result["NormalizedVariance"]["lin"].mean(0)
    )


@pytest.mark.parametrize("pattern", ["lin", "l*", "*"])
def test_the_user_overrules_it_by_name_or_pattern(pattern):
    result = evaluate(Block().double(), IMAGES, TURNS, layers="lin", channel_axis={pattern: 0}, progress=False)
    assert result.channel_axis == {"lin": 0}
    assert result.per_channel("NormalizedVariance", "lin").shape == (16,)
    response = evaluate(
        Block().double(), IMAGES, TURNS, NormalizedVariance(response=True), layers="lin", channel_axis={"lin": -1}
    )
    assert response.channel_axis == {"lin": 1}
    assert InvarianceMonitor(TURNS, channel_axis={"lin": 0}).options.channel_axis == {"lin": 0}


def test_an_axis_that_is_not_there_is_said():
    with pytest.raises(ValueError, match=r"`channel_axis` .* of layer 'lin', whose shape is \(16, 9\), but got 2"):
        evaluate(Block().double(), IMAGES, TURNS, channel_axis={"lin": 2}, progress=False)


def test_the_result_keeps_it_in_files_and_for_channels(tmp_path):
    result = evaluate(Block().double(), IMAGES, TURNS, progress=False)
    result.save(tmp_path / "result.npz")
    again = InvarianceResult.load(tmp_path / "result.npz")
    assert again.channel_axis == result.channel_axis
    for layer in result.layers:
        expected = result.per_channel("NormalizedVariance", layer)
        for other in (again, result.reduced(), again.reduced().reduced()):
            assert torch.equal(other.per_channel("NormalizedVariance", layer), expected)


def test_the_response_of_tokens_is_over_their_features():
    torch.manual_seed(0)
    model = Block().double()
    result = evaluate(model, IMAGES, TURNS, NormalizedVariance(response=True), layers="norm", progress=False)
    with torch.no_grad():
        y = model.eval().patch(TURNS(IMAGES).flatten(0, 1))
        cube = model.norm(y.flatten(2).transpose(1, 2)).unflatten(0, (10, 4))  # (n, m, tokens, features)
    samples = functional.sample_variance(cube).mean(0)
    for j, found in enumerate(result.response["NormalizedVariance"]["norm"]):
        pair = functional.transformation_variance(cube[:, [0, j]]).mean(0)
        assert found == pytest.approx((pair / samples).mean().item(), rel=1e-9, abs=1e-12)
