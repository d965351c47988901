"""The memory that the sums of a walk take is known before the walk, and a budget is kept."""

import sys

import pytest
import torch
from torch import nn

from lightning_invariance import evaluate, rotations
from lightning_invariance.engine import budget as memory
from lightning_invariance.engine import collect as collecting
from lightning_invariance.engine import column_chunks
from lightning_invariance.engine.registry import Registry
from lightning_invariance.measures import (
    Anova,
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleVariance,
    VarianceSameEquivariance,
)

TURNS = rotations(4)
MEASURES = {
    "NV": [NormalizedVariance()],
    "NV with response": [NormalizedVariance(response=True)],
    "variances": [NormalizedVariance(), SampleVariance(), Anova("f", paired=True)],
    "standard deviations": [NormalizedVariance(squared=False)],
    "distances": [NormalizedDistance(), NormalizedVariance()],
    "firing": [Goodfellow(0.1, "quantile")],
    "same-equivariance": [VarianceSameEquivariance(), DistanceSameEquivariance(mask=True)],
}


class Counting(nn.Module):
    """Convolutions, tokens, and a head; counts the inputs it has seen."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)
        self.inputs = 0

    def forward(self, x):
        self.inputs += len(x)
        maps = self.conv(x)
        return self.head(maps.flatten(2).movedim(1, 2)).mean(1)


def held_by(registry):
    return sum(layer.nbytes for layer in registry.layers.values())


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("size", [6, 40])  # the sums of small layers are in float64
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bytes_are_known_before_the_walk(name, size, dtype, monkeypatch):
    told, held = [], []
    needed, collect = memory.needed_bytes, collecting.collect
    monkeypatch.setattr(memory, "needed_bytes", lambda *args: told.append(needed(*args)) or told[-1])
    evaluating = sys.modules["lightning_invariance.evaluate"]  # the package has a function of this name
    monkeypatch.setattr(evaluating, "collect", lambda registry: held.append(held_by(registry)) or collect(registry))
    images = torch.rand(20, 1, size, size, dtype=dtype)
    evaluate(Counting().to(dtype), images, TURNS, MEASURES[name], batch_size=32, progress=False)
    assert told[0][1] == pytest.approx(held[0], rel=0.02)


def test_what_does_not_fit_into_memory_is_said_before_the_first_batch(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**6)
    model, images = Counting(), torch.rand(40, 1, 64, 64)
    measures = [NormalizedVariance(), NormalizedDistance()]
    with pytest.raises(
        MemoryError,
        match=r"of 2 layers for 4 transformations to fit into the 1 MB that are free on cpu, but they will take"
        r" \d+(\.\d+)? MB \(NormalizedVariance .* MB, NormalizedDistance .* MB\). Measure fewer layers with `layers=`",
    ):
        evaluate(model, images, TURNS, measures, progress=False)
    assert model.inputs < 20  # those of the probe
    result = evaluate(model, images, TURNS, NormalizedVariance(), layers="head", progress=False)
    assert result.layers == ["head"]


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("batch_size", [2, 64])
@pytest.mark.parametrize("part", [1.0, 1.4, 1.7])
def test_a_budget_is_kept(squared, batch_size, part, monkeypatch):
    held, collect = [], column_chunks.collect
    monkeypatch.setattr(column_chunks, "collect", lambda registry: held.append(held_by(registry)) or collect(registry))
    activations = 40 * 40 * (6 + 3)
    budget = int(part * activations * (80 if squared else 88))
    measure, images = NormalizedVariance(squared), torch.rand(6, 1, 40, 40, dtype=torch.float64)
    turns, model = rotations(16), Counting().double()
    expected = evaluate(model, images, turns, measure, progress=False)
    found = evaluate(model, images, turns, measure, batch_size=batch_size, state_budget=budget, progress=False)
    assert len(held) > 1
    assert max(held) <= budget
    assert expected.layers == found.layers
    for layer, values in expected["NormalizedVariance"].items():
        torch.testing.assert_close(found["NormalizedVariance"][layer], values, rtol=1e-9, atol=0)


def test_a_budget_that_cannot_be_kept_is_refused():
    activations = 40 * 40 * (6 + 3)
    model, images = Counting(), torch.rand(6, 1, 40, 40)
    with pytest.raises(
        ValueError, match=f"but got 1000 bytes: {activations} activations take at least {80 * activations}"
    ):
        evaluate(model, images, TURNS, NormalizedVariance(), state_budget=1000, progress=False)
    with pytest.raises(ValueError, match="`state_budget` to be larger, but got 500000 bytes"):
        evaluate(model, images, TURNS, NormalizedDistance(), state_budget=500_000, progress=False)


def test_what_is_free_in_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    whole = memory.free_bytes(torch.device("cpu"))
    if whole is None:
        pytest.skip("no /proc/meminfo here")
    for name, text in (
        ("max", "1000000"),
        ("current", "900000"),
        ("stat", "anon 400000\nactive_file 1\ninactive_file 2"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free_bytes(torch.device("cpu")) == 100_003  # files that were read give way
    (tmp_path / "memory.max").write_text("max")
    assert memory.free_bytes(torch.device("cpu")) > 100_003


@pytest.mark.parametrize("name", MEASURES)
def test_on_other_devices_sums_are_in_float64(name):
    named = {type(measure).__name__: measure for measure in MEASURES[name]}
    registry = Registry(named, TURNS, 20, 16)
    activations = {"conv": ((6, 40, 40), torch.float32, 0), "head": ((3,), torch.float32, 0)}
    on_cpu, on_another = (
        memory.needed_bytes(registry, activations, 64, torch.device(kind))[1] for kind in ("cpu", "cuda")
    )
    assert on_cpu <= on_another <= 2 * on_cpu
    if name == "NV":
        k, m = 6 * 40 * 40, 4
        assert on_another == 8 * (m + 3) * (k + 3)
        assert on_cpu == (4 * (m + 1) + 8 * 2) * k + 8 * (m + 3) * 3


def test_influences_are_counted():
    """They take some 50 bytes and m float32 means of each activation: sums that fit may not fit with them."""
    x, model = torch.rand(8, 3, 16, 16), torch.nn.Sequential(torch.nn.Identity())
    sums = 3 * 16 * 16 * (4 * 4 + 3 * 8)
    with pytest.raises(ValueError, match="`confidence=` needs"):
        evaluate(model, x, rotations(4), batch_size=8, state_budget=int(1.2 * sums), confidence=0.95)
    evaluate(model, x, rotations(4), batch_size=8, state_budget=3 * sums, confidence=0.95)


def within_budget():
    return evaluate(
        Counting().double(), torch.rand(2, 1, 40, 40, dtype=torch.float64), rotations(16), state_budget=1_200_000
    )


def test_processes_keep_a_budget_together_also_one_without_samples(ranks):
    torch.manual_seed(0)
    expected = within_budget()["NormalizedVariance"]
    for found in ranks(within_budget):
        for layer, values in expected.items():
            torch.testing.assert_close(found["NormalizedVariance"][layer], values, rtol=1e-9, atol=0)
