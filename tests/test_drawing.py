"""Pictures are drawn with little, and show the same as matplotlib would: nothing cut off, nothing over another."""

import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightnings import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from test_callback import events

from lightning_invariance import InvarianceResult, plots
from lightning_invariance.monitor.logging import log_pictures
from lightning_invariance.plots.common import render

LONG = "a_module_with_a_very_long_name_{}.and_one_within_it.convolution_number_{}"
GENERATOR = torch.Generator().manual_seed(0)


def result(count, epoch=0, scale=1.0, name=LONG, transformations="a transformation with a long name {}", **about):
    names = [name.format(i // 7, i) for i in range(count)]
    values = {name: (scale * torch.rand(8, generator=GENERATOR) + 0.1).double() for name in names}
    parts = {name: torch.rand(16, generator=GENERATOR).tolist() for name in names}
    return InvarianceResult(
        {"NormalizedVariance": values},
        dead={name: torch.arange(8) == 3 for name in names},
        n_samples=20,
        transformations=[transformations.format(j) for j in range(16)],
        response={"NormalizedVariance": parts},
        reached={names[0]: 7},
        epoch=epoch,
        scores={"validation_accuracy_of_all_classes_together": 0.5},
        outputs={"accuracy": {"values": [0.5] * 16, "higher_is_better": True}},
        **about,
    )


def shifted(count):
    places = {"x": [j % 4 for j in range(16)], "y": [j // 4 for j in range(16)]}
    return result(count, parameters=places)


PICTURES = {
    "heatmap": lambda count: plots.heatmap(result(count)),
    "evolution": lambda count: plots.evolution([result(count, epoch) for epoch in range(1000, 1040)]),
    "response": lambda count: plots.response(result(count)),
    "maps": lambda count: plots.response(shifted(count)),
}


def texts_of(figure):
    """The texts that are drawn, which those of ticks beyond the ends of an axis are not, and their boxes."""
    figure.canvas.draw()
    axis = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = [(tick, sorted(one.get_view_interval())) for one in axis for tick in one.get_major_ticks()]
    beyond = {tick.label1 for tick, (low, high) in ticks if not low <= tick.get_loc() <= high}
    visible = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return {text: text.get_window_extent() for text in visible if text not in beyond}


@pytest.mark.parametrize("count", [2, 8, 20, 50, 300])
@pytest.mark.parametrize("picture", PICTURES)
def test_no_text_is_cut_off_or_overlaps_another(picture, count):
    figure = PICTURES[picture](count)
    width, height = figure.bbox.size
    boxes = texts_of(figure)
    assert len(boxes) > 5
    for text, box in boxes.items():
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5)), (one, other)
    # The same is true of the picture that is logged: nothing touches its border.
    image = render(figure)
    assert image.shape == (round(height), round(width), 3)
    for border in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (border == 255).all()


@pytest.mark.parametrize("count", [50, 120])
def test_a_long_history_adds_no_artists(count):
    few, many = (plots.evolution([result(count, epoch) for epoch in range(length)]).findobj() for length in (40, 500))
    assert len(many) <= len(few)


@pytest.mark.parametrize("angle", [0, 90])
@pytest.mark.parametrize("text", ["layer1.0.conv1 * ∞", "…gy_of_a_module", "features.6.14", "გ.1", "$x^2$", "a\nbc"])
def test_texts_stand_where_matplotlib_draws_them(text, angle):
    for ha, va in itertools.product(("left", "right", "center"), ("top", "baseline", "center_baseline")):
        figure = Figure((3, 3), dpi=100)
        FigureCanvasAgg(figure)
        figure.text(0.5, 0.5, text, rotation=angle, ha=ha, va=va, fontsize=10)
        ends = []
        figure.canvas.draw()
        for image in (render(figure), np.array(figure.canvas.buffer_rgba())[..., :3]):
            rows, columns = (image < 128).any(2).nonzero()
            ends.append([rows.min(), rows.max(), columns.min(), columns.max()])
        # Letters are hinted to whole pixels, which lets the width of a text differ by a few.
        np.testing.assert_allclose(ends[0], ends[1], atol=4 + len(text) / 8)


def test_cells_have_the_colours_of_their_values():
    figure = plots.evolution([result(5, epoch) for epoch in range(4)])
    axes, image = figure.axes[1], render(figure)
    (cells,) = axes.images
    values = cells.get_array()
    assert values.shape == (5, 4)
    assert isinstance(cells.norm, LogNorm)
    for row, column in itertools.product(range(5), range(4)):
        x, y = axes.transData.transform((column + 0.3, row + 0.3))
        expected = cells.to_rgba(values[row, column], bytes=True)[:3]
        assert image[image.shape[0] - 1 - int(y), int(x)].tolist() == list(expected)


def test_figures_can_be_enlarged_and_saved():
    figure = plots.evolution([result(5, epoch) for epoch in range(4)])
    figure.axes[1].set_xlim(0.5, 1.5)
    assert render(figure).shape[2] == 3
    for kind in ("png", "pdf", "svg"):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=250)
        assert file.tell() > 1000


def test_what_is_logged_is_the_picture(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=3))
    trainer = SimpleNamespace(loggers=[logger], fit_loop=loop)
    last = result(30)
    log_pictures(trainer, [result(30), last], {"NormalizedVariance": "tag"})
    logger.experiment.flush()
    logged = events(tmp_path)
    assert logged.Tags()["images"] == ["tag/heatmap", "tag/evolution", "tag/response"]
    (image,) = logged.Images("tag/heatmap")
    found = np.array(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(found, render(plots.heatmap(last)))
    assert (image.height, image.width, image.step) == (*found.shape[:2], 3)
