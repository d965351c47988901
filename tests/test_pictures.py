"""What the figures of several results, of transformations and of feature maps draw."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightnings import TensorBoardLogger
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from torch import nn

from lightning_invariance import InvarianceResult, evaluate, plots, rotations, translations
from lightning_invariance.measures import NormalizedVariance, STTensor
from lightning_invariance.monitor.logging import log_pictures
from lightning_invariance.plots.common import render

IMAGES = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def result(means, names=("a", "b", "c"), **about):
    values = {name: torch.tensor([mean - 0.1, mean + 0.1]).double() for name, mean in zip(names, means, strict=True)}
    return InvarianceResult({"NormalizedVariance": values}, higher_is_better={"NormalizedVariance": False}, **about)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def texts(labels):
    return [label.get_text() for label in labels]


def lines_of(axes):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines]


@pytest.fixture(scope="module")
def measured():
    return evaluate(network(), IMAGES, rotations(angles=[90, 0, 30]), NormalizedVariance(response=True), progress=False)


def test_response_draws_each_layer_against_the_angle_in_order(measured):
    axes = plots.response(measured).axes[0]
    found = measured.response["NormalizedVariance"]
    assert len(axes.lines) == len(found) == 3
    for (x, y), values in zip(lines_of(axes), found.values(), strict=True):
        assert x == [0, 30, 90]
        assert y == [values[1], values[2], values[0]]
    assert axes.get_xlabel() == "angle in degrees, counter-clockwise"
    assert texts(plots.response(measured, layers=["3"]).legends[0].get_texts()) == ["3"]
    for arguments in ({"layers": ["x"]}, {"measure": "TransformationVariance"}):
        with pytest.raises(ValueError, match="but got '"):
            plots.response(measured, **arguments)
    with pytest.raises(ValueError, match=r"NormalizedVariance\(response=True\)"):
        plots.response(result((1, 1, 1)))


def test_response_to_translations_is_a_map_of_each_layer():
    shifts = translations(pixels=(1, 2))
    found = evaluate(network(), IMAGES, shifts, NormalizedVariance(response=True), progress=False)
    figure = plots.response(found)
    maps = [axes for axes in figure.axes if axes.collections and axes.get_title()]
    assert [axes.get_title() for axes in maps] == ["0", "1", "3"]
    for axes, values in zip(maps, found.response["NormalizedVariance"].values(), strict=True):
        dots = axes.collections[0]
        assert dots.get_offsets().tolist() == [list(p) for p in zip(*shifts.parameters.values(), strict=True)]
        np.testing.assert_allclose(dots.get_array(), values)
        assert dots.norm.vmin == 0
        assert axes.yaxis_inverted()  # as in images, down is positive


def test_response_of_functions_names_them():
    found = result((1, 1, 1), transformations=["dark", "blurred"], response={"NormalizedVariance": {"a": [0.5, 2.0]}})
    axes = plots.response(found).axes[0]
    assert texts(axes.get_xticklabels()) == ["dark", "blurred"]
    assert lines_of(axes) == [([0, 1], [0.5, 2.0])]


def test_stability_draws_each_result_their_mean_and_deviation():
    axes = plots.stability([result((1, 0.5, 0.2)), result((1, 0.7, 0.4))]).axes[0]
    each, (mean, *_) = axes.lines[:2], axes.containers[0]
    assert [line.get_ydata().tolist() for line in each] == [pytest.approx([1, 0.5, 0.2]), pytest.approx([1, 0.7, 0.4])]
    assert mean.get_ydata().tolist() == pytest.approx([1, 0.6, 0.3])
    ends = np.array(axes.containers[0][2][0].get_segments())[:, :, 1]
    # The standard deviation of two values 0.2 apart is 0.2 / √2.
    np.testing.assert_allclose(ends[1], [0.6 - 0.2 / math.sqrt(2), 0.6 + 0.2 / math.sqrt(2)])
    assert mean.get_linestyle() == "--"
    assert axes.get_title() == "lower is more invariant"


def test_stability_draws_the_intervals_of_results_that_have_them():
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), torch.rand(12, 1, 4, 4)
    one = evaluate(model, images, rotations(4), confidence=0.9, layers=["*"])
    other = evaluate(model, images, rotations(4), layers=["*"])
    bands = [c for c in plots.stability([one, other]).axes[0].collections if isinstance(c, PolyCollection)]
    assert len(bands) == 1
    ends = bands[0].get_paths()[0].vertices[:, 1]
    table = one.table()
    assert ends.min() == pytest.approx(min(row.low for row in table))
    assert ends.max() == pytest.approx(max(row.high for row in table))


def test_depth_places_networks_of_other_layers_side_by_side():
    two = {"deep": result((1, 0.5, 0.2)), "flat": result((1, 0.4), names=("x", "y"))}
    axes = plots.layers(two, depth=True).axes[0]
    assert [x for x, _ in lines_of(axes)] == [[0, 50, 100], [0, 100]]
    assert axes.get_xlabel() == "depth of the layer in %"


def test_compare_draws_differences_of_layers_of_one_name_or_of_one_depth():
    axes = plots.compare(result((1, 0.5, 0.2)), result((0.4, 0.9), names=("a", "c")), names=("old", "new")).axes[0]
    bars = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches)
    assert [pytest.approx(bar) for bar in bars] == [(0, -0.6), (1, 0.7)]
    assert texts(axes.get_xticklabels()) == ["a", "c"]
    assert "new − old" in axes.get_ylabel()
    assert axes.get_title() == "below 0: new is more invariant"
    by_depth = plots.compare(result((1, 0.5, 0.2)), result((0.4, 0.8), names=("x", "y")), depth=True).axes[0]
    bars = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in by_depth.patches)
    assert [pytest.approx(bar) for bar in bars] == [(0, -0.6), (1, 0.1), (2, 0.6)]  # 0.6 is halfway from 0.4 to 0.8
    with pytest.raises(ValueError, match='align="depth"'):
        plots.compare(result((1, 1, 1)), result((1,), names=("z",)))


def test_convergence_draws_values_and_their_errors():
    counts = [result(means, "ab", n_samples=n) for n, means in ((8, (1, 2)), (2, (1.5, 3)), (4, (1.1, 2)))]
    left, right = plots.convergence(counts).axes[:2]
    assert [(x, pytest.approx(y)) for x, y in lines_of(left)] == [([2, 4, 8], [1.5, 1.1, 1]), ([2, 4, 8], [3, 2, 2])]
    errors = [pytest.approx(y) for _, y in lines_of(right)]
    assert errors == [[0.5, 0.1], [0.5, 0.0], [0.5, 0.05]]  # the last is their mean
    assert left.get_xlabel() == "number of samples"
    sets = [result((1, 1, 1.1), transformations=["t"] * 4), result((1, 1, 1), transformations=["t"] * 2)]
    by_sets = plots.convergence(sets).axes[0]
    assert by_sets.get_xlabel() == "number of transformations"
    assert lines_of(by_sets)[2] == ([2, 4], [pytest.approx(1), pytest.approx(1.1)])
    for same in ([], counts[:1], 2 * counts[:1]):
        with pytest.raises(ValueError, match="different numbers of samples or transformations"):
            plots.convergence(same)
    with pytest.raises(TypeError, match="a sequence of results"):
        plots.convergence(counts[0])


def test_feature_maps_draws_the_most_and_the_least_invariant_below_the_input(measured):
    turns = rotations(angles=[90, 0, 30])
    inputs = turns(IMAGES[:1])[0]
    maps = evaluate(network(), IMAGES[:2], turns, STTensor(), layers="0", progress=False)["STTensor"]["0"][0]
    figure = plots.feature_maps(measured, "0", inputs, maps, k=1)
    grid = np.array(figure.axes).reshape(3, 3)
    values = measured.per_channel("NormalizedVariance", "0")
    assert grid[1, 0].get_ylabel().startswith(f"most: map {int(values.argmin())}\n")
    assert grid[2, 0].get_ylabel().startswith(f"least: map {int(values.argmax())}\n")
    assert [axes.get_title() for axes in grid[0]] == ["90°", "0°", "30°"]
    for j in range(3):
        np.testing.assert_allclose(grid[2, j].images[0].get_array(), maps[j, int(values.argmax())].double().numpy())
        assert grid[2, j].images[0].get_clim() == grid[2, 0].images[0].get_clim()  # what changes is the map
    with pytest.raises(ValueError, match=r"`maps` of shape \(3, 4, height, width\), but got \(3, 2, 6, 6\)"):
        plots.feature_maps(measured, "0", inputs, maps[:, :2])
    with pytest.raises(TypeError, match="Expected argument `result` to be one InvarianceResult, but got '0'"):
        plots.feature_maps("0", measured, inputs, maps)
    with pytest.raises(TypeError, match="Expected argument `layer` to be the name of a layer, but got Tensor of shape"):
        plots.feature_maps(measured, inputs, maps, "0")


def test_every_picture_draws_of_one_layer_with_one_channel_and_of_nothing_finite(recwarn):
    for value in (0.5, math.nan, math.inf, 0.0):
        one = InvarianceResult({"NormalizedVariance": {"only": torch.tensor([value]).double()}})
        figures = [plots.heatmap(one), plots.layers(one), plots.evolution([one]), plots.stability([one])]
        figures += [plots.compare(one, one), one.plot()]
        for figure in figures:
            assert isinstance(figure, Figure)
            assert render(figure).ndim == 3
    assert [str(w.message) for w in recwarn if w.category in (UserWarning, RuntimeWarning)] == []


def test_logs_of_a_hundred_and_fifty_layers_stay_small(tmp_path):
    generator = torch.Generator().manual_seed(0)
    layers = {f"backbone.layer{i}": (2 * torch.randn(64 + i, generator=generator).double()).exp() for i in range(150)}
    angles = [22.5 * j for j in range(16)]
    parts = {"NormalizedVariance": {layer: torch.rand(16, generator=generator).tolist() for layer in layers}}
    noise = [
        InvarianceResult(
            {"NormalizedVariance": layers},
            epoch=epoch,
            transformations=[f"{angle}°" for angle in angles],
            parameters={"angle": angles},
            response=parts,
        )
        for epoch in range(50)
    ]
    logger = TensorBoardLogger(tmp_path)

    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))
    trainer = SimpleNamespace(loggers=[logger], fit_loop=loop)
    log_pictures(trainer, noise, {"NormalizedVariance": "NormalizedVariance"})
    logger.experiment.close()
    assert sum(path.stat().st_size for path in tmp_path.rglob("events*")) < 50 * 2**20 / 50


def test_tables_as_pandas():
    pandas = pytest.importorskip("pandas")
    frame = result((1, 0.5, 0.2)).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["layer"].tolist() == ["a", "b", "c"]
    assert frame["mean"].tolist() == pytest.approx([1, 0.5, 0.2])
    assert set(frame["measure"]) == {"NormalizedVariance"}


def test_intervals_without_bias_may_leave_out_the_mean():
    influences = {"ND": {"0": torch.linspace(-1e-3, 1e-3, 24, dtype=torch.float64)}}
    about = {"biases": {"ND": 1.0}, "influences": influences, "confidence": 0.95, "n_samples": 24}
    found = InvarianceResult({"ND": {"0": torch.tensor(0.8, dtype=torch.float64)}}, **about)
    interval = found.interval()["0"]
    assert found.per_layer()["0"] > interval.high
    (bar,) = [c for c in plots.layers(found).axes[0].collections if isinstance(c, LineCollection)]
    assert bar.get_segments()[0][:, 1].tolist() == pytest.approx([interval.low, interval.high])


def test_negative_values_have_colours_of_their_own():
    values = torch.tensor([-2.0, -0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    result = InvarianceResult({"R2": {"a": values}})
    low, middle, high = plots.heatmap(result, "R2").axes[0].images[0].norm([-1.5, 0.0, 0.9])
    assert 0 <= low < middle - 0.2 < high - 0.4
    assert plots.heatmap(result, "R2", limits=(-1, 1)).axes[0].images[0].norm.vmin == -1
