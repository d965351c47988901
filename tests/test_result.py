"""InvarianceResult: numbers, tables, files."""

import math

import pytest
import torch

from lightning_invariance import InvarianceResult


@pytest.fixture
def result():
    conv = torch.tensor([[[1.0, 3.0]], [[5.0, math.inf]], [[math.nan, 1.0]]], dtype=torch.float64)  # 3 channels of 1×2
    dead = torch.tensor([[[False, False]], [[False, False]], [[False, True]]])
    return InvarianceResult(
        {
            "NV": {"conv": conv, "fc": torch.tensor([0.5, 0.25], dtype=torch.float64)},
            "TV": {"conv": torch.ones(3, 1, 2, dtype=torch.float64), "fc": torch.tensor([math.inf, math.nan]).double()},
        },
        dead={"conv": dead, "fc": torch.tensor([True, False])},
        n_samples=9,
        transformations=["0°", "90°"],
        parameters={"angle": [0, 90]},
        epoch=3,
        step=77,
    )


def test_it_is_a_mapping(result):
    assert list(result) == result.measures == ["NV", "TV"]
    assert result.layers == ["conv", "fc"]
    assert result["NV"]["fc"].tolist() == [0.5, 0.25]
    with pytest.raises(KeyError, match="it has NV, TV"):
        result["SV"]
    assert result == result
    assert len({result, result}) == 1


def test_statistics_are_of_the_finite_values(result):
    row = result.table("NV")[0]
    assert (row.layer, row.shape, row.mean, row.min, row.max) == ("conv", (3, 1, 2), 2.5, 1, 5)
    assert row.std == pytest.approx(math.sqrt((1.5**2 + 0.5**2 + 2.5**2 + 1.5**2) / 3))
    assert (row.dead, row.infinite, row.nan) == (1, 1, 1)
    assert result.per_layer("NV") == {"conv": 2.5, "fc": 0.375}
    assert result.live_mean("NV") == {"conv": 3.0, "fc": 0.25}
    assert result.mean("NV") == (2.5 + 0.375) / 2
    tv = result.per_layer("TV")
    assert tv["conv"] == 1
    assert math.isnan(tv["fc"])
    assert result.mean("TV") == 1


def test_channels(result):
    assert result.per_channel("TV", "conv").tolist() == [1, 1, 1]
    channels = result.per_channel("NV", "conv")
    assert channels[0] == 2
    assert channels[1].isinf()
    assert channels[2].isnan()
    assert result.per_channel("NV", "fc").tolist() == [0.5, 0.25]
    assert result.dead_channels("conv").tolist() == [False, False, False]
    assert result.dead_channels("fc").tolist() == [True, False]
    with pytest.raises(KeyError, match="It has conv, fc"):
        result.per_channel("NV", "nope")


def test_tables_can_be_read(result):
    lines = str(result.table("NV")).splitlines()
    names = ["layer", "shape", "mean", "std", "min", "max", "dead", "infinite", "nan", "live_mean"]
    assert lines[0].split() == names
    assert lines[1].split() == ["conv", "3×1×2", "2.5", "1.915", "1", "5", "1", "(17%)", "1", "(17%)", "1", "3"]
    assert repr(result).startswith(
        "InvarianceResult(NV, TV: 2 layers, 9 samples × 2 transformations, epoch 3, step 77)"
    )
    page = result._repr_html_()
    assert page.count("<table>") == 2
    assert "<td>3×1×2</td>" in page


def assert_same(one, other):
    assert list(one) == list(other)
    for measure in one:
        assert list(one[measure]) == list(other[measure])
        for layer in one[measure]:
            torch.testing.assert_close(one[measure][layer], other[measure][layer], rtol=0, atol=0, equal_nan=True)
    for layer, mask in one.dead.items():
        assert torch.equal(mask, other.dead[layer])
    assert repr(one) == repr(other)
    assert (one.transformations, one.parameters) == (other.transformations, other.parameters)


def test_save_and_load(result, tmp_path):
    result.save(tmp_path / "a.result")  # the very name that was asked for
    assert [path.name for path in tmp_path.iterdir()] == ["a.result"]
    assert_same(result, InvarianceResult.load(tmp_path / "a.result"))
    assert b"cnumpy" not in (tmp_path / "a.result").read_bytes()  # no pickled array


def test_a_failed_save_leaves_the_old_file(result, tmp_path, monkeypatch):
    path = tmp_path / "a.result"
    result.save(path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("numpy.savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        result.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.result"]


def test_state_loads_without_pickle(result, tmp_path):
    torch.save(result.state_dict(), tmp_path / "state.pt")
    assert_same(result, InvarianceResult.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)))


def test_reduced_keeps_channels_and_statistics(result):
    reduced = result.reduced()
    assert reduced["NV"]["conv"].shape == (3,)
    assert repr(reduced) == repr(result)
    for layer in ("conv", "fc"):
        torch.testing.assert_close(
            reduced.per_channel("NV", layer), result.per_channel("NV", layer), rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(reduced.dead_channels(layer), result.dead_channels(layer))
    assert_same(reduced, reduced.reduced())
