"""Same-equivariance: networks that have it, masks, the floor, and layers that cannot be measured."""

import pytest
import torch
from torch import nn

from lightning_invariance import (
    TransformationSet,
    evaluate,
    flips,
    functional,
    quarter_turns,
    rotations,
    scales,
    translations,
)
from lightning_invariance.functional.equivariance import mapped_back
from lightning_invariance.measures import (
    DistanceSameEquivariance,
    NormalizedVariance,
    TransformationDistance,
    VarianceSameEquivariance,
)

BOTH = [VarianceSameEquivariance, DistanceSameEquivariance]


def images(n=6, size=12, dtype=torch.float64):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def symmetric_network():
    """Kernels that quarter turns do not change, with whole numbers: no sum is ever rounded."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.AvgPool2d(2))
    generator = torch.Generator().manual_seed(1)
    for module in (model[0], model[2]):
        kernel = torch.randint(-3, 4, module.weight.shape, generator=generator).double()
        kernel = sum(torch.rot90(kernel, turns, (2, 3)) for turns in range(4))
        module.weight.data, module.bias.data = kernel, torch.full_like(module.bias, 40.0).double()
    return model.double()


@pytest.mark.parametrize("measure", BOTH)
@pytest.mark.parametrize("over", ["channel", "activation"])
@pytest.mark.parametrize("normalize", [True, False])
def test_quarter_turns_of_the_identity_and_of_a_symmetric_network_score_exactly_zero(measure, over, normalize):
    whole = (images() * 9).round()
    metric = measure(over=over, normalize=normalize)
    for model in (nn.Sequential(nn.Identity()), symmetric_network()):
        result = evaluate(model, whole, quarter_turns(), metric)
        for layer in result.layers:
            assert (result[measure.__name__][layer] == 0).all()


@pytest.mark.parametrize("measure", BOTH)
def test_a_circular_network_scores_zero_inside_the_mask_of_translations(measure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU()).double()
    black_border = torch.nn.functional.pad(images(size=6), (5, 5, 5, 5))  # nothing leaves the frame
    shifts = translations(pixels=(1, 2, 4))
    inside = evaluate(model, black_border, shifts, measure(mask=True, normalize=False))
    without = evaluate(model, black_border, shifts, measure(normalize=False))
    for layer in ("0", "1"):
        assert (inside[measure.__name__][layer] < 1e-12).all()
    assert (without[measure.__name__]["0"] > 1e-3).all()  # the bias left the frame


def test_a_wider_mask_leaves_out_pixels_that_a_border_influences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")).double()
    shifts = translations(pixels=(1, 2))
    value = {
        mask: evaluate(model, images(), shifts, VarianceSameEquivariance(mask=mask, normalize=False))
        for mask in (True, 2)
    }
    assert (value[True]["VarianceSameEquivariance"]["0"] > 1e-3).all()
    assert (value[2]["VarianceSameEquivariance"]["0"] < 1e-12).all()


def test_the_mask_worked_out_by_hand():
    def shift(x, pixels):
        moved = torch.zeros_like(x)
        if pixels > 0:
            moved[..., pixels:] = x[..., :-pixels]
        else:
            moved[..., :pixels] = x[..., -pixels:]
        return moved

    t = TransformationSet.from_callables(
        {"1": lambda x: shift(x, 1), "-2": lambda x: shift(x, -2)},
        inverses={"1": lambda x: shift(x, -1), "-2": lambda x: shift(x, 2)},
    )
    st = torch.ones(2, 2, 1, 1, 6)
    # The last pixel leaves to the right, the first two to the left.
    value = functional.variance_same_equivariance(st, t, over="activation", mask=True)
    assert value.isnan().tolist() == [[[True, True, False, False, False, True]]]
    value = functional.variance_same_equivariance(st[..., :1, :].expand(2, 2, 1, 3, 6), t, mask=True)
    assert value.tolist() == [0]


def test_the_floor_is_the_measure_of_the_identity_network():
    t = rotations(8)
    measures = {"vse": VarianceSameEquivariance(mask=True), "dse": DistanceSameEquivariance()}
    result = evaluate(nn.Sequential(nn.Identity()), images(), t, measures)
    st = t(images())
    torch.testing.assert_close(result.floor["vse"], functional.variance_same_equivariance(st, t, mask=True))
    torch.testing.assert_close(result.floor["dse"], functional.distance_same_equivariance(st, t))
    torch.testing.assert_close(result["vse"]["0"], result.floor["vse"])
    assert (result.floor["vse"] > 1e-3).all()


def test_maps_are_mapped_back_at_their_own_resolution():
    # A shift by four pixels of the input is one by two pixels of a map of half the size.
    model = nn.Sequential(nn.AvgPool2d(2))
    inner = torch.nn.functional.pad(images(size=4), (8, 8, 8, 8))
    result = evaluate(model, inner, translations(pixels=(2, 4)), VarianceSameEquivariance())
    assert (result["VarianceSameEquivariance"]["0"] < 1e-12).all()


def test_layers_without_spatial_axes_are_skipped_and_named():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(200, 5)).double()
    result = evaluate(model, images(), rotations(4), [VarianceSameEquivariance(), NormalizedVariance()])
    assert list(result["VarianceSameEquivariance"]) == ["0"]
    assert result.skipped == {"VarianceSameEquivariance": ["2"]}
    assert list(result["NormalizedVariance"]) == result.layers == ["0", "2"]


@pytest.mark.parametrize("measure", BOTH)
def test_zero_maps_are_dead_and_do_not_spoil_a_channel(measure):
    t = quarter_turns()
    st = t(images(4)).clone()
    st[:, :, 1] = 0  # always zero
    st[2, :, 2] = 0  # zero for one sample: a quarter of the rows does not vary
    metric = measure(t)
    metric.update(st)
    assert metric.compute().isnan().tolist() == [False, True, False]
    assert metric.dead()[:, 0, 0].tolist() == [False, True, False]


@pytest.mark.parametrize("measure", BOTH)
def test_a_set_without_inverses_is_refused_before_any_work(measure):
    t = TransformationSet.from_callables({"a": lambda x: x, "b": lambda x: x / 2})

    def never(x):
        raise AssertionError

    model = nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match="`transformations` to have inverses"):
        evaluate(model, images(), t, measure(), forward=never)
    with pytest.raises(ValueError, match="`transformations` to have inverses"):
        measure(t)


@pytest.mark.parametrize("measure", BOTH)
def test_bad_arguments(measure):
    with pytest.raises(ValueError, match="`over` to be .* but got 'layer'"):
        measure(over="layer")
    with pytest.raises(ValueError, match="`normalized_by` to be .* but got 'classes'"):
        measure(normalized_by="classes")
    with pytest.raises(ValueError, match="`mask` to be .* but got -1"):
        measure(mask=-1)
    with pytest.raises(ValueError, match="where the measure is updated by hand"):
        measure().update(torch.rand(2, 4, 3, 5, 5))
    with pytest.raises(ValueError, match="channels, height, width"):
        measure(rotations(4)).update(torch.rand(2, 4, 3))


def test_scales_can_be_mapped_back():
    result = evaluate(nn.Sequential(nn.Identity()), images(), scales(), VarianceSameEquivariance(mask=True))
    assert (result.floor["VarianceSameEquivariance"] < 0.2).all()


def test_the_first_formulation_compares_with_the_transformed_map():
    t = flips()[:2]
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64).view(1, 1, 1, 2)
    maps = torch.stack([x, x], 1)  # A(x) = A(t(x)) = (3, 4), t(A(x)) = (4, 3)
    metric = DistanceSameEquivariance(t, formulation="direct", normalize=False)
    metric.update(maps)
    assert metric.compute().item() == pytest.approx(2**0.5 / 2)  # 0 for the identity, √2 for the flip
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()).double()
    for mask in (False, True, 2):
        measure = DistanceSameEquivariance(formulation="direct", mask=mask)
        found = evaluate(model, images(), rotations(8), measure)["DistanceSameEquivariance"]["1"]
        with torch.no_grad():
            st = model(rotations(8)(images()).flatten(0, 1)).unflatten(0, (6, 8))
        expected = functional.distance_same_equivariance(st, rotations(8), mask=mask, formulation="direct")
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        assert (found > 0.1).all()
        pixels = DistanceSameEquivariance(formulation="direct", mask=mask, over="activation")
        found = evaluate(model, images(), rotations(8), pixels)["DistanceSameEquivariance"]["1"]
        expected = functional.distance_same_equivariance(
            st, rotations(8), "abs", over="activation", mask=mask, formulation="direct"
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def direct(st, t, **options):
    measure = DistanceSameEquivariance(t, formulation="direct", normalize=False, **options)
    measure.update(st)
    return measure.compute()


def test_pixels_are_compared_under_the_transformations_under_which_they_are_seen():
    st = torch.randn(4, 8, 2, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, total, seen = rotations(8), torch.zeros(2, 9, 9, dtype=torch.float64), torch.zeros(9, 9, dtype=torch.float64)
    for j in range(8):
        inside = t(torch.ones(1, 1, 9, 9, dtype=torch.float64))[0, j, 0] > 1 - 1e-4
        total += (st[:, j] - t(st[:, 0])[:, j]).abs().mean(0) * inside
        seen += inside
    assert seen[0, 0] < seen[4, 4] == 8
    torch.testing.assert_close(direct(st, t, over="activation", mask=True), total / seen, rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1e-22, 1e19])
def test_the_first_formulation_of_maps_whose_squares_leave_float32(scale):
    st = torch.randn(4, 8, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(direct(scale * st, rotations(8)), scale * direct(st, rotations(8)), rtol=1e-5, atol=0)


def test_an_infinite_value_makes_the_first_formulation_nan():
    st = torch.randn(4, 8, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    st[1, 2, 0, 4, 4] = torch.inf
    assert direct(st, rotations(8)).isnan().tolist() == [True, False]


@pytest.mark.parametrize("measure", BOTH)
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_in_a_feature_map_is_not_averaged_away(measure, normalize):
    t = quarter_turns()
    st = t(images(4)).clone()
    st[1, 2, 0, 3, 3] = float("nan")
    metric = measure(t, normalize=normalize)
    metric.update(st)
    assert metric.compute().isnan().tolist() == [True, False, False]


def test_the_first_formulation_is_zero_for_a_symmetric_network():
    measure = DistanceSameEquivariance(formulation="direct", normalize=False)
    result = evaluate(symmetric_network(), (images() * 9).round(), quarter_turns(), measure)
    assert all((value == 0).all() for value in result["DistanceSameEquivariance"].values())


def test_the_first_formulation_needs_the_identity():
    with pytest.raises(ValueError, match="to include the identity"):
        evaluate(nn.Sequential(nn.Identity()), images(), translations(), DistanceSameEquivariance(formulation="direct"))
    with pytest.raises(ValueError, match="`formulation` to be .* but got 'both'"):
        DistanceSameEquivariance(formulation="both")
    with pytest.raises(ValueError, match='`formulation` to be "pairs"'):
        DistanceSameEquivariance(formulation="direct", normalized_by="samples")


def test_measures_that_are_taken_together_have_the_values_of_each_alone():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).double(), images()
    together = {
        "plain": VarianceSameEquivariance(),
        "masked": VarianceSameEquivariance(mask=True),
        "raw": VarianceSameEquivariance(normalize=False),
        "pairs": DistanceSameEquivariance(mask=True),
        "direct": DistanceSameEquivariance(formulation="direct", mask=True),
        "squared": DistanceSameEquivariance(distance="squared"),
    }
    result = evaluate(model, x, rotations(8), together)
    for name, measure in together.items():
        alone = evaluate(model, x, rotations(8), {name: measure})
        for layer in ("0", "1"):
            assert torch.equal(result[name][layer], alone[name][layer]), name


def test_a_layer_that_was_asked_for_and_that_every_measure_skips():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).double()
    result = evaluate(model, images(), quarter_turns(), VarianceSameEquivariance(), layers=["0", "1"])
    assert list(result["VarianceSameEquivariance"]) == ["0"]
    assert result.skipped == {"VarianceSameEquivariance": ["1"]}


def test_the_response_of_whole_maps_is_their_part_in_the_value():
    turns = rotations(angles=[0, 20, 40, 90])
    st = torch.rand(6, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measure = VarianceSameEquivariance(turns)
    for rows in (st[:2], st[2:]):
        measure.update(rows)
    torch.testing.assert_close(measure.response().mean(), measure.compute().mean(), rtol=1e-12, atol=0)
    back = mapped_back(st, turns)
    parts = (back - back.mean(1, keepdim=True)).square().sum((3, 4)).mean((0, 2)) * 4 / 3
    torch.testing.assert_close(measure.response(), parts, rtol=1e-12, atol=0)
    assert VarianceSameEquivariance(turns, over="activation").response() is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("apart", [1e-7, 1e-3, 0.03, 0.3, 1.0])
def test_distances_of_maps_near_and_far_from_each_other(apart, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 1, 5, 7, 7, generator=generator, dtype=torch.float64)
    st = (maps + apart * torch.randn(3, 16, 5, 7, 7, generator=generator, dtype=torch.float64)).to(dtype)
    st[:, 3], st[:, 5] = st[:, 1], 100 + st[:, 5]  # a pair of equals, and one map far from all others
    measure = TransformationDistance("euclidean", over="channel")
    measure.update(st)
    expected = functional.transformation_distance(st.double(), "euclidean", over="channel")
    torch.testing.assert_close(measure.compute(), expected, rtol=tolerance, atol=0)
    if dtype == torch.float32:
        tiny = TransformationDistance("euclidean", over="channel")
        tiny.update(1e-26 * st)
        torch.testing.assert_close(tiny.compute(), 1e-26 * expected, rtol=tolerance, atol=0)
    equal = TransformationDistance("euclidean", over="channel")
    equal.update(st[:, :1].expand(-1, 6, -1, -1, -1))
    assert equal.compute().tolist() == [0.0] * 5


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("measure", BOTH)
@pytest.mark.parametrize("normalize", [True, False])
def test_maps_too_small_for_a_norm_are_not_dead(measure, normalize, on_cpu, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: on_cpu), raising=False)
    t = quarter_turns()
    st = 1e-30 * torch.rand(3, 4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    st[:, :, 1] = 0
    metric = measure(t, normalize=normalize)
    metric.update(st)
    assert metric.dead()[:, 0, 0].tolist() == [False, True]
