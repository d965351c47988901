"""Transformation sets against torch, torchvision and hand-made images."""

import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from lightning_invariance import (
    TransformationSet,
    combine,
    evaluate,
    flips,
    quarter_turns,
    rotations,
    scales,
    translations,
)
from lightning_invariance.measures import DistanceSameEquivariance, VarianceSameEquivariance


def images(height=9, width=9, dtype=torch.float32, batch=2, channels=3):
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def blob(size=129):
    """A smooth image, far from the border. Bilinear interpolation changes it by at most 2 · h²/8 · max|f''| = 0.002."""
    position = torch.linspace(-1, 1, size)
    one = torch.exp(-8 * ((position[:, None] - 0.2) ** 2 + 2 * (position[None] + 0.1) ** 2))
    return one[None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8])
@pytest.mark.parametrize("size", [8, 9])
def test_four_rotations_are_quarter_turns_bit_for_bit(size, dtype):
    x = (images(size, size) * 255).to(dtype)
    expected = torch.stack([torch.rot90(x, turns, (-2, -1)) for turns in range(4)], dim=1)
    for transformations in (rotations(4), quarter_turns(), combine(rotations(4), rotations(angles=[360]))):
        assert torch.equal(transformations(x), expected)
        assert torch.equal(transformations.inverse(transformations(x)), x[:, None].expand(-1, 4, -1, -1, -1))


def test_quarter_turns_among_other_angles_are_exact_too():
    x = images(8, 8)
    assert torch.equal(rotations(16)(x)[:, ::4], rotations(4)(x))


def test_flips_are_exact_on_any_shape():
    x = images(4, 7)
    expected = [x, x.flip(-1), x.flip(-2), x.flip(-1, -2)]
    assert torch.equal(flips()(x), torch.stack(expected, dim=1))
    assert torch.equal(flips().inverse(flips()(x)), torch.stack([x] * 4, dim=1))


@pytest.mark.parametrize("shape", [(9, 9), (8, 8), (7, 12)])
def test_rotations_equal_torchvision(shape):
    x, angles = images(*shape, dtype=torch.float64), [0, 13.5, 90, 200, -45]
    turned = rotations(angles=angles)(x)
    for j, angle in enumerate(angles):
        expected = v2.functional.rotate(x, angle, InterpolationMode.BILINEAR)
        torch.testing.assert_close(turned[:, j], expected, rtol=0, atol=1e-6)


def test_scales_equal_torchvision():
    x, factors = images(10, 13, dtype=torch.float64), [0.5, 1.0, 1.25]
    scaled = scales(factors=factors)(x)
    for j, factor in enumerate(factors):
        expected = v2.functional.affine(x, 0, [0, 0], factor, [0.0], InterpolationMode.BILINEAR)
        torch.testing.assert_close(scaled[:, j], expected, rtol=0, atol=1e-6)


def test_translations_move_whole_pixels_and_fill_with_black():
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    t = translations(pixels=[1])
    assert t.labels == ["(-1,-1)", "(-1,1)", "(1,-1)", "(1,1)", "(0,1)", "(1,0)", "(0,-1)", "(-1,0)"]
    right, down = t(x)[0, 5, 0], t(x)[0, 4, 0]
    assert right.tolist() == [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11], [0, 13, 14, 15]]
    assert down.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3), (torch.uint8, 0.501)])
@pytest.mark.parametrize("fill", [50, (25.0, 0, 240)])
def test_pixels_from_outside_of_an_image_have_the_fill(fill, dtype, tolerance):
    """Against torchvision, with the fill in proportion to the outside that interpolation moves into the frame."""
    x = (255 * images()).to(dtype)
    t = combine(rotations(8, fill=fill), scales(factors=[0.7, 1], fill=fill), flips())
    moved = t(x)
    assert moved.dtype == dtype
    members = [
        (45 * turn, scale, flip) for turn in range(8) for scale in (0.7, 1) for flip in ([], [-1], [-2], [-1, -2])
    ]
    for j, (angle, scale, flip) in enumerate(members):
        image, white = (
            v2.functional.affine(v, -angle, [0, 0], scale, [0.0], InterpolationMode.BILINEAR).flip(flip)
            for v in (x.double(), torch.ones(1, 1, 9, 9, dtype=torch.float64))
        )
        expected = image + (1 - white) * torch.tensor(fill).view(-1, 1, 1)
        torch.testing.assert_close(moved[:, j].double(), expected, rtol=0, atol=tolerance)


def test_pixels_that_only_move_are_exact_beside_a_fill():
    x = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
    assert torch.equal(translations(pixels=[1], fill=1e8)[5](x), torch.tensor([[[[1e8, 0.1], [1e8, 0.3]]]]))


@pytest.mark.parametrize("measure", [VarianceSameEquivariance, DistanceSameEquivariance])
@pytest.mark.parametrize("mask", [False, True])
def test_feature_maps_are_never_filled(measure, mask):
    maps, values = torch.rand(6, 8, 2, 9, 9, generator=torch.Generator().manual_seed(1)), []
    for fill in (0, 5):
        metric = measure(rotations(8, fill=fill), mask=mask)
        metric.update(maps)
        values.append(metric.compute())
    assert torch.equal(*values)
    assert values[0].isfinite().any()


def test_members_and_equality_of_filled_sets():
    t = rotations(8, fill=(0, 0.5))
    assert torch.equal(t[2:4](images(channels=2)), t(images(channels=2))[:, 2:4])
    assert t == rotations(8, fill=(0, 0.5)) == rotations(8, fill=np.array([0, 0.5], dtype=np.float32))
    assert t != rotations(8)
    assert torch.equal(pickle.loads(pickle.dumps(t))(images(channels=2)), t(images(channels=2)))


def test_a_shift_on_a_feature_map_is_in_proportion():
    # Four pixels of a 16-pixel input are one pixel of a 4-pixel map.
    t = translations(pixels=[4])
    maps = torch.arange(1.0, 17).view(1, 1, 1, 4, 4).expand(1, 8, 1, 4, 4)
    moved_back = t.inverse(maps, input_size=(16, 16))[0, 5, 0]  # content had moved to the right
    assert moved_back.tolist() == [[2, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0], [14, 15, 16, 0]]


def test_products_with_functions_know_the_size_of_the_input_too():
    t = translations(pixels=[4], fill=7)
    same = TransformationSet.from_callables({"same": lambda x: x}, {"same": lambda x: x}, identity="same")
    both = combine(combine(t, same), same)
    maps = torch.rand(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(both.inverse(maps, input_size=(16, 16)), t.inverse(maps, input_size=(16, 16)))
    right = both.of_maps(torch.arange(1.0, 17).view(1, 1, 4, 4), input_size=(16, 16))[0, 5, 0]
    assert right.tolist() == [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11], [0, 13, 14, 15]]  # one pixel, without fill
    x = images(8, 8)
    assert torch.equal(both(x), t(x))


def test_a_rotation_does_not_shear_a_map_that_is_not_square():
    x = torch.zeros(1, 1, 9, 15)
    x[0, 0, 4, 4:11] = 1  # a bar of 7 pixels through the centre
    turned = rotations(angles=[90])(x)[0, 0, 0]
    expected = torch.zeros(9, 15)
    expected[1:8, 7] = 1
    assert torch.equal(turned, expected)


@pytest.mark.parametrize(
    "t",
    [
        rotations(8),
        scales(factors=[0.8, 1.2]),
        translations(pixels=[1, 2.5]),
        combine(rotations(angles=[10, 75]), scales(factors=[0.8, 1.1]), translations(pixels=[2])),
    ],
)
def test_inverse_undoes_the_transformation(t):
    x = blob()
    back = t.inverse(t(x))
    assert back.shape == (1, len(t), 1, 129, 129)
    assert (back - x[:, None])[..., 32:-32, 32:-32].abs().max() < 2 * 0.002  # two interpolations
    identity = t.matrices @ torch.linalg.inv(t.matrices)
    torch.testing.assert_close(identity, torch.eye(3, dtype=torch.float64).expand_as(identity))


def test_combined_sets_apply_the_first_set_first():
    t = combine(rotations(angles=[90]), translations(pixels=[1]))
    x = images(8, 8)
    expected = translations(pixels=[1])(rotations(angles=[90])(x)[:, 0])
    assert torch.equal(t(x), expected)


def test_the_sets_of_the_paper():
    assert len(rotations(16)) == 16
    assert rotations(16).parameters["angle"][1] == 22.5
    assert scales().parameters["scale"] == [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.05, 1.1, 1.15, 1.2, 1.25]
    assert len(translations()) == 24
    combined = combine(rotations(16), scales(), translations())
    assert len(combined) == 4224
    assert set(combined.parameters) == {"angle", "scale", "x", "y"}
    assert combined[-1].parameters == {"angle": 337.5, "scale": 1.25, "x": -4, "y": 0}


def test_indexing_gives_transformations_and_smaller_sets():
    t, x = rotations(8), images()
    assert [one.label for one in t] == t.labels
    assert torch.equal(t[3](x), t(x)[:, 3])
    assert torch.equal(t[2:5](x), t(x)[:, 2:5])
    assert torch.equal(t[-1].inverse(x), t.inverse(x[:, None].expand(-1, 8, -1, -1, -1))[:, -1])
    with pytest.raises(IndexError):
        t[8]


def shift_left(x):
    return x.roll(-1, -1)


def shift_right(x):
    return x.roll(1, -1)


def test_callables_of_any_modality():
    signal = torch.arange(6.0).view(2, 3)
    t = TransformationSet.from_callables(
        {"left": shift_left, "right": shift_right},
        inverses={"right": shift_left, "left": shift_right},
        parameters={"shift": [-1, 1]},
    )
    assert t.labels == ["left", "right"]
    assert t(signal)[0].tolist() == [[1, 2, 0], [2, 0, 1]]
    assert torch.equal(t.inverse(t(signal)), signal[:, None].expand(2, 2, 3))
    assert TransformationSet.from_callables([shift_left, shift_left]).labels == ["shift_left", "shift_left 2"]
    assert torch.equal(pickle.loads(pickle.dumps(t))(signal), t(signal))


def test_torchvision_transforms_are_callables():
    x = images()
    t = TransformationSet.from_callables({"blur": v2.GaussianBlur(3, 1.0), "flip": v2.RandomHorizontalFlip(p=1)})
    assert torch.equal(t(x)[:, 1], x.flip(-1))
    assert t(x).shape == (2, 2, 3, 9, 9)


def test_sets_of_different_kinds_combine():
    x = images(8, 8)
    dim = TransformationSet.from_callables({"dim": torch.neg}, inverses={"dim": torch.neg})
    t = combine(rotations(4), dim)
    assert t.labels == ["0° dim", "90° dim", "180° dim", "270° dim"]
    assert torch.equal(t(x), -rotations(4)(x))
    assert torch.equal(t.inverse(t(x)), x[:, None].expand(-1, 4, -1, -1, -1))
    assert t.parameters == {"angle": [0, 90, 180, 270]}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rotations(0), ValueError, "`n` to be an int of at least 1, but got 0"),
        (lambda: rotations(), ValueError, "one of the arguments `n` and `angles`"),
        (lambda: rotations(angles=[]), ValueError, "at least one transformation"),
        (lambda: scales(factors=[1, 0]), ValueError, "above 0, but got 0"),
        (lambda: translations(pixels=[-1]), ValueError, "above 0, but got -1"),
        (lambda: rotations(4, fill="black"), ValueError, "`fill` to hold finite numbers, but got black"),
        (lambda: translations(fill=None), ValueError, "`fill` to hold finite numbers, but got None"),
        (lambda: scales(fill=[0, float("nan")]), ValueError, r"`fill` to hold finite numbers, but got \[0, nan\]"),
        (lambda: rotations(3, fill=[0, 1])(images()), ValueError, r"each of 3 channels .*\(2, 3, 9, 9\), but got 2"),
        (lambda: combine(rotations(4, fill=1), scales(fill=2)), ValueError, r"one `fill`.*got \[\(1.0,\), \(2.0,\)\]"),
        (lambda: combine(), ValueError, "at least one transformation set"),
        (lambda: combine(rotations(2), torch.neg), TypeError, "neg"),
        (lambda: TransformationSet.from_callables({}), ValueError, "at least one"),
        (lambda: TransformationSet.from_callables({"a": 3}), TypeError, "'a' is 3"),
        (lambda: TransformationSet.from_callables({"a": abs}, {"b": abs}), ValueError, r"\['a'\], but got \['b'\]"),
        (lambda: TransformationSet.from_callables({"a": abs}, parameters={"p": [1, 2]}), ValueError, "1 values"),
        (lambda: TransformationSet.from_callables({"a": abs}).inverse(torch.ones(1, 1)), ValueError, "has none"),
        (lambda: rotations(4).inverse(images()), ValueError, r"\(batch, 4, ...\), but got \(2, 3, 9, 9\)"),
        (lambda: rotations(4)(torch.ones(4, 4)), ValueError, r"Expected images .* got \(4, 4\)"),
        (lambda: quarter_turns()(images(4, 5)), ValueError, r"square images.*\(4, 5\)"),
        (
            lambda: TransformationSet.from_callables({"a": torch.neg, "b": lambda x: x[:, :2]})(images()),
            ValueError,
            r"'b' made \(2, 2, 9, 9\)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_set_that_has_seen_other_images_does_as_a_new_one():
    generator = torch.Generator().manual_seed(0)
    used = combine(rotations(8), translations([1]))
    for size in [(6, 6), (6, 9), (12, 12), *[(5, 5 + j) for j in range(20)], (6, 6)]:
        for dtype in (torch.float32, torch.float64):
            x = torch.rand(2, 1, *size, generator=generator, dtype=dtype)
            for input_size in (None, (12, 12)):
                fresh = combine(rotations(8), translations([1]))
                moved = fresh(x, input_size)
                assert torch.equal(used(x, input_size), moved)
                assert torch.equal(used.inverse(moved, input_size), fresh.inverse(moved, input_size))
    assert len(pickle.dumps(used)) < 2 * len(pickle.dumps(fresh))


def test_gradients_flow_through_a_set_that_was_used_in_inference_mode():
    t = rotations(8)
    with torch.inference_mode():
        t(torch.rand(1, 1, 6, 6))
    x = torch.ones(1, 1, 6, 6, requires_grad=True)
    t(x).sum().backward()
    assert x.grad[0, 0, 3, 3] == pytest.approx(8, rel=0.2)  # a pixel near the centre stays inside under all of them


@pytest.mark.parametrize("order", [("same", "dark"), ("dark", "same")])
def test_functions_that_change_their_argument_do_not_meet(order):
    def dark(x):
        x[..., :3, :] = 0
        return x

    functions = {"same": lambda x: x, "dark": dark}
    x = torch.rand(4, 1, 6, 6) + 1
    given, expected = x.clone(), {"same": x.clone(), "dark": torch.cat([torch.zeros(4, 1, 3, 6), x[..., 3:, :]], 2)}
    t = TransformationSet.from_callables({name: functions[name] for name in order}, functions)
    st = t(x)
    for j, name in enumerate(order):
        assert torch.equal(st[:, j], expected[name])
    assert torch.equal(x, given)
    moved = st.clone()
    t.inverse(st)
    assert torch.equal(st, moved)


def test_transformations_that_are_all_the_same_are_warned_of():
    late = TransformationSet.from_callables([lambda x: x.roll(k, -1) for k in range(3)])  # noqa: B023
    images, model = torch.rand(8, 1, 6, 6), torch.nn.Flatten()
    with pytest.warns(UserWarning, match="All transformations of .* `lambda x, k=k: ...`"):
        evaluate(model, images, late)
    evaluate(model, images, rotations(4))  # a warning would be an error
    evaluate(model, torch.zeros(8, 1, 6, 6), rotations(4))
