"""Names of layers in pictures, tables and messages of networks with hundreds of layers."""

import itertools

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_invariance import InvarianceResult, layer_names, plots
from lightning_invariance.plots.labels import blocks, without_prefix


def result(names):
    # Neighbours of equal values would share a row.
    values = {name: torch.full((8,), 1.0 + i).double() for i, name in enumerate(names)}
    response = {"NormalizedVariance": {name: [0.5, 1.0] for name in names}}
    return InvarianceResult(
        {"NormalizedVariance": values},
        n_samples=20,
        transformations=["0°", "90°"],
        response=response,
        reached={names[2]: 7},
    )


def test_what_all_names_begin_with_is_said_once():
    figure = plots.heatmap(result(["net.a.x", "net.a.y", "net.b"]))
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a.x", "a.y", "b *"]
    assert axes.get_xlabel() == "layers of net   *: reached by some samples only"
    assert without_prefix(["a.b-add", "a.b-mul#1"]) == ("a.b-", ["add", "mul#1"])
    assert without_prefix(["a.b"]) == ("", ["a.b"])
    assert without_prefix(["input", "net.a", "net.b"]) == ("net.", ["input", "a", "b"])
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
    network = torchvision.models.efficientnet_v2_s(weights=None)
    one = result(layer_names(network))
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
        raised(lambda: layer_names(network, "features.6.14.blok")),
    ]
    assert all(len(message) < 300 for message in messages), messages
    assert "Did you mean 'features.6.14.block'" in messages[-1]
    assert "It has features.0.0, " in messages[1]
    assert messages[1].rstrip("\"'").endswith(", ….")
