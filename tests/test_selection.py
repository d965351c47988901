"""Which layers are measured, and under which names."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_invariance import evaluate, functional, layer_names, rotations

IMAGES = torch.rand(13, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Many(nn.Module):
    """A module that runs three times, one that never runs, and outputs in containers."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.unused = nn.Linear(2, 2)
        self.pair = Pair()
        self.lstm = nn.LSTM(8, 5, batch_first=True)

    def forward(self, x):
        x = self.relu(self.relu(self.relu(x) - 0.2) - 0.2)
        self.pair(x)
        return self.lstm(x[:, 0])


class Pair(nn.Module):
    def forward(self, x):
        return {"mean": x.mean(1), "rest": [x[:, 0], (x > 0).long(), None, x[:, :0]]}


def test_repeated_calls_and_outputs_in_containers():
    result = evaluate(Many(), IMAGES, rotations(4))
    shapes = {layer: tuple(v.shape) for layer, v in result["NormalizedVariance"].items()}
    assert shapes == {
        "relu": (3, 8, 8),
        "relu#1": (3, 8, 8),
        "relu#2": (3, 8, 8),
        "pair[mean]": (8, 8),
        "pair[rest][0]": (8, 8),
        "lstm[0]": (8, 5),
        "lstm[1][0]": (1, 5),
        "lstm[1][1]": (1, 5),
    }
    x = rotations(4)(IMAGES.double()).flatten(0, 1)
    cube = (((x.relu() - 0.2).relu() - 0.2).relu()).unflatten(0, (13, 4))
    expected = functional.normalized_variance(cube)
    clear = functional.sample_variance(cube) > 1e-6
    torch.testing.assert_close(result["NormalizedVariance"]["relu#2"][clear], expected[clear], rtol=1e-4, atol=0)


def nested():
    return nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, 4, 3),
            "layer1": nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
            "layer2": nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
        }
    )


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (None, ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
        ("layer1", ["layer1"]),
        ("layer1.*", ["layer1.0", "layer1.1"]),
        (["*.0", "conv1"], ["conv1", "layer1.0", "layer2.0"]),
        (nn.ReLU, ["layer1.1", "layer2.1"]),
        ([nn.Sequential, "conv?"], ["conv1", "layer1", "layer2"]),
        (lambda name, module: name.startswith("layer2"), ["layer2", "layer2.0", "layer2.1"]),
        ({"layer2.0": "second", "conv1": "first"}, ["second", "first"]),
    ],
)
def test_selecting_layers(layers, names):
    assert layer_names(nested(), layers) == names


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["conv2"], ValueError, r"no layer 'conv2'\. Did you mean 'conv1'"),
        ("zzz*", ValueError, "The model has conv1"),
        (nn.Linear, ValueError, "no Linear; it has Conv2d, ReLU, Sequential"),
        ([], ValueError, "selects none"),
        (lambda name, module: False, ValueError, "selects none"),
        ({"conv1": "a", "layer1": "a"}, ValueError, "different names"),
        (3, TypeError, "but got 3"),
        ([3], TypeError, "but got 3"),
    ],
)
def test_selections_that_fail(layers, error, message):
    with pytest.raises(error, match=message):
        layer_names(nested(), layers)


def test_a_layer_that_never_runs():
    with pytest.raises(RuntimeError, match=r"'unused' to run .*'relu', 'relu#1', 'relu#2', 'pair"):
        evaluate(Many(), IMAGES, rotations(4), layers=["unused", "relu", "pair"])
    assert evaluate(Many(), IMAGES, rotations(4), layers="*u*").layers == ["relu", "relu#1", "relu#2"]


def test_renamed_layers_and_the_output_of_a_block():
    model = nn.Sequential(nested()["layer1"], nn.Flatten())
    model[0][0] = nn.Conv2d(3, 4, 3)
    result = evaluate(model, IMAGES, rotations(4), layers={"0": "block", "0.0": "conv"})
    assert result.layers == ["conv", "block"]


def test_a_model_of_one_module():
    assert evaluate(nn.Conv2d(3, 2, 3), IMAGES, rotations(4)).layers == ["Conv2d"]


def test_parametrised_modules_are_leaves():
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), parametrizations.orthogonal(nn.Linear(4, 4))
    )
    assert layer_names(model) == ["0", "1", "2"]
    assert layer_names(model, "*") == ["0", "1", "2"]
    assert layer_names(model, lambda name, module: True) == ["0", "1", "2"]


def test_names_with_brackets_and_numbers_can_be_asked_for():
    model = nn.Sequential()
    for name in ("bn[4]", "relu#1"):
        model.add_module(name, nn.ReLU())
    assert evaluate(model, IMAGES, rotations(4), layers=["bn[4]", "relu#1"], progress=False).layers == [
        "bn[4]",
        "relu#1",
    ]
    assert evaluate(model, IMAGES, rotations(4), layers="relu#1", progress=False).layers == ["relu#1"]
