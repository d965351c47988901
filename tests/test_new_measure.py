"""A measure made outside of the package: that of examples/new_measure.py."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_callback import fit
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection

from lightning_invariance import InvarianceMonitor, evaluate, plots, rotations
from lightning_invariance.accumulators import Accumulator
from lightning_invariance.measures import Measure, Stratified
from lightning_invariance.testing import MeasureTester

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from new_measure import NormalizedRange, Ranges

IMAGES = torch.rand(13, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(13) % 2


def definition(st):
    x = st.double().numpy()
    return torch.from_numpy(np.ptp(x, axis=1).mean(0) / np.ptp(x, axis=0).mean(0))


class TestNormalizedRange(MeasureTester):
    def make(self):
        return NormalizedRange()

    def definition(self, st):
        return definition(st)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ELU(), nn.Flatten(), nn.Linear(108, 4)).double()


def cube(images):
    with torch.no_grad():
        return network()(rotations(4)(images).flatten(0, 1)).unflatten(0, (len(images), 4))


def measured(batch_size=8):
    measures = {"range": NormalizedRange(), "classes": Stratified(NormalizedRange(), 2)}
    return evaluate(network(), TensorDataset(IMAGES, LABELS), rotations(4), measures, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_in_evaluate_and_for_each_class(batch_size):
    result = measured(batch_size)
    torch.testing.assert_close(result["range"]["3"], definition(cube(IMAGES)), rtol=1e-9, atol=0)
    classes = [definition(cube(IMAGES[label == LABELS])) for label in range(2)]
    torch.testing.assert_close(result["classes"]["3"], torch.stack(classes).mean(0), rtol=1e-9, atol=0)
    assert result.ratios == {"range": True, "classes": True}


def test_in_tables_and_pictures():
    result = measured()
    assert result.table("range")[3].shape == (4,)
    assert plots.heatmap(result, "range").axes
    assert plots.layers(result, "range").axes


def test_in_the_callback(tmp_path):
    monitor = InvarianceMonitor(rotations(4), measures=[NormalizedRange()])
    fit(tmp_path, monitor, epochs=1)
    assert [result.epoch for result in monitor.history] == [-1, 0]
    assert all(np.isfinite(result.mean("NormalizedRange")) for result in monitor.history)


def in_process(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    metric = NormalizedRange()
    if rank:
        metric.update(cube(IMAGES))
    result = measured()
    found = {"by hand": metric.compute(), "range": result["range"]["3"], "classes": result["classes"]["3"]}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_in_two_processes(tmp_path):
    mp.start_processes(in_process, (2, str(tmp_path)), 2, start_method="spawn")
    alone = measured()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["by hand"], definition(cube(IMAGES)), rtol=1e-9, atol=0)
        for name in ("range", "classes"):
            torch.testing.assert_close(found[name], alone[name]["3"], rtol=1e-9, atol=0)


@dataclass(frozen=True)
class Scaled(Accumulator):
    """A sum with an argument."""

    factor: object = 1.0

    def empty(self):
        return {"total": torch.zeros(0)}

    def add(self, states, rows):
        factor = self.factor if isinstance(self.factor, float) else 2.0
        added = factor * rows.flat.double().sum((0, 1))
        return {"total": states["total"] + added if rows.before else added}

    def merge(self, a, b):
        return {"total": a["total"] + b["total"]}


class Total(Measure):
    def __init__(self, factor=1.0):
        super().__init__([Scaled(factor)])

    def value(self, sums):
        return sums["total"]


def test_measures_whose_accumulators_differ_in_an_argument_never_share():
    zeros, ones = torch.zeros(3, 4, 5), torch.ones(3, 4, 5)
    metrics = MetricCollection({"one": Total(1.0), "two": Total(2.0)})
    for block in (zeros, ones):  # after the first, the states of both are the same
        metrics.update(block)
    assert {name: value.tolist() for name, value in metrics.compute().items()} == {"one": [12] * 5, "two": [24] * 5}
    measures = {"one": Total(1.0), "two": Total(2.0), "again": Total(1.0)}
    result = evaluate(nn.Flatten(), IMAGES, rotations(4), measures)
    torch.testing.assert_close(result["two"]["Flatten"], 2 * result["one"]["Flatten"], rtol=1e-12, atol=0)
    assert torch.equal(result["again"]["Flatten"], result["one"]["Flatten"])


def test_measures_with_other_arguments_do_not_merge():
    one, other = Total(1.0), Total(2.0)
    for metric in (one, other):
        metric.update(torch.ones(3, 4, 5))
    with pytest.raises(ValueError, match="a Total with the same arguments"):
        one.merge_state(other)


def test_functions_are_told_apart_even_if_their_names_are_equal():
    metrics = MetricCollection({"a": Total(lambda: 1), "b": Total(lambda: 2)})
    metrics.update(torch.zeros(3, 4, 5))
    assert len(metrics.compute_groups) == 2


@dataclass(frozen=True)
class Broken(Accumulator):
    """An accumulator that does not keep to the contract."""

    empty_state: object = None
    added_state: object = None

    def empty(self):
        return {"state": self.empty_state}

    def add(self, states, rows):
        return {"state": self.added_state}

    def merge(self, a, b):
        return a


class NotFrozen(Ranges):
    pass


@pytest.mark.parametrize(
    ("accumulators", "error", "message"),
    [
        ([NotFrozen()], TypeError, "NotFrozen to be a frozen dataclass"),
        ([Broken(torch.zeros(0, dtype=torch.float16))], TypeError, "state 'state' of Broken .* got torch.float16"),
        ([Broken([])], TypeError, "'state' of Broken to be a tensor of one of .* but got list"),
        ([Scaled(1.0), Scaled(2.0)], ValueError, r"different names, but \['total'\] of Scaled are taken"),
    ],
)
def test_what_is_wrong_with_an_accumulator_is_said_when_the_measure_is_made(accumulators, error, message):
    class Wrong(Measure):
        needs = tuple(accumulators)

        def value(self, sums):
            return sums["state"]

    with pytest.raises(error, match=message):
        Wrong()


@pytest.mark.parametrize(
    ("added", "error", "message"),
    [
        (torch.zeros(5, 2), ValueError, r"keep its 1 dimensions, but got a tensor of shape \(5, 2\)"),
        (torch.zeros(5, dtype=torch.complex64), TypeError, "got torch.complex64"),
    ],
)
@pytest.mark.parametrize("by_hand", [True, False])
def test_states_that_change_their_kind_are_refused_at_the_first_block(added, error, message, by_hand):
    class Wrong(Measure):
        needs = (Broken(torch.zeros(0), added),)

        def value(self, sums):
            return sums["state"]

    with pytest.raises(error, match=message):
        if by_hand:
            Wrong().update(torch.rand(3, 4, 5))
        else:
            evaluate(nn.Flatten(), IMAGES, rotations(4), Wrong())
