"""Shifts, permutations and rotations of signals, tokens, points and volumes; positions that move with images."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex, MultilabelAccuracy

from lightning_invariance import (
    TransformationSet,
    combine,
    evaluate,
    flips,
    permutations,
    quarter_turns,
    rotations,
    scales,
    shifts,
    translations,
    volume_rotations,
)
from lightning_invariance.measures import (
    ChannelEquivariance,
    EquivarianceCorrelation,
    NormalizedVariance,
    VarianceSameEquivariance,
)
from lightning_invariance.testing import assert_equivariant


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(
    steps=some.lists(some.integers(-9, 9), min_size=1, max_size=4, unique=True),
    shape=some.sampled_from([(2, 7), (2, 3, 7), (2, 7, 3)]),
    fill=some.sampled_from([None, 0.0, -2.0]),
)
@settings(max_examples=60, deadline=None)
def test_shifts_are_those_of_roll_and_of_padding(steps, shape, fill):
    axis = -2 if shape == (2, 7, 3) else -1
    x, t = values(*shape), shifts(steps, axis=axis, fill=fill)
    found = t(x)
    for j, step in enumerate(steps):
        expected = x.roll(step, axis).movedim(axis, -1)
        if fill is not None:
            expected[..., :step] = fill if step > 0 else expected[..., :step]
            if step < 0:
                expected[..., step:] = fill
            if abs(step) >= 7:
                expected[:] = fill
        assert torch.equal(found[:, j], expected.movedim(-1, axis))
    back, inside = t.inverse(found).movedim(axis, -1), torch.ones(7, dtype=torch.bool)
    for step in steps if fill is not None else ():
        inside[max(0, 7 - step) if step > 0 else 7 :] = False
        inside[: min(7, -step) if step < 0 else 0] = False
    original = x.movedim(axis, -1)[:, None].expand(back.shape)
    assert torch.equal(back[..., inside], original[..., inside])


def test_a_shift_is_scaled_with_the_length_and_interpolated_between_positions():
    maps, t = values(2, 3, 8), shifts([0, 4, 3])
    found = t.of_maps(maps, (3, 16))
    assert torch.equal(found[:, 1], maps.roll(2, -1))
    torch.testing.assert_close(found[:, 2], (maps.roll(1, -1) + maps.roll(2, -1)) / 2)
    torch.testing.assert_close(t.inverse(found[:, :, :], (3, 16))[:, 1], maps)


def signal_network(mode="circular"):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode=mode),
        nn.ReLU(),
        nn.Conv1d(4, 4, 3, stride=2, padding=1, padding_mode=mode),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    ).double()


def test_signals_move_with_circular_shifts():
    measures = [VarianceSameEquivariance(), ChannelEquivariance(), EquivarianceCorrelation()]
    result = evaluate(signal_network(), values(12, 2, 32), shifts([0, 4, 8, -6]), measures)
    for layer in ("0", "1", "2"):
        assert result.per_layer("VarianceSameEquivariance")[layer] < 1e-12
        assert result.per_layer("ChannelEquivariance")[layer] == pytest.approx(1)
        assert result.per_layer("EquivarianceCorrelation")[layer] == pytest.approx(1)
    assert result.channel_axis["3"] == 0
    other = evaluate(signal_network("zeros"), values(12, 2, 32), shifts([0, 4, 8]), measures)
    assert other.per_layer("VarianceSameEquivariance")["0"] > 1e-4
    inside = evaluate(signal_network("zeros"), values(12, 2, 32), shifts([0, 4], fill=0), ChannelEquivariance(mask=3))
    assert inside.per_layer()["1"] == pytest.approx(1)


class Encoder(nn.Module):
    """Self-attention without positions: tokens are permuted as the input is."""

    def __init__(self, position=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.attention = nn.Embedding(50, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.position = nn.Linear(8, 3), position
        self.double()

    def forward(self, x):
        y = self.embedding(x) if x.ndim == 2 else x
        y = y + self.position * torch.linspace(-1, 1, y.shape[1]).double()[:, None]
        return self.head(self.attention(y, y, y)[0])


@pytest.mark.parametrize("t", [permutations(4), shifts([0, 2, 5])])
def test_tokens_move_with_permutations_and_shifts(t):
    tokens = torch.randint(0, 50, (12, 9), generator=torch.Generator().manual_seed(0))
    assert_equivariant(Encoder(), tokens, t, within=1e-9, layers=["embedding", "head"])
    with pytest.raises(AssertionError, match="head"):
        assert_equivariant(Encoder(1.0), tokens, t, within=0.01, layers=["head"])


def test_vectors_of_tokens_and_points_move_along_their_own_axis():
    for t in (permutations(4), shifts([0, 2], axis=-2)):
        assert_equivariant(Encoder(), values(12, 9, 8), t, within=1e-9, layers=["head"])
    x = values(12, 3, 9)
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU()).double()
    assert_equivariant(net, x, permutations(4, axis=-1), within=1e-9)


def test_layers_of_another_length_are_not_permuted():
    model = nn.Sequential(nn.Conv1d(3, 10, 1), nn.AvgPool1d(2)).double()  # as many channels as there were points
    with pytest.warns(UserWarning, match="leaves out 1 layer: 1 .5 positions are not the 10 that are permuted"):
        result = evaluate(model, values(12, 3, 10), permutations(4, axis=-1), VarianceSameEquivariance())
    assert result.skipped == {"VarianceSameEquivariance": ["1"]}


def test_layers_of_inputs_with_several_axes_of_positions_are_not_shifted():
    model = nn.Sequential(nn.Conv2d(3, 4, 1)).double()
    result = evaluate(model, values(12, 3, 6, 6), shifts([0, 2]), [VarianceSameEquivariance(), NormalizedVariance()])
    assert result.skipped == {"VarianceSameEquivariance": ["0"]}
    assert result.per_layer("NormalizedVariance")["0"] > 0


def test_products_with_rotations_of_points_turn_vectors_too():
    t = combine(permutations(2), volume_rotations(4, points=True))
    model, points = Graph(), values(10, 6, 3)
    result = evaluate(model, points, t, VarianceSameEquivariance(), vectors={"coordinates": -1}, include_input=True)
    for layer in ("coordinates", "input"):
        assert result.per_layer()[layer] < 1e-12
    assert result.floor["VarianceSameEquivariance"].max() < 1e-12
    some_columns = evaluate(model, points, t[1:6], VarianceSameEquivariance(), vectors={"coordinates": -1})
    assert some_columns.per_layer()["coordinates"] < 1e-12


def test_a_name_of_vectors_that_fits_no_layer_is_warned_of():
    with pytest.warns(UserWarning, match="`vectors` to name layers that ran, but none fits 'coordinate'. Did you mean"):
        evaluate(Graph(), values(8, 5, 3), volume_rotations(4, points=True), vectors={"coordinate": -1})


def test_permutations_begin_with_the_identity_and_are_exact():
    x, t = values(3, 8, 2), permutations(5)
    moved = t(x)
    assert torch.equal(moved[:, 0], x)
    assert len({tuple(order) for order in moved[0, :, :, 0].tolist()}) == 5
    assert torch.equal(t.inverse(moved), x[:, None].expand_as(moved))
    assert torch.equal(t[3](x), moved[:, 3])
    assert not torch.equal(permutations(5, seed=1)(x), moved)
    assert permutations(5) == t != permutations(5, seed=1)


def test_the_turns_of_a_cube_are_a_group_of_permutations():
    t, x = volume_rotations(), values(2, 3, 4, 4, 4)
    moved = t(x)
    assert len(t) == 24
    assert t.identity == 0
    assert len({tuple(each.flatten().tolist()) for each in moved[0]}) == 24
    assert torch.equal(t.inverse(moved), x[:, None].expand_as(moved))
    assert torch.equal(moved.flatten(2).sort(2).values, x[:, None].flatten(2).sort(2).values.expand(-1, 24, -1))
    products = t.products()
    for i, j in ((3, 7), (11, 20)):
        assert torch.equal(t[i](t[j](x)), moved[:, products[i, j]])
    assert torch.equal(volume_rotations(4)(x)[:, 1], torch.rot90(x, 1, (3, 4)))


def test_slices_turn_as_images_do():
    x = values(2, 1, 5, 7, 7)
    found = volume_rotations(angles=[0, 30, 45])(x)
    for z in range(5):
        torch.testing.assert_close(found[:, :, :, z], rotations(angles=[0, 30, 45])(x[:, :, z]))


def test_volumes_and_points_turn_alike():
    t = volume_rotations(24)
    for of_points, matrix in zip(volume_rotations(24, points=True), t.matrices[:, :3, :3], strict=True):
        assert torch.equal(of_points(values(2, 5, 3)), values(2, 5, 3) @ matrix.mT)


def test_volumes_move_through_symmetric_networks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2)).double()
    t = volume_rotations()
    model[0].weight.data = t(model[0].weight.data).sum(1)
    assert_equivariant(model, values(6, 1, 4, 4, 4), t, within=1e-9)
    copies = nn.Sequential(nn.Conv3d(1, 24, 3, padding=1, bias=False)).double()
    copies[0].weight.data = t(values(1, 1, 3, 3, 3))[0]
    result = evaluate(copies, values(8, 1, 4, 4, 4), t, ChannelEquivariance())
    assert [len(orbit.channels) for orbit in result.orbits("0")] == [24]
    assert float(result.details["ChannelEquivariance"]["0"]["closure"]) == 1


class Graph(nn.Module):
    """One layer of an EGNN (Satorras et al. 2021): invariant features, equivariant coordinates."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features, self.weights, self.coordinates = nn.Linear(1, 8), nn.Linear(8, 1), nn.Identity()
        self.double()

    def forward(self, x):
        apart = x[:, :, None] - x[:, None]
        messages = self.features(apart.square().sum(-1, keepdim=True)).relu()
        return self.coordinates(x + (apart * self.weights(messages)).mean(2))


@pytest.mark.parametrize("t", [volume_rotations(points=True), volume_rotations(7, axis="y", points=True)])
def test_coordinates_turn_with_points(t):
    points = values(10, 6, 3)
    measures = [VarianceSameEquivariance(), ChannelEquivariance(channels="identity"), EquivarianceCorrelation()]
    with_vectors = evaluate(Graph(), points, t, measures, vectors={"coord*": -1}, include_input=True)
    without = evaluate(Graph(), points, t, measures)
    for layer in ("coordinates", "input"):
        assert with_vectors.per_layer("VarianceSameEquivariance")[layer] < 1e-12
        assert with_vectors.per_layer("ChannelEquivariance")[layer] == pytest.approx(1)
        assert with_vectors.per_layer("EquivarianceCorrelation")[layer] == pytest.approx(1)
    assert without.per_layer("VarianceSameEquivariance")["coordinates"] > 0.5
    assert_equivariant(Graph(), points, t, within=1e-9, layers=["coordinates"], vectors={"coordinates": -1})


@pytest.mark.parametrize(
    "t",
    [rotations(7), quarter_turns(), flips(), scales([0.5, 1, 2]), translations([2]), combine(rotations(3), flips())],
)
def test_points_go_where_pixels_go(t):
    size = (41, 41)
    ys, xs = torch.meshgrid(*(torch.arange(length, dtype=torch.float64) for length in size), indexing="ij")
    point = torch.tensor([23.0, 18.0], dtype=torch.float64)  # near the centre
    image = torch.exp(-((xs - point[0]) ** 2 + (ys - point[1]) ** 2) / 8)[None, None]
    for j, moved in enumerate(t(image)[0, :, 0]):
        centre = torch.stack([(xs * moved).sum(), (ys * moved).sum()]) / moved.sum()
        torch.testing.assert_close(t[j].points(point, size), centre, rtol=0, atol=0.02)
    assert t[0].points(torch.rand(4, 2, 2), size).shape == (4, 2, 2)


def test_pixels_that_left_the_frame_do_not_count():
    """A network that returns its input has every pixel right, but for interpolation; black enters the frame."""
    masks = (torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    images, targets = torch.cat([1 - masks, masks], 1) + 0.5, masks[:, 0].long()
    data = torch.utils.data.TensorDataset(images, targets)
    t = translations([3])
    measured = {
        "accuracy": MulticlassAccuracy(2, average="micro"),
        "ignoring": MulticlassJaccardIndex(2, ignore_index=9),
    }
    result = evaluate(nn.Identity(), data, t, outputs=measured, outputs_move=True, confidence=0.95)
    for name in measured:
        assert result.outputs[name].values == [1.0] * 8
    regression = torch.utils.data.TensorDataset(images, images)
    result = evaluate(nn.Identity(), regression, t, outputs=MeanSquaredError(), outputs_move=True)
    assert result.outputs["MeanSquaredError"].values == [0.0] * 8


def test_metrics_of_columns_without_visible_pixels_are_nan_and_channels_are_kept():
    images = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    pool = nn.Sequential(nn.AvgPool2d(4))
    data = torch.utils.data.TensorDataset(images, pool(images).argmax(1))
    metric = MulticlassAccuracy(3, average="micro")
    with pytest.warns(UserWarning, match="NaN for 30°: no pixel stays in the frame"):
        result = evaluate(pool, data, rotations(angles=[0, 30]), outputs=metric, outputs_move=True)
    values_of = result.outputs["MulticlassAccuracy"].values
    assert values_of[0] == 1
    assert values_of[1] != values_of[1]
    several = torch.utils.data.TensorDataset(images, (images > 0.5).long())
    result = evaluate(nn.Identity(), several, translations([2]), outputs=MultilabelAccuracy(3), outputs_move=True)
    assert result.outputs["MultilabelAccuracy"].values == [1.0] * 8
    with pytest.raises(ValueError, match="Expected feature maps"):
        flat = torch.utils.data.TensorDataset(values(8, 2, 6), values(8, 12))
        evaluate(nn.Flatten(), flat, shifts([0, 1]), outputs=MeanSquaredError(), outputs_move=True)


#: Functions that say nothing of vectors.
SAME = TransformationSet.from_callables({"a": torch.clone, "b": torch.clone}, [torch.clone, torch.clone], identity="a")


def test_bad_arguments():
    for wrong, message in (
        (lambda: shifts([]), "different finite numbers"),
        (lambda: shifts([1, 1]), "different finite numbers"),
        (lambda: shifts(3), "different finite numbers"),
        (lambda: shifts(["a"]), "different finite numbers"),
        (lambda: shifts([1], fill=float("nan")), "`fill`"),
        (lambda: shifts([1], axis=0), "axis of the batch"),
        (lambda: permutations(0), "`n`"),
        (lambda: volume_rotations(24, angles=[1]), "one of the arguments"),
        (lambda: volume_rotations(4, axis="w"), '`axis` to be "x", "y" or "z"'),
        (lambda: volume_rotations(angles=[]), "`angles` to hold finite"),
        (lambda: volume_rotations()(torch.rand(2, 3, 4, 4)), "Expected volumes"),
        (lambda: volume_rotations()(torch.rand(2, 1, 4, 4, 5)), "Expected cubes"),
        (lambda: volume_rotations(points=True)(torch.rand(2, 5, 2)), "Expected points"),
        (lambda: combine(rotations(4), volume_rotations(4)), "images or sets for volumes"),
        (lambda: shifts([0.5])(torch.zeros(2, 5, dtype=torch.long)), "whole positions"),
        (lambda: rotations(4)(torch.rand(2, 3, 9)), "`shifts`, `permutations`"),
        (lambda: rotations(4).points(torch.rand(3), (4, 4)), "positions"),
        (lambda: shifts([0, 1]).points(torch.rand(2), (4, 4)), "images or volumes"),
        (
            lambda: evaluate(Graph(), values(8, 5, 3), SAME, VarianceSameEquivariance(), vectors={"*": -1}),
            "turn vectors",
        ),
        (
            lambda: evaluate(
                Graph(), values(8, 5, 3), volume_rotations(4, points=True), VarianceSameEquivariance(), vectors={"*": 4}
            ),
            "`vectors` to name axes of the activation",
        ),
        (
            lambda: evaluate(
                Graph(), values(8, 5, 3), volume_rotations(4, points=True), VarianceSameEquivariance(), vectors={"*": 0}
            ),
            "axes of length 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(TypeError, match="`vectors` to be a dict"):
        evaluate(Graph(), values(8, 5, 3), volume_rotations(4, points=True), vectors=-1)
