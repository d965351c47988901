"""evaluate() against the stored ST cube, and what it must leave unchanged."""

import pickle
import random
import sys
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from torchmetrics import Metric

from lightning_invariance import (
    TransformationSet,
    combine,
    evaluate,
    functional,
    rotations,
    scales,
)
from lightning_invariance.measures import (
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleVariance,
    TransformationVariance,
    VarianceSameEquivariance,
)

IMAGES = torch.rand(13, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


def cubes(model, images, transformations):
    """The ST tensor of every child of a sequential model, in float64."""
    model = model.eval().double()
    x = transformations(images.double()).flatten(0, 1)
    found = {}
    with torch.no_grad():
        for name, module in model.named_children():
            x = module(x)
            found[name] = x.clone().unflatten(0, (len(images), len(transformations)))
    return found


@pytest.mark.parametrize("batch_size", [3, 16, 64])
def test_every_layer_equals_the_stored_cube(batch_size):
    # 24 transformations: rows longer than a batch, one row in a batch, and two rows and a short block.
    t = combine(rotations(8), scales(factors=[0.7, 1, 1.2]))
    measures = [NormalizedVariance(), TransformationVariance(), SampleVariance()]
    result = evaluate(network(), IMAGES, t, measures, batch_size=batch_size)
    expected = {name: cube for name, cube in cubes(network(), IMAGES, t).items() if name in result.layers}
    assert (result.layers, [*result.left_out]) == (["0", "1", "2", "5"], ["3", "4"])  # dropout and flatten
    assert result.n_samples == 13
    for name, cube in expected.items():
        for measure, definition in (
            ("NormalizedVariance", functional.normalized_variance),
            ("TransformationVariance", functional.transformation_variance),
            ("SampleVariance", functional.sample_variance),
        ):
            assert result[measure][name].dtype == torch.float64
            # Units that hardly ever fire compare numbers near the rounding of a float32 convolution.
            scale = definition(cube)[functional.sample_variance(cube) > 1e-6]
            value = result[measure][name][functional.sample_variance(cube) > 1e-6]
            torch.testing.assert_close(value, scale, rtol=1e-4, atol=0)


def test_a_layer_of_one_activation_keeps_its_shape():
    model = nn.Sequential(nn.Conv2d(3, 1, 8), nn.Flatten(), nn.Flatten(0))
    result = evaluate(model, IMAGES, rotations(4), layers=["0", "1", "2"])
    assert [tuple(values.shape) for values in result["NormalizedVariance"].values()] == [(1, 1, 1), (1,), ()]
    assert [tuple(mask.shape) for mask in result.dead.values()] == [(1, 1, 1), (1,), ()]


def test_nothing_is_changed_afterwards():
    model = network().train()
    model[1].eval()  # a frozen BatchNorm stays frozen
    model[5].weight.requires_grad_(False)
    before = pickle.dumps({name: (v.clone(), v.requires_grad) for name, v in model.state_dict(keep_vars=True).items()})
    modes = [module.training for module in model.modules()]
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    drawn = random.random(), np.random.rand(), torch.rand(1)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    noisy = TransformationSet.from_callables(
        {"a": lambda x: x + torch.rand_like(x), "b": lambda x: x * random.random()}
    )
    with pytest.warns(UserWarning, match="transforms at random"):
        one, other = evaluate(model, IMAGES, noisy), evaluate(model, IMAGES, noisy)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn
    assert torch.equal(one["NormalizedVariance"]["0"], other["NormalizedVariance"]["0"])  # seeded inside
    assert [module.training for module in model.modules()] == modes
    after = {name: (v.clone(), v.requires_grad) for name, v in model.state_dict(keep_vars=True).items()}
    for name, (value, grad) in pickle.loads(before).items():
        assert torch.equal(value, after[name][0])
        assert grad == after[name][1]
    assert torch.is_grad_enabled()
    pickle.dumps(model)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        self.conv(x)
        raise ArithmeticError("broken")


@pytest.mark.parametrize("operations", [False, True])
def test_hooks_go_and_modes_return_when_forward_raises(operations):
    model = Broken().train()
    state = torch.get_rng_state()
    with pytest.raises(ArithmeticError):
        evaluate(model, IMAGES, rotations(4), operations=operations)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert model.training
    assert model.conv.training
    assert not model.conv._forward_hooks
    assert torch.equal(state, torch.get_rng_state())


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from IMAGES


def test_nan_activations_are_counted_and_reported():
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            x = x.clone()
            x[0, 0, 1, 2] = torch.nan
            x[0, 1, 3, 4] = torch.inf
            return self.inner(x)

    with pytest.warns(UserWarning, match=r"NaN.*inner \(2\)"):
        result = evaluate(Poisoned(), IMAGES, rotations(4))
    row = result.table()[0]
    assert row.nan == 2
    assert row.mean == pytest.approx(result["NormalizedVariance"]["inner"].nanmean().item(), rel=1e-12)


def test_own_metrics_and_names():
    class Largest(Metric):
        full_state_update = False

        def __init__(self):
            super().__init__()
            self.add_state("largest", torch.tensor(-torch.inf), "max")

        def update(self, st_block):
            self.largest = torch.maximum(self.largest, st_block.max())

        def compute(self):
            return self.largest

    measures = {"std": TransformationVariance(squared=False), "var": TransformationVariance(), "max": Largest()}
    result = evaluate(nn.Identity(), IMAGES, rotations(4), measures)
    assert list(result) == ["std", "var", "max"]
    assert result["max"]["Identity"] == rotations(4)(IMAGES).max().item()
    assert not torch.equal(result["std"]["Identity"], result["var"]["Identity"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": IMAGES[:0]}, ValueError, "it is empty"),
        ({"data": IMAGES[:1]}, ValueError, "at least two samples, but got 1"),
        ({"max_samples": 1}, ValueError, "at least two samples, but got 1"),
        ({"transformations": rotations(1)}, ValueError, "at least two transformations"),
        ({"transformations": [torch.neg, torch.abs]}, TypeError, "from_callables"),
        ({"measures": []}, ValueError, "at least one measure"),
        ({"measures": [NormalizedVariance(), NormalizedVariance()]}, ValueError, "two of 'NormalizedVariance'"),
        ({"layers": "nope"}, ValueError, "no layer 'nope'"),
        ({"data": Endless()}, ValueError, "max_samples"),
        ({"data": [{"a": torch.zeros(2), "b": torch.zeros(3)}] * 4}, ValueError, "input_fn"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(arguments, error, message):
    class Untouchable(nn.Module):
        def forward(self, x):
            raise AssertionError("ran")

    given = {"model": Untouchable(), "data": IMAGES, "transformations": rotations(4), **arguments}
    with pytest.raises(error, match=message):
        evaluate(**given)


def test_a_stream_of_one_sample():
    class One(IterableDataset):
        def __iter__(self):
            yield IMAGES[0]

    with pytest.raises(ValueError, match="at least two samples, but got 1"):
        evaluate(network(), One(), rotations(4), max_samples=9)


@pytest.mark.parametrize("batch_size", [4, 64])
def test_a_metric_may_keep_blocks_that_later_modules_change_in_place(batch_size):
    class Kept(Metric):
        def __init__(self):
            super().__init__()
            self.add_state("blocks", [], dist_reduce_fx="cat")

        def update(self, st):
            self.blocks.append(st)

        def compute(self):
            return torch.cat(self.blocks).amin((0, 1))

    torch.manual_seed(0)
    conv, x, turns = nn.Conv2d(1, 2, 3), torch.rand(5, 1, 8, 8) - 0.5, rotations(8)
    found = evaluate(nn.Sequential(conv, nn.ReLU(inplace=True)), x, turns, Kept(), batch_size=batch_size)
    expected = conv(turns(x).flatten(0, 1)).detach().amin(0).double()
    torch.testing.assert_close(found["Kept"]["0"], expected, rtol=1e-6, atol=1e-6)


class Branches(nn.Module):
    """A layer that inputs with large values do not reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Identity(), nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        x = self.first(x)
        return x if x.max() > 50 else self.second(x)


def large_at(column, marks):
    """Scales, and makes values of some columns large in samples with a mark."""
    columns = {1: range(2), 2: range(6, 8)}  # by mark: columns of the first batch, and of the last one

    def transform(x):
        large = sum((x[:, 0] == mark) & (column in columns[mark]) for mark in marks)
        return torch.where(large[:, None] > 0, 100, 1) * (1 + 0.1 * column) * x

    return transform


@pytest.mark.filterwarnings("ignore:1 layer is")
@pytest.mark.parametrize("marks", [(2, 0, 0, 0), (0, 1, 0, 0), (2, 1, 0, 0), (0, 2, 1, 0), (1, 2, 0, 0), (0, 0, 0, 2)])
def test_a_row_that_reaches_a_layer_in_part_does_not_count_there(marks):
    marks, x = torch.tensor([0, *marks, 0]), torch.rand(6, 4, dtype=torch.float64)
    x[marks > 0, 0] = marks[marks > 0].double()
    turns = TransformationSet.from_callables({str(j): large_at(j, [1, 2]) for j in range(8)})
    model, measure = Branches(), NormalizedVariance()
    found = evaluate(model, x, turns, measure, batch_size=2)
    assert found.reached == {"second": int((marks == 0).sum())}
    st = model.second(turns(x[marks == 0])).detach()
    expected = st.var(1).mean(0) / st.var(0).mean(0)
    torch.testing.assert_close(found["NormalizedVariance"]["second"], expected, rtol=1e-9, atol=0)
    in_two_walks = evaluate(model, x, turns, measure, batch_size=2, state_budget=600)  # which add rows in parts
    assert {layer: why.partition(":")[0] for layer, why in in_two_walks.left_out.items()} == {"second": "ragged"}
    whole = found["NormalizedVariance"]["first"]
    torch.testing.assert_close(in_two_walks["NormalizedVariance"]["first"], whole, rtol=1e-9, atol=0)


def test_a_long_walk_shows_its_progress(capsys, monkeypatch):
    # The function of the same name hides the module from an import.
    monkeypatch.setattr(sys.modules["lightning_invariance.engine.walk"], "PROGRESS_DELAY", 0.0)
    evaluate(network(), IMAGES, rotations(4))
    assert "Measuring invariance" in capsys.readouterr().err
    evaluate(network(), IMAGES, rotations(4), progress=False)
    assert capsys.readouterr().err == ""


def deep():
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 3)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("batch_size", [64, 3])
def test_the_input_of_an_inner_module_is_transformed(batch_size):
    model, images = deep(), torch.rand(10, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        inner = model[:2](images)
    measures = [NormalizedVariance(), VarianceSameEquivariance()]
    expected = evaluate(model[2:], inner, rotations(4), measures, seed=5)
    found = evaluate(model, images, rotations(4), measures, transform_at="2", batch_size=batch_size, seed=5)
    assert found.layers == ["2", "4"]  # what runs before sees no transformation
    for measure in expected:
        for one, other in zip(found[measure].values(), expected[measure].values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, equal_nan=True)
    floors = found.floor["VarianceSameEquivariance"], expected.floor["VarianceSameEquivariance"]
    torch.testing.assert_close(*floors, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert not model[2]._forward_pre_hooks


def test_an_unknown_place_of_transformation_lists_near_names():
    with pytest.raises(
        ValueError, match=r"`transform_at` to name a module of the model, but got '22'\. Did you mean '2'"
    ):
        evaluate(deep(), torch.rand(10, 3, 8, 8), rotations(4), transform_at="22")


def cube_of(model, images, transformations):
    with torch.no_grad():
        return model(transformations(images).flatten(0, 1)).unflatten(0, (len(images), len(transformations)))


@pytest.mark.parametrize("aggregate", ["mean", "max", "sum"])
def test_feature_maps_are_aggregated_before_or_after_the_quotient(aggregate):
    model, images = deep(), torch.rand(10, 3, 8, 8, dtype=torch.float64)
    measures = {"after": NormalizedVariance(), "before": NormalizedVariance(aggregate=aggregate)}
    result = evaluate(model, images, rotations(4), measures)
    cube = cube_of(model[:1], images, rotations(4))

    def aggregated(values):
        return {"mean": values.mean, "max": values.amax, "sum": values.sum}[aggregate]((1, 2))

    before = aggregated(functional.transformation_variance(cube)) / aggregated(functional.sample_variance(cube))
    torch.testing.assert_close(result["before"]["0"], before)
    torch.testing.assert_close(
        result.per_channel("after", "0", aggregate), aggregated(functional.normalized_variance(cube))
    )
    assert result["before"]["4"].shape == (3,)
    with pytest.raises(ValueError, match="`aggregate` to be one of"):
        NormalizedVariance(aggregate="median")


def test_the_mean_over_layers_can_be_weighted_by_size():
    result = evaluate(deep(), torch.rand(10, 3, 8, 8, dtype=torch.float64), rotations(4))
    means = result.per_layer()
    assert result.mean() == pytest.approx(sum(means.values()) / 4)
    sizes = {"0": 256, "1": 256 - result.table()[1].infinite, "2": 256, "4": 3}
    weighted = sum(means[layer] * size for layer, size in sizes.items()) / sum(sizes.values())
    assert result.mean(weighted=True) == pytest.approx(weighted)


@pytest.mark.parametrize("budget", [172_536, 300_000])  # 1 and 3 transformations at a time
@pytest.mark.parametrize("batch_size", [4, 64])
def test_large_sets_in_two_walks_give_the_same_values(budget, batch_size):
    model, images = deep(), torch.rand(9, 3, 8, 8, dtype=torch.float64)
    measures = {
        "nv": NormalizedVariance(),
        "tv": TransformationVariance(),
        "sv": SampleVariance(),
        "std": NormalizedVariance(squared=False, aggregate="mean"),
    }
    t = combine(rotations(4), scales(factors=[0.7, 1, 1.2]))
    expected = evaluate(model, images, t, measures, batch_size=64)
    found = evaluate(model, images, t, measures, batch_size=batch_size, state_budget=budget)
    for name in measures:
        assert list(found[name]) == list(expected[name])
        for one, other in zip(found[name].values(), expected[name].values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=0)
    for layer in expected.layers:
        assert torch.equal(found.dead[layer], expected.dead[layer])
    assert found.n_samples == 9


def test_a_measure_that_does_not_fit_the_budget_is_refused():
    with pytest.raises(ValueError, match="`state_budget` to be larger, but got 1 bytes: .* NormalizedDistance"):
        evaluate(deep(), torch.rand(9, 3, 8, 8).double(), rotations(4), NormalizedDistance(), state_budget=1)


def test_automatic_batch_size_halves_until_it_fits_and_changes_no_value():
    model, images, sizes = deep(), torch.rand(40, 3, 8, 8, dtype=torch.float64), []

    def forward(model, x):
        assert not torch.is_grad_enabled()
        sizes.append(len(x))
        if len(x) > 20:
            raise torch.OutOfMemoryError("not that many")
        return model(x)

    found = evaluate(model, images, rotations(4), forward=forward, batch_size="auto")
    walked = [size for size in sizes if size not in (4, 5)]  # sizes of the probe
    assert walked[:4] == [128, 64, 32, 16]
    assert set(walked[3:]) == {16}
    expected = evaluate(model, images, rotations(4), batch_size=64)
    for layer, values in expected["NormalizedVariance"].items():
        torch.testing.assert_close(found["NormalizedVariance"][layer], values, rtol=1e-9, atol=0)
    first = sizes.copy()
    sizes.clear()
    evaluate(model, images, rotations(4), forward=forward)  # the default is "auto"
    assert sizes == first  # nothing depends on what ran before
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, images, rotations(4), forward=forward, batch_size=64)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, images, rotations(4), forward=lambda *_: forward(model, images), batch_size="auto")


#: Addresses of arrays that are alive, and their number at each call of a :class:`Tracked`.
ARRAYS, COUNTS = set(), []


class Tracked(nn.Module):
    """Returns memory that is seen to be freed: torch keeps the array as long as any tensor uses it."""

    def forward(self, x):
        COUNTS.append(len(ARRAYS))  # including the input's array
        array = np.empty(tuple(x.shape), np.float32)
        ARRAYS.add(array.ctypes.data)
        weakref.finalize(array, ARRAYS.discard, array.ctypes.data)
        return torch.from_numpy(array).copy_(x)


@pytest.mark.filterwarnings("ignore:NaN")  # of distances without a pair
@pytest.mark.parametrize("layers", [None, "9"])
def test_activations_of_one_layer_are_alive_at_a_time(layers):
    COUNTS.clear()
    model = nn.Sequential(*(Tracked() for _ in range(10)))
    x = rotations(4)(torch.rand(8, 1, 8, 8)).flatten(0, 1)
    with torch.no_grad():
        model(x)
    bare = COUNTS.copy()
    COUNTS.clear()
    measures = [NormalizedVariance(), NormalizedDistance(), Goodfellow(), VarianceSameEquivariance()]
    evaluate(model, torch.rand(32, 1, 8, 8), rotations(4), measures, layers=layers, batch_size=32)
    assert (2 + 4) * bare == COUNTS  # two passes of the probe, and four batches
    assert not ARRAYS
