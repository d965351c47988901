"""Pictures of networks of hundreds of layers can be read: labels do not overlap, and stand where their layers are."""

import itertools

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_invariance import InvarianceResult, layer_names, plots
from lightning_invariance.plots.labels import blocks, without_prefix

NAMES = {
    "flat": [f"conv{i}" for i in range(18)],
    "resnet18": [f"net.{name}" for name in layer_names(torchvision.models.resnet18(weights=None))],
    "efficientnet_b0": [
        f"model.backbone.{name}" for name in layer_names(torchvision.models.efficientnet_b0(weights=None))
    ],
    "efficientnet_v2_s": layer_names(torchvision.models.efficientnet_v2_s(weights=None)),
    "hundreds": [str(i) for i in range(600)],
}


def result(names):
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(8, generator=generator).double() + 0.1 for name in names}
    parts = {name: torch.rand(16, generator=generator).tolist() for name in names}
    angles = [22.5 * j for j in range(16)]
    return InvarianceResult(
        {"NormalizedVariance": values},
        n_samples=20,
        transformations=[f"{angle}°" for angle in angles],
        parameters={"angle": angles},
        response={"NormalizedVariance": parts},
        reached={names[2]: 7},
    )


PICTURES = {
    "heatmap": (plots.heatmap, "x"),
    "layers": (plots.layers, "x"),
    "stability": (lambda one: plots.stability([one, one]), "x"),
    "compare": (lambda one: plots.compare(one, one), "x"),
    "evolution": (lambda one: plots.evolution([one] * 40), "y"),
    "response": (plots.response, "y"),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("network", NAMES)
def test_labels_of_layers_do_not_overlap_and_stay_in_the_picture(picture, network):
    names = NAMES[network]
    draw, along = PICTURES[picture]
    figure = draw(result(names))
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    for labels in (axes.xaxis.get_ticklabels(), axes.yaxis.get_ticklabels(), axes.texts):
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        for one, other in itertools.pairwise(sorted(boxes, key=lambda box: (box.x0, box.y0))):
            assert not one.overlaps(other)
        for box in boxes:
            assert box.x0 >= 0
            assert box.y0 >= 0
    assert figure.get_size_inches().max() <= 15
    if (picture, network) != ("response", "flat"):  # which is lines with a colour bar
        assert len({label.get_position()["xy".index(along)] for label in axes.texts}) >= 16


def test_what_all_names_begin_with_is_said_once():
    figure = plots.heatmap(result(["net.a.x", "net.a.y", "net.b"]))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.texts] == ["a.x", "a.y", "b *"]
    assert axes.get_xlabel() == "layers of net   *: reached by some samples only"
    assert without_prefix(["a.b/add", "a.b/mul#1"]) == ("a.b/", ["add", "mul#1"])
    assert without_prefix(["a.b"]) == ("", ["a.b"])
    assert without_prefix(["a", "a.b"]) == ("", ["a", "a.b"])


def test_blocks_stand_for_layers_whose_names_begin_alike():
    names = [f"{block}.{i}.{part}" for block in "ab" for i in range(3) for part in ("conv", "bn", "relu", "drop")]
    assert [block.label for block in blocks(names, 1)] == names
    assert [(b.label, b.start, b.stop) for b in blocks(names, 4)][:2] == [("a.0", 0, 4), ("a.1", 4, 8)]
    assert [(b.label, b.start, b.stop) for b in blocks(names, 5)] == [("a", 0, 12), ("b", 12, 24)]
    assert [b.label for b in blocks([str(i) for i in range(10)], 2.5)] == ["0", "3", "6", "9"]


PARTS = st.lists(st.sampled_from(["a", "b", "conv", "0", "1"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=60), st.floats(0.1, 20))
def test_blocks_are_apart_in_order_and_truly_named(names, room):
    found = blocks(names, room)
    assert found
    for one, other in itertools.pairwise(found):
        assert one.stop <= other.start
        assert other.centre - one.centre >= min(room, 1) - 1e-9
        assert room <= 1 or other.centre - one.centre >= room - 1e-9
    for block in found:
        assert all(name.startswith(block.label) for name in names[block.start : block.stop])


def test_tables_say_how_many_samples_reached_a_layer_where_layers_differ():
    rows = result(["a", "b", "c"]).table()
    assert [row.samples for row in rows] == [20, 20, 7]
    assert str(rows).splitlines()[0].split()[-1] == "samples"
    assert [line.split()[-1] for line in str(rows).splitlines()[1:]] == ["20", "20", "7"]
    same = InvarianceResult({"NormalizedVariance": {"a": torch.ones(2).double()}}, n_samples=20)
    assert "samples" not in str(same.table())
    assert result(["a", "b", "c"]).to_pandas()["samples"].tolist() == [20, 20, 7]


def test_messages_name_a_few_of_hundreds_of_layers():
    names = NAMES["efficientnet_v2_s"]
    one = result(names)
    model = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(300)))

    def raised(call):
        with pytest.raises((KeyError, ValueError, RuntimeError)) as error:
            call()
        return str(error.value)

    messages = [
        raised(lambda: one.per_channel("NormalizedVariance", "feature")),
        raised(lambda: one.per_channel("NormalizedVariance", "zzz")),
        raised(lambda: plots.response(one, layers=["zzz"])),
        raised(lambda: layer_names(model, "zzz")),
        raised(lambda: layer_names(torchvision.models.efficientnet_v2_s(weights=None), "features.6.14.blok")),
    ]
    assert all(len(message) < 300 for message in messages), messages
    assert "Did you mean 'features.6.14.block'" in messages[-1]
    assert "It has features.0.0, " in messages[1]
    assert messages[1].rstrip("\"'").endswith(", ….")
