"""What the figures draw."""

import math
import sys
from collections import OrderedDict

import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.text import Text

from lightning_invariance import InvarianceResult, compare, evaluate, plots, rotations
from lightning_invariance.measures import NormalizedVariance
from lightning_invariance.plots import evolution, heatmap, layers
from lightning_invariance.plots.common import render
from lightning_invariance.plots.style import DEAD, INFINITE


def result(fc=(0.5, 0.0, math.inf, math.nan, 1.0), epoch=0):
    values = {"conv": torch.tensor([[[0.1, 0.3]], [[2.0, 4.0]]]).double(), "fc": torch.tensor(fc).double()}
    dead = {"conv": torch.zeros(2, 1, 2, dtype=torch.bool), "fc": torch.tensor([0, 0, 0, 0, 1]).bool()}
    return InvarianceResult({"NormalizedVariance": values, "TransformationVariance": values}, dead=dead, epoch=epoch)


def texts(labels):
    return [label.get_text() for label in labels]


def test_heatmap_draws_the_channels_of_every_layer():
    figure = heatmap(result())
    axes = figure.axes[0]
    values, infinite, dead = axes.images
    shown = values.get_array()
    assert len(shown) % 10 == 0  # the two channels of one layer and the five of the other, each of equal height
    conv, fc = shown[:: len(shown) // 2, 0], shown[:: len(shown) // 5, 1]
    scale = values.norm
    assert scale.vmin * scale.vmax == pytest.approx(1)  # 1 is the middle
    assert conv.tolist() == pytest.approx([max(0.2, scale.vmin), 3.0])
    assert fc[:2].tolist() == [0.5, scale.vmin]  # 0 has the colour of the end, and is no hole in a logarithmic scale
    assert fc.filled(math.nan)[4] == 1.0
    assert [math.isfinite(value) for value in fc.filled(math.nan)] == [True, True, False, False, True]
    for image, colour, position in ((infinite, INFINITE, 2), (dead, DEAD, 4)):
        drawn = ~image.get_array().mask
        assert not drawn[:, 0].any()
        assert drawn[:: len(drawn) // 5, 1].nonzero()[0].tolist() == [position]
        assert image.get_cmap()(0) == to_rgba(colour)
    assert texts(axes.get_xticklabels()) == ["conv", "fc ∞"]
    assert texts(figure.legends[0].get_texts()) == ["1 infinite channels", "1 dead channels", "1 NaN channels"]
    assert axes.get_title().replace("\n", " ") == "NormalizedVariance: 0 samples × 0 transformations, epoch 0"


def test_scales_of_normalised_measures_are_symmetric_about_1_and_hold_the_values():
    for fc, reach in ((0.02, 50.0), (5.0, 5.0)):  # of 0.2, 3 and five times fc
        scale = heatmap(result(fc=(fc,) * 5)).axes[0].images[0].norm
        assert (1 / scale.vmin, scale.vmax) == pytest.approx((reach, reach))
    narrow = InvarianceResult({"NormalizedVariance": {"a": torch.tensor([0.99, 1.01]).double()}})
    assert heatmap(narrow).axes[0].images[0].norm.vmax == 1.25
    assert heatmap(narrow, limits=(0.9, 2)).axes[0].images[0].norm.vmin == 0.9
    free = heatmap(result(fc=(0.02,) * 5), "TransformationVariance").axes[0].images[0].norm
    assert (free.vmin, free.vmax) == pytest.approx((0.02, 3.0))


def test_heatmap_of_dead_or_undefined_layers_draws():
    for fc in ((math.nan,) * 5, (math.inf,) * 5, (0.0,) * 5):
        for measure in ("NormalizedVariance", "TransformationVariance"):
            assert render(heatmap(result(fc), measure)).shape[2] == 3


def test_evolution_draws_layers_against_evaluations():
    history = [result((value,) * 5, epoch) for epoch, value in ((-1, 1.0), (0, 0.5), (1, 0.25))]
    axes = evolution(history).axes[0]
    rows = axes.images[0].get_array()
    assert rows[0].tolist() == pytest.approx([1.6, 1.6, 1.6])
    assert rows[1].tolist()[:2] == [1.0, 0.5]
    assert rows[1][2] == axes.images[0].norm.vmin >= 0.25  # one of six values may lie beyond the scale
    assert texts(axes.get_yticklabels()) == ["conv", "fc"]
    assert texts(axes.get_xticklabels()) == ["init", "0", "1"]
    many = evolution([result(epoch=epoch) for epoch in range(100)]).axes[0]
    assert len(many.get_xticklabels()) == 20
    with pytest.raises(ValueError, match="it is empty"):
        evolution([])


def test_layers_draws_a_line_for_each_result():
    axes = layers({"a": result((1.0,) * 5), "b": result((0.5,) * 5)}, dashed="b").axes[0]
    assert [line.get_ydata()[1] for line in axes.lines] == [1.0, 0.5]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--"]
    assert texts(axes.get_legend().get_texts()) == ["a", "b"]
    with pytest.raises(ValueError, match="it is empty"):
        layers({})


def test_many_results_have_a_line_and_a_mark_of_their_own():
    axes = layers({f"network {i}": result((i / 24,) * 5) for i in range(24)}).axes[0]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 24
    axes.figure.canvas.draw()
    inside, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    assert inside.x0 < legend.x0 < legend.x1 < inside.x1
    assert inside.y0 < legend.y0 < legend.y1 < inside.y1


def test_pictures_change_nothing_and_need_no_pyplot(recwarn):
    one = result()
    before = repr(one)
    for figure in (heatmap(one), evolution([one]), layers({"a": one})):
        render(figure)
    assert repr(one) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    assert [str(w.message) for w in recwarn if w.category is UserWarning] == []


def test_a_channel_of_the_heatmap_leaves_out_nan_as_the_mean_of_the_layer_does():
    values = torch.tensor([[[2.0, math.nan, 4.0]], [[math.nan, math.nan, math.nan]], [[1.0, math.inf, math.nan]]])
    axes = heatmap(InvarianceResult({"Goodfellow": {"conv": values.double()}})).axes[0]
    shown, infinite = axes.images[0].get_array(), axes.images[1].get_array()
    of_channels = shown[:: len(shown) // 3, 0].filled(math.nan)
    assert of_channels[0] == 3.0
    assert math.isnan(of_channels[1])
    assert (~infinite.mask)[:: len(shown) // 3, 0].tolist() == [False, False, True]


def test_names_that_begin_with_an_underscore_stand_in_legends():
    torch.manual_seed(0)
    layers_of = OrderedDict(stem=torch.nn.Conv2d(1, 2, 3), _bn=torch.nn.BatchNorm2d(2), _fc=torch.nn.ReLU())
    model = torch.nn.Sequential(layers_of)
    measures = [NormalizedVariance(response=True)]
    x = torch.rand(32, 1, 6, 6)
    result, fewer = (evaluate(model.eval(), x, rotations(4), measures, max_samples=n) for n in (None, 16))
    # The normalised variance does not change in the batch norm, which shares a line of the response.
    for figure, names in (
        (plots.response(result), ["stem + _bn", "_fc"]),
        (plots.convergence([result, fewer]), ["stem", "_bn", "_fc"]),
    ):
        legend = figure.legends[0]
        assert [text.strip() for text in texts(legend.get_texts())] == names
        colours = [line.get_color() for line in figure.axes[0].lines[: len(names)]]
        assert [line.get_color() for line in legend.get_lines()] == colours
    axes = plots.layers({"_a": result, "b": result}).axes[0]
    assert [text.strip() for text in texts(axes.get_legend().get_texts())] == ["_a", "b"]


def test_dots_are_those_of_the_results_that_are_drawn(tmp_path):
    """Results that are loaded and forgotten, one after the other, may have the identity of the one before."""
    torch.manual_seed(0)
    x, models = torch.rand(32, 1, 6, 6), (torch.nn.Conv2d(1, 2, 3), torch.nn.AdaptiveAvgPool2d(1))
    last, other = (
        evaluate(torch.nn.Sequential(model), x, rotations(4), confidence=0.95, progress=False) for model in models
    )
    for name, each in (("same", last), ("other", other)):
        each.save(tmp_path / name)
    assert compare(other, last).differing == ["0"]
    for name in 10 * ["same", "other"]:
        figure = evolution([InvarianceResult.load(tmp_path / name), last])
        assert any("dots" in text.get_text() for text in figure.findobj(Text)) == (name == "other")
