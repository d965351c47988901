"""Numbers that were once wrong, or that misled without a word."""

import math

import pytest
import torch
from torch import nn
from trainings import Net, events, fit_with_tensorboard

from lightning_invariance import (
    InvarianceMonitor,
    InvarianceResult,
    TransformationSet,
    evaluate,
    functional,
    plots,
    quarter_turns,
    rotations,
)
from lightning_invariance.measures import (
    Anova,
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    SampleVariance,
    STTensor,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

MAPS = torch.randn(6, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
SCALES = [1e-30, 1e-25, 1e-21, 1e-15, 1.0, 1e15, 1e19, 1e30]


def measured(metric, *blocks):
    for block in blocks:
        metric.update(block)
    return metric.compute()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("distance", ["euclidean", "cosine", "abs"])
def test_distances_of_maps_of_any_scale(distance, scale):
    st = MAPS * scale
    found = measured(TransformationDistance(distance, "channel"), *st.split(2))
    expected = functional.transformation_distance(st.double(), distance, "channel")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert found.isfinite().all()
    assert (found > 0).all()


@pytest.mark.parametrize("scale", SCALES)
def test_maps_of_one_scale_beside_others(scale):
    st = MAPS.clone()
    st[:, :, 1] *= scale
    st[2, 1, 0] = 0  # a map of zeros among them
    for distance in ("euclidean", "cosine"):
        found = measured(TransformationDistance(distance, "channel"), *st.split(4))
        expected = functional.transformation_distance(st.double(), distance, "channel")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("measure", [VarianceSameEquivariance, DistanceSameEquivariance])
def test_same_equivariance_of_normalised_maps_does_not_depend_on_their_scale(measure, scale):
    found = measured(measure(quarter_turns()), MAPS * scale)
    expected = measured(measure(quarter_turns()), MAPS.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert (found > 0.1).all()


@pytest.mark.parametrize(
    "metric",
    [
        TransformationDistance(), SampleDistance(), NormalizedDistance(), TransformationDistance("squared"),
        TransformationVariance(), SampleVariance(), NormalizedVariance(), Anova("f"), Anova("f", paired=True),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_cell_that_is_not_finite_makes_the_unit_nan(metric, value):
    st = MAPS.clone()
    st[1, 2, 0, 0, 0] = value
    metric.reset()
    found = measured(metric, *st.split(3))
    assert found[0, 0, 0].isnan()
    assert found.isnan().sum() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_set_dtype_changes_no_state(dtype):
    for metric in (NormalizedDistance(), NormalizedVariance(), Goodfellow(), DistanceSameEquivariance(quarter_turns())):
        metric.update(MAPS[:3])
        types = {name: state.dtype for name, state in metric.metric_state.items()}
        assert metric.set_dtype(dtype) is metric
        assert {name: state.dtype for name, state in metric.metric_state.items()} == types
        metric.update(MAPS[3:])
        assert metric.compute().dtype == torch.float64


def test_one_sample_over_channels_is_nan():
    with pytest.warns(UserWarning, match="at least 2 samples"):
        assert measured(SampleDistance(over="channel"), torch.randn(1, 4, 7)).isnan().all()


def shifted(scale):
    return TransformationSet.from_callables({str(k): (lambda x, k=k: x + scale * k) for k in range(5)})


def test_random_functions_are_warned_of_once():
    noisy = TransformationSet.from_callables({"same": lambda x: x, "noise": lambda x: x + torch.randn_like(x)})
    with pytest.warns(UserWarning, match="transforms at random: the values depend on the batch size") as caught:
        evaluate(nn.Linear(4, 3), torch.randn(20, 4), noisy, Goodfellow(0.1, capacity=2), batch_size=4, progress=False)
    assert [w.filename for w in caught if "at random" in str(w.message)] == [__file__]  # whose line is named
    evaluate(nn.Linear(4, 3), torch.randn(20, 4), shifted(0.1), progress=False)  # where no warning is an error


def test_a_response_that_does_not_fit_is_left_out():
    model, x = nn.Linear(4, 3), torch.randn(20, 4)
    assert evaluate(model, x, shifted(0.1), state_budget=240, progress=False).response == {}


class Mixed(nn.Module):
    """Half of the units vary with the transformation only, and a quarter not at all."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Identity()

    def forward(self, x):
        noise, moved = x[:, :25], x[:, 25:26].expand(-1, 50)
        return self.seen(torch.cat([noise, moved, torch.ones_like(noise)], 1))


DATA = torch.cat([torch.randn(20, 25, generator=torch.Generator().manual_seed(1)), torch.zeros(20, 1)], 1)


@pytest.mark.parametrize(
    "measure",
    [
        TransformationDistance(), SampleDistance(), NormalizedDistance(), Goodfellow(0.1), STTensor(),
        NormalizedVariance(), Anova("f", paired=True), Anova("f"),
    ],
    ids=lambda measure: type(measure).__name__,
)  # fmt: skip
def test_dead_units_are_known_to_every_measure(measure):
    result = evaluate(Mixed(), DATA, shifted(1.0), {"measure": measure}, progress=False, batch_size=16)
    assert result.dead["seen"].nonzero().flatten().tolist() == [*range(75, 100)]


def test_many_infinite_units_are_warned_of():
    with pytest.warns(UserWarning, match=r"NormalizedVariance is infinite.*for many units of seen \(50 of 100\)"):
        result = evaluate(Mixed(), DATA, shifted(1.0), NormalizedVariance(), progress=False)
    (row,) = result.table()
    assert (row.share_infinite, row.share_dead) == (0.5, 0.25)
    assert "50 (50%)" in str(result.table())
    assert "25 (25%)" in str(result.table())


def result(infinite):
    values = torch.ones(200, dtype=torch.float64)
    values[:infinite] = math.inf
    return InvarianceResult({"NormalizedVariance": {"a": values, "b": torch.ones(3).double()}})


def test_pictures_mark_layers_of_many_infinite_units():
    for infinite, expected in ((2, ["a", "b"]), (3, ["a ∞", "b"])):
        for figure in (plots.heatmap(result(infinite)), plots.layers(result(infinite))):
            axes = figure.axes[0]
            assert [label.get_text() for label in axes.get_xticklabels()] == expected
            assert ("∞: more than 1 % of its units are infinite" in axes.get_xlabel()) == (infinite == 3)


def test_curves_tell_the_shares_of_infinite_and_dead_units(tmp_path):
    class Half(Net):
        def __init__(self):
            super().__init__()
            self.mixed = Mixed()

        def forward(self, x):
            self.mixed(torch.cat([x.flatten(1)[:, :25], x.flatten(1).sum(1)[:, None] * 0], 1))
            return super().forward(x)

    monitor = InvarianceMonitor(rotations(4), NormalizedVariance())
    fit_with_tensorboard(tmp_path, monitor, model=Half(), epochs=1)
    share = monitor.history[-1].table()[-1].share_dead
    logged = events(tmp_path)
    assert "values/NormalizedVariance_dead/mixed.seen" in logged.Tags()["scalars"]
    row = next(row for row in monitor.history[-1].table() if row.layer == "mixed.seen")
    assert logged.Scalars("values/NormalizedVariance_dead/mixed.seen")[-1].value == pytest.approx(row.share_dead)
    assert row.share_dead >= 0.75 > share >= 0
    assert not any("_infinite/" in tag for tag in logged.Tags()["scalars"])


@pytest.mark.parametrize("batch_size", [4, 16, 256])
def test_a_unit_that_moves_once_is_not_dead(batch_size):
    """For one sample, early or late; one unit never moves, another is always NaN."""

    class Sparse(nn.Module):
        def forward(self, x):
            flat = x.flatten(1)
            loud = (flat > flat.new_tensor(0.9999)).to(x.dtype).amax(1, keepdim=True)
            return torch.cat([flat[:, :3], flat[:, :3] * 0 + 5, loud, loud * torch.nan], 1)

    x = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.9
    for sample in (0, 17, 39):
        marked = x.clone()
        marked[sample, 0, 1, 2] = 1.0
        for measure in (TransformationDistance(), SampleDistance()):
            with pytest.warns(UserWarning, match="NaN"):
                result = evaluate(nn.Sequential(Sparse()), marked, quarter_turns(), [measure], batch_size=batch_size)
            assert result.dead["0"].tolist() == [False] * 3 + [True] * 3 + [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parallel_maps_have_no_angle(dtype):
    """Both distances are 0, up to rounding that would make any quotient of them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 3, 3, generator=generator, dtype=dtype)
    factors = 2.0 ** torch.randint(-3, 4, (4, 3, 40, 1, 1), generator=generator)  # which round nothing
    odd = torch.rand(4, 3, 40, 1, 1, generator=generator, dtype=dtype) + 0.1
    for scale in (factors, odd) if dtype == torch.float64 else (factors,):
        measure = NormalizedDistance("cosine", over="channel")
        measure.update((directions * scale).to(dtype))
        assert (measure.compute() == 1).all()
