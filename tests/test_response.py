"""Responses: how much each transformation changes a layer."""

import pytest
import torch
from torch import nn

from lightning_invariance import (
    TransformationSet,
    evaluate,
    functional,
    plots,
    quarter_turns,
    rotations,
    scales,
    translations,
)
from lightning_invariance.accumulators import Deviations, Rows
from lightning_invariance.accumulators.backends import c_deviations, c_kernels, pytorch
from lightning_invariance.measures import NormalizedVariance, SampleVariance, TransformationVariance

IMAGES = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HALF = {"same": lambda x: x, "half": lambda x: x / 2, "turned": lambda x: x.flip(-1)}


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)]
    return nn.Sequential(*layers).to(dtype)


def responses(transformations, measure, images=IMAGES, **options):
    model = network(images.dtype)
    return evaluate(model, images, transformations, measure, progress=False, **options).response


def test_it_is_the_transformation_variance_of_the_pair_with_the_identity():
    turns = rotations(angles=[30, 0, 90])
    found = responses(turns, TransformationVariance(response=True))["TransformationVariance"]
    for j, pair in enumerate(([30, 0], [0, 0], [90, 0])):
        alone = evaluate(network(), IMAGES, rotations(angles=pair), TransformationVariance(), progress=False)
        for layer, values in alone["TransformationVariance"].items():
            assert found[layer][j] == pytest.approx(values.mean().item(), rel=1e-9, abs=1e-15)


def test_normalised_it_is_over_the_sample_variance_of_each_channel():
    turns = rotations(angles=[0, 30, 90])
    found = responses(turns, NormalizedVariance(response=True))["NormalizedVariance"]["0"]
    st = network()[0](turns(IMAGES).flatten(0, 1)).view(20, 3, 3, 36)
    for j in range(3):
        pair = functional.transformation_variance(st[:, [0, j]]).mean(-1)
        assert found[j] == pytest.approx((pair / functional.sample_variance(st).mean(-1)).mean().item(), rel=1e-9)


def test_without_an_identity_the_mean_over_transformations_is_the_variance():
    transformations = TransformationSet.from_callables(HALF)
    assert transformations.identity is None
    result = evaluate(network(), IMAGES, transformations, TransformationVariance(response=True), progress=False)
    for layer, parts in result.response["TransformationVariance"].items():
        assert sum(parts) / 3 == pytest.approx(result.per_layer()[layer], rel=1e-9)


def test_an_invariant_layer_has_no_response_and_a_dead_channel_does_not_count():
    found = responses(quarter_turns(), NormalizedVariance(response=True), IMAGES.float())["NormalizedVariance"]
    assert found["2"] != pytest.approx([0, 0, 0, 0], abs=1e-3)  # of a convolution that is no symmetric one
    symmetric, model = torch.ones(3, 1, 3, 3), network(torch.float32)
    symmetric[2] = 0
    model[0].weight.data = symmetric
    result = evaluate(model, IMAGES.float(), quarter_turns(), NormalizedVariance(response=True), progress=False)
    assert result.response["NormalizedVariance"]["2"] == pytest.approx([0, 0, 0, 0], abs=1e-9)


@pytest.mark.parametrize("images", [IMAGES, 1e-25 * IMAGES.float(), 1e25 * IMAGES.float()])
@pytest.mark.parametrize("batch_size", [3, 16, 64])
def test_any_batches_and_sizes_of_values(batch_size, images):
    turns = rotations(5)
    model = network(images.dtype)
    nn.init.zeros_(model[0].bias)
    result = evaluate(model, images, turns, TransformationVariance(response=True), layers="0", batch_size=batch_size)
    found = result.response["TransformationVariance"]["0"]
    with torch.no_grad():
        st = model[0](turns(images).flatten(0, 1)).view(20, 5, -1).double()
    expected = [functional.transformation_variance(st[:, [0, j]]).mean().item() for j in range(5)]
    assert found == pytest.approx(expected, rel=1e-9 if images.dtype == torch.float64 else 1e-4, abs=0)


def test_which_sets_know_their_identity():
    assert rotations(16).identity == 0
    assert scales().identity == 5
    assert translations().identity is None
    assert rotations(16)[3:].identity is None


def test_it_must_be_asked_for_and_makes_sense():
    assert responses(rotations(4), NormalizedVariance()) == {}
    for make in (lambda: NormalizedVariance(squared=False, response=True), lambda: SampleVariance(response=True)):
        with pytest.raises(ValueError, match="Expected argument `response`"):
            make()


#: Activations and the axis of their channels: maps in tiles of one channel and of several, tokens, and single units.
ACTIVATIONS = [((3, 16, 16), 0), ((40, 7, 7), 0), ((5, 4, 4), 0), ((100,), 0)]
ACTIVATIONS += [((64, 128), 1), ((9, 130), 1), ((6, 5, 64), 1)]
ACTIVATIONS += [((8, 9, 32), 2), ((5, 5, 24), 2), ((16, 8, 3), 2), ((8, 8, 40), 2)]  # maps with channels last
# Channels that end within a tile and begin again: of as many neighbours as halve a tile, and of others.
ACTIVATIONS += [((40, 3, 4), 1), ((70, 3), 1), ((24, 3, 5), 1), ((32, 2, 2), 0), ((16, 2, 4), 0), ((12, 4, 8), 0)]


#: The compiled kernels with threads, PyTorch's operations, values whose squares float32 does not hold, and references.
WAYS = [(True, 1.0, 2, 0), (True, 1.0, 3, None), (True, 1.0, 1, 2), (True, 1e-25, 1, None), (True, 1e25, 1, 0)]
WAYS += [(False, 1.0, 1, 0), (False, 1e-25, 1, 2), (False, 1e25, 1, None)]
#: Every activation in two ways, at least one of them compiled, and every way with four activations or more.
CHANGES = [(*ACTIVATIONS[i], *WAYS[(i + k) % 8]) for i in range(len(ACTIVATIONS)) for k in (0, 5)]


@pytest.mark.parametrize(("shape", "axis", "compiled", "scale", "threads", "reference"), CHANGES)
def test_changes_of_any_activation_are_the_definition(shape, axis, reference, threads, scale, compiled, monkeypatch):
    monkeypatch.setattr(c_deviations, "FEWEST_FLOAT32_VALUES", 0)
    if not compiled:
        monkeypatch.setattr(c_kernels, "_kernels", None)
    elif c_kernels._kernels is not None:
        monkeypatch.setattr(pytorch, "changes_of_samples", None)  # which takes them with PyTorch's operations
    generator = torch.Generator().manual_seed(0)
    st = scale * (torch.randn(11, 1, *shape, generator=generator) + torch.randn(11, 5, *shape, generator=generator))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    accumulator = Deviations(response=True, reference=reference)
    states, n = accumulator.empty(), 0
    for block in st.split([1, 4, 6]):
        accumulator.add(states, Rows(block, before=n, channel_axis=axis))
        n += len(block)
    torch.set_num_threads(before)
    x = st.double().movedim(2 + axis, 2).reshape(11, 5, shape[axis], -1)
    of_rows = x - x.mean(1, keepdim=True)
    apart = of_rows if reference is None else x - x[:, [reference]]
    expected = apart.square().sum((0, 3)) * (5 / 4 if reference is None else 1 / 2)
    torch.testing.assert_close(states["changes"], expected, rtol=1e-5, atol=0)
    spread = states["row_spread"].view(shape).movedim(axis, 0).reshape(shape[axis], -1)
    torch.testing.assert_close(spread, of_rows.square().sum((0, 1)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("reference", [0, None])
def test_a_first_block_whose_columns_are_far_apart(reference, compiled, monkeypatch):
    """Its sums are taken again in float64, and count once."""
    if not compiled:
        monkeypatch.setattr(c_kernels, "_kernels", None)
    generator = torch.Generator().manual_seed(0)
    far = 1e4 * torch.randn(1, 8, 16, 16, 16, generator=generator)
    st = far + torch.randn(24, 8, 16, 16, 16, generator=generator)
    accumulator = Deviations(response=True, reference=reference)
    states = accumulator.empty()
    for before, block in zip((0, 8, 16), st.split(8), strict=True):
        accumulator.add(states, Rows(block, before=before))
        assert states["offsets"].dtype == torch.float64
    x = st.double()
    origin, factor = (x[:, [0]], 1 / 2) if reference == 0 else (x.mean(1, keepdim=True), 8 / 7)
    apart = factor * (x - origin).square().sum((0, 3, 4))
    torch.testing.assert_close(states["changes"], apart, rtol=1e-5, atol=0)
    torch.testing.assert_close(states["row_spread"], 7 * x.var(1).sum(0).flatten(), rtol=1e-5, atol=0)
    torch.testing.assert_close(states["column_spread"][0], 23 * x.var(0).sum(0).flatten(), rtol=1e-5, atol=0)


def test_a_nan_stays_in_its_channel_and_transformation():
    st = torch.randn(4, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    st[1, 2, 1, 3, 4] = torch.nan
    accumulator = Deviations(response=True, reference=0)
    states = accumulator.empty()
    accumulator.add(states, Rows(st))
    assert states["changes"].isnan().tolist() == [[False, False], [False, False], [False, True]]


def test_functions_have_an_identity_where_one_is_named():
    functions = {"half": lambda x: x / 2, "same": lambda x: x, "double": lambda x: 2 * x}
    named = TransformationSet.from_callables(functions, identity="same")
    assert (named.identity, named[1:].identity, named[:1].identity) == (1, 0, None)
    assert named != TransformationSet.from_callables(functions)
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = evaluate(nn.Sequential(nn.Identity()), x, named, NormalizedVariance(response=True), progress=False)
    # Half the mean squared change over the mean of the sample variances, of x / 2, x and 2 x.
    scale = (1 / 4 + 1 + 4) / 3 * x.var(0)
    of_half, of_same, of_double = result.response["NormalizedVariance"]["0"]
    square = x.square().mean(0)
    assert of_same == 0
    assert of_half == pytest.approx(float((square / 4 / 2 / scale).mean()))
    assert of_double == pytest.approx(float((square / 2 / scale).mean()))
    with pytest.raises(ValueError, match="`identity` to be one of the labels"):
        TransformationSet.from_callables(functions, identity="none")


@pytest.mark.parametrize(("identity", "label"), [("same", "change from same"), (None, "change from the mean")])
def test_the_picture_says_what_responses_are_the_changes_from(identity, label):
    functions = TransformationSet.from_callables({"same": lambda x: x, "half": lambda x: x / 2}, identity=identity)
    x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    measure = NormalizedVariance(response=True)
    result = evaluate(nn.Sequential(nn.Identity(), nn.ReLU()), x, functions, measure, progress=False)
    axes = plots.response(result).axes[0]
    assert axes.get_ylabel() == label
    assert "0: the layer does not notice" in axes.get_title()
    assert [line.get_linestyle() for line in axes.lines] == ["None", "None"]  # categories are not joined
