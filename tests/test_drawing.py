"""Figures of networks with few and with hundreds of layers: labels are whole and apart, pixels are logged as drawn."""

import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from lightnings import TensorBoardLogger
from matplotlib.colors import LogNorm
from matplotlib.text import Text
from PIL import Image
from test_callback import events

from lightning_invariance import InvarianceResult, layer_names, plots
from lightning_invariance.monitor.logging import DPI, SIZE, log_pictures
from lightning_invariance.plots.common import render

LONG = "a_module_with_a_very_long_name_{}.and_one_within_it.convolution_number_{}"
GENERATOR = torch.Generator().manual_seed(0)
NAMES = {
    "two": [LONG.format(0, i) for i in range(2)],
    "twelve": [LONG.format(0, i) for i in range(12)],
    "twenty": [LONG.format(i // 7, i) for i in range(20)],
    "resnet18": [f"net.{name}" for name in layer_names(torchvision.models.resnet18(weights=None))],
    "efficientnet_v2_s": layer_names(torchvision.models.efficientnet_v2_s(weights=None)),
    "numbers": [str(i) for i in range(600)],
}


def result(names, epoch=0, **about):
    values = {name: (torch.rand(8, generator=GENERATOR) + 0.1).double() for name in names}
    parts = {name: torch.rand(16, generator=GENERATOR).tolist() for name in names}
    return InvarianceResult(
        {"NormalizedVariance": values},
        dead={name: torch.arange(8) == 3 for name in names},
        n_samples=20,
        transformations=[f"a transformation with a long name {j}" for j in range(16)],
        response={"NormalizedVariance": parts},
        reached={names[0]: 7},
        epoch=epoch,
        scores={"validation_accuracy_of_all_classes_together": 0.5},
        outputs={"accuracy": {"values": [0.5] * 16, "higher_is_better": True}},
        **about,
    )


def shifted(names):
    places = {"x": [j % 4 for j in range(16)], "y": [j // 4 for j in range(16)]}
    return result(names, parameters=places)


PICTURES = {
    "heatmap": lambda names: plots.heatmap(result(names)),
    "layers": lambda names: plots.layers(result(names)),
    "stability": lambda names: plots.stability([result(names), result(names)]),
    "compare": lambda names: plots.compare(result(names), result(names)),
    "evolution": lambda names: plots.evolution([result(names, epoch) for epoch in range(1000, 1040)]),
    "response": lambda names: plots.response(result(names)),
    "maps": lambda names: plots.response(shifted(names)),
}


def boxes_of_texts(figure):
    """The boxes of all texts that are drawn: labels of ticks beyond the ends of an axis are not."""
    beyond = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        outside = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
        beyond |= {label for tick in outside for label in (tick.label1, tick.label2)}
    visible = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return {text: text.get_window_extent() for text in visible if text not in beyond}


@pytest.mark.parametrize("network", NAMES)
@pytest.mark.parametrize("picture", PICTURES)
def test_no_text_is_cut_off_or_overlaps_another(picture, network):
    figure = PICTURES[picture](NAMES[network])
    image = render(figure)
    height, width = image.shape[:2]
    assert max(height, width) <= 1500
    boxes = boxes_of_texts(figure)
    assert len(boxes) > (5 if network in ("two", "twelve", "twenty") or picture == "maps" else 20)
    for text, box in boxes.items():
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5)), (one, other)
    for border in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (border == 255).all()


def test_a_long_history_adds_no_labels():
    few, many = (plots.evolution([result(NAMES["twenty"], e) for e in range(n)]).findobj(Text) for n in (40, 500))
    assert len(many) <= len(few)


def test_cells_have_the_colours_of_their_values():
    figure = plots.evolution([result(NAMES["twenty"][:5], epoch) for epoch in range(4)])
    axes, image = figure.axes[1], render(figure)
    (cells,) = axes.images
    values = cells.get_array()
    assert values.shape == (5, 4)
    assert isinstance(cells.norm, LogNorm)
    for row, column in itertools.product(range(5), range(4)):
        x, y = axes.transData.transform((column + 0.3, row + 0.3))
        expected = cells.to_rgba(values[row, column], bytes=True)[:3]
        assert image[image.shape[0] - 1 - int(y), int(x)].tolist() == list(expected)


def test_what_is_logged_is_the_picture(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=3))
    trainer = SimpleNamespace(loggers=[logger], fit_loop=loop)
    last = result(NAMES["resnet18"])
    log_pictures(trainer, [result(NAMES["resnet18"]), last], {"NormalizedVariance": "tag"}, (0.2, 5))
    logger.experiment.flush()
    logged = events(tmp_path)
    assert logged.Tags()["images"] == ["tag/heatmap", "tag/evolution", "tag/response"]
    (image,) = logged.Images("tag/heatmap")
    found = np.array(Image.open(io.BytesIO(image.encoded_image_string)))
    drawn = plots.heatmap(last, title="tag", size=SIZE, limits=(0.2, 5))
    drawn.set_dpi(DPI)
    np.testing.assert_array_equal(found, render(drawn))
    assert (image.height, image.width, image.step) == (*found.shape[:2], 3)
