"""Trouble around an evaluation: threads, models that change themselves, broken files, wrappers."""

import json
import threading

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_invariance import InvarianceResult, TransformationSet, evaluate, rotations

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TURNS = rotations(4)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def values_of(model, data=IMAGES):
    return evaluate(model, data, TURNS, batch_size=4, progress=False)["NormalizedVariance"]


@pytest.mark.parametrize("models", ["two", "one"])
def test_two_threads_have_the_values_of_one_and_leave_nothing_behind(models):
    one = network()
    both = [one, one if models == "one" else network()]
    expected, found, errors = values_of(network()), [{}, {}], []

    def run(i):
        try:
            found[i] = values_of(both[i])
        except Exception as error:
            errors.append(error)

    for _ in range(5):
        state = torch.get_rng_state()
        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert all(list(values) == list(expected) for values in found)
        assert all(torch.equal(values[layer], expected[layer]) for values in found for layer in expected)
        assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for model in both for module in model.modules())
    compiled = []
    torch.compile(network(), backend=lambda graph, _: compiled.append(1) or graph)(IMAGES)
    assert compiled  # the stance is what it was


class Counting(nn.Module):
    """Changes itself when it runs: buffers in place and anew, and a parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(1), persistent=False)
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean().reshape(1)
        self.factor.data *= 0.5
        return self.conv(x)


def test_buffers_and_parameters_are_restored():
    model = Counting()
    calls, last = model.calls, model.last
    evaluate(model, IMAGES, TURNS, progress=False)
    assert model.calls is calls
    assert model.last is last
    assert model.calls == 0
    assert model.last == 0
    assert model.factor == 1
    with pytest.raises(ArithmeticError):
        evaluate(model, IMAGES, TURNS, forward=lambda model, x: (model(x), 1 // 0), progress=False)
    assert model.calls == 0


def test_a_parameter_that_is_too_large_to_copy_must_stay(monkeypatch):
    monkeypatch.setattr("lightning_invariance.model.snapshot.LARGEST_COPY", 0)

    class InPlace(Counting):
        def forward(self, x):
            self.factor.mul_(0.5)
            return self.conv(x)

    with pytest.raises(RuntimeError, match="leave large tensors as they are, but it changed factor of shape"):
        evaluate(InPlace(), IMAGES, TURNS, progress=False)


def test_results_made_in_inference_mode_are_plain_tensors():
    with torch.inference_mode():
        values = values_of(network())
    assert not any(value.is_inference() for value in values.values())
    assert all(
        torch.equal(value, other) for value, other in zip(values.values(), values_of(network()).values(), strict=True)
    )


def test_models_and_loaders_of_fabric_are_unwrapped():
    fabric = Fabric(accelerator="cpu", devices=1)
    model, loader = fabric.setup(network()), fabric.setup_dataloaders(DataLoader(TensorDataset(IMAGES), batch_size=5))
    values, expected = values_of(model, loader), values_of(network())
    assert list(values) == list(expected)
    assert all(torch.equal(values[layer], expected[layer]) for layer in expected)


def test_a_transformation_that_gives_no_numbers_is_named():
    def nowhere(x):
        return x.to("meta")

    turns = TransformationSet.from_callables({"same": lambda x: x, "nowhere": nowhere})
    with pytest.raises(ValueError, match="'nowhere' made .* of torch.float32 on meta"):
        evaluate(network(), IMAGES, turns, progress=False)
    turns = TransformationSet.from_callables({"same": lambda x: x, "wide": lambda x: x.double()})
    with pytest.raises(ValueError, match="'wide' made .* of torch.float64 on cpu"):
        evaluate(network(), IMAGES, turns, progress=False)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "other arrays", "no statistics"])
def test_a_broken_file_is_one_clear_error_that_names_it(damage, tmp_path):
    path = tmp_path / "some.result"
    evaluate(network(), IMAGES, TURNS, progress=False).save(path)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "text":
        path.write_text("not a result")
    elif damage == "other arrays":
        with path.open("wb") as file:
            np.savez(file, x=np.ones(3))
    else:
        with np.load(path) as arrays:
            kept = {**arrays, "about": np.array(json.dumps({"n_samples": 3}))}
        with path.open("wb") as file:
            np.savez(file, **kept)
    with pytest.raises(ValueError, match=r"some\.result' to be a file that `InvarianceResult\.save` wrote"):
        InvarianceResult.load(path)
    with pytest.raises(FileNotFoundError):
        InvarianceResult.load(tmp_path / "none.result")


def test_unknown_entries_of_a_result_are_ignored(tmp_path):
    result = evaluate(network(), IMAGES, TURNS, progress=False)
    state = result.state_dict()
    state["new"] = 1
    for row in state["statistics"]["NormalizedVariance"]:
        row["new"] = 2.0
    assert InvarianceResult.from_state_dict(state).per_layer() == result.per_layer()
