"""A network that is equivariant by construction: rotations by quarter turns move its maps and permute its channels."""

import pytest
import torch
from torch import nn

from lightning_invariance import evaluate, functional, quarter_turns, rotations
from lightning_invariance.measures import DistanceSameEquivariance, NormalizedVariance, STTensor

pytest.importorskip("escnn", reason="needs escnn", exc_type=ImportError)

#: In float32, as the tables of escnn.
IMAGES = torch.rand(6, 3, 9, 9, generator=torch.Generator().manual_seed(0))
FIELDS = 5


class C4(nn.Module):
    """Two convolutions with five regular fields of C4, and a head that sees invariant means."""

    def __init__(self):
        super().__init__()
        from escnn import gspaces
        from escnn import nn as enn

        torch.manual_seed(0)
        space = gspaces.rot2dOnR2(4)
        self.of_input = enn.FieldType(space, [space.trivial_repr] * 3)
        hidden = enn.FieldType(space, [space.regular_repr] * FIELDS)
        self.conv1, self.relu1 = enn.R2Conv(self.of_input, hidden, 3, padding=1), enn.ReLU(hidden)
        self.conv2, self.relu2 = enn.R2Conv(hidden, hidden, 3, padding=1), enn.ReLU(hidden)
        self.pooled, self.head = enn.GroupPooling(hidden), nn.Linear(FIELDS, 2)

    def forward(self, x):
        from escnn.nn import GeometricTensor

        y = self.relu2(self.conv2(self.relu1(self.conv1(GeometricTensor(x, self.of_input)))))
        return self.head(self.pooled(y).tensor.mean((2, 3)))


@pytest.fixture(scope="module")
def result():
    measures = [NormalizedVariance(), DistanceSameEquivariance(), STTensor()]
    return evaluate(C4(), IMAGES, quarter_turns(), measures, progress=False)


def test_geometric_tensors_are_looked_into(result):
    assert result.layers == ["conv1", "relu1", "conv2", "relu2", "pooled", "head"]
    assert result.left_out == {}


def test_the_invariant_head_is_invariant_under_turns_of_the_group_only(result):
    assert (result["NormalizedVariance"]["head"] < 1e-9).all()
    eighths = evaluate(C4(), IMAGES, rotations(8), progress=False)
    assert (eighths["NormalizedVariance"]["head"] > 1e-3).all()


def test_fields_of_the_trivial_representation_move_as_the_input_does(result):
    assert (result["DistanceSameEquivariance"]["pooled"] < 1e-5).all()


@pytest.mark.parametrize("layer", ["relu1", "relu2"])
def test_regular_fields_are_same_equivariant_only_as_far_as_their_channels_permute(result, layer):
    found = result["DistanceSameEquivariance"][layer]
    assert (found > 0.05).all()
    turned = result["STTensor"][layer].unflatten(2, (FIELDS, 4))
    undone = torch.stack([turned[:, j].roll(-j, 2) for j in range(4)], 1).flatten(2, 3)  # turn j shifts each field by j
    assert (functional.distance_same_equivariance(undone, quarter_turns()) < 1e-5).all()
    torch.testing.assert_close(
        found, functional.distance_same_equivariance(turned.flatten(2, 3), quarter_turns()), rtol=1e-5, atol=1e-6
    )
