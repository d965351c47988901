"""A measure made outside of the package: examples/new_measure.py."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection

from lightning_invariance import evaluate, rotations
from lightning_invariance.accumulators import Accumulator, Deviations
from lightning_invariance.measures import Measure, Stratified
from lightning_invariance.testing import MeasureTester

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from new_measure import NormalizedRange, Ranges, RowsAbove, WideRows

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


class TestWideRows(MeasureTester):
    def make(self):
        return WideRows(1.1)

    def definition(self, st):
        ranges = np.ptp(st.double().numpy(), axis=1)
        return torch.from_numpy((ranges > 1.1 * ranges.mean(0)).mean(0))


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


@dataclass(frozen=True)
class Scaled(Accumulator):
    """A sum with an argument."""

    factor: object = 1.0

    def empty(self):
        return {"total": torch.zeros(0)}

    def add(self, states, rows):
        factor = self.factor if isinstance(self.factor, float) else 2.0
        added = factor * rows.flat.double().sum((0, 1))
        states["total"] = states["total"] + added if rows.before else added

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


def test_functions_are_different_even_if_their_names_are_equal():
    metrics = MetricCollection({"a": Total(lambda: 1), "b": Total(lambda: 2)})
    metrics.update(torch.zeros(3, 4, 5))
    assert len(metrics.compute_groups) == 2


VECTOR = torch.zeros(0)


def broken(empty=VECTOR, added=None, merged=None, name="state"):
    """An accumulator that does not keep to the contract."""

    @dataclass(frozen=True)
    class Broken(Accumulator):
        def empty(self):
            return {name: empty}

        def add(self, states, rows):
            if isinstance(added, dict):
                states.clear()
                states.update(added)
                return None
            return added

        def merge(self, a, b):
            return merged

    return Broken()


class ValueOf(Measure):
    """A measure of any accumulators and value."""

    def __init__(self, accumulators, value=None):
        super().__init__(accumulators)
        self.given = value

    def value(self, sums):
        return self.given


class NotFrozen(Ranges):
    pass


@pytest.mark.parametrize(
    ("accumulators", "error", "message"),
    [
        ([NotFrozen()], TypeError, "NotFrozen to be a frozen dataclass"),
        ([Ranges], TypeError, r"to hold accumulators, but got .*: write Ranges\(\)"),
        ([], ValueError, "ValueOf to name accumulators in `needs`"),
        ([broken(torch.zeros(0, dtype=torch.float16))], TypeError, "state 'state' of Broken .* got torch.float16"),
        ([broken([])], TypeError, "'state' of Broken to be a tensor of one of .* but got list"),
        ([Scaled(1.0), Scaled(2.0)], ValueError, r"names differ .* \['total'\] of Scaled are taken"),
        ([broken(name="device")], ValueError, r"metric's attributes, but \['device'\] of Broken"),
        ([Scaled([1.0])], TypeError, r"field 'factor' of accumulator Scaled to be immutable, .* but got \[1.0\]"),
        ([Scaled(torch.ones(2))], TypeError, "field 'factor' of accumulator Scaled to be immutable"),
    ],
)
def test_errors_of_an_accumulator_are_raised_when_the_measure_is_made(accumulators, error, message):
    with pytest.raises(error, match=message):
        ValueOf(accumulators)


@pytest.mark.parametrize(
    ("added", "error", "message"),
    [
        (1.0, TypeError, "Broken.add to change `states` in place and to return None, but got 1.0"),
        ({}, ValueError, r"Broken.add to keep the states \['state'\], but \['state'\] are missing"),
        ({"state": torch.zeros(5, 2)}, ValueError, r"keep its 1 dimensions, but got a tensor of shape \(5, 2\)"),
        ({"state": torch.zeros(5, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
        ({"state": 1.0}, TypeError, "'state' of Broken to be a tensor .* but got float"),
    ],
)
@pytest.mark.parametrize("by_hand", [True, False])
def test_states_that_cannot_be_sent_are_refused_at_every_block(added, error, message, by_hand):
    measure = ValueOf([broken(added=added)])
    with pytest.raises(error, match=message):
        if by_hand:
            measure.update(torch.rand(3, 4, 5))
        else:
            evaluate(nn.Flatten(), IMAGES, rotations(4), measure)


def test_states_that_merge_forgets_are_noticed():
    one, other = (ValueOf([broken(added={"state": torch.zeros(5)}, merged={})]) for _ in range(2))
    for metric in (one, other):
        metric.update(torch.rand(3, 4, 5))
    with pytest.raises(ValueError, match=r"Broken.merge to return the states .* \['state'\] are missing"):
        one.merge_state(other)


@pytest.mark.parametrize(("value", "got"), [(torch.zeros(4), r"shape \(4,\)"), (1.0, "1.0")])
def test_a_value_of_a_wrong_size_is_said(value, got):
    measure = ValueOf([broken(added={"state": torch.zeros(5)})], value)
    measure.update(torch.rand(3, 4, 5))
    with pytest.raises(ValueError, match=rf"ValueOf.value to return a tensor of 5 values, .* but got {got}"):
        measure.compute()


def test_a_second_pass_that_is_not_given_or_differs_is_said():
    class Forgotten(WideRows):
        second_pass = Measure.second_pass

    class Hidden(WideRows):
        def __init__(self, factor):
            super().__init__(1.0)
            self.factor = factor  # of which the accumulator knows nothing

    with pytest.raises(TypeError, match="Forgotten, which names accumulators in `needs_again`, to override"):
        evaluate(nn.Flatten(), IMAGES, rotations(4), Forgotten())
    with pytest.raises(ValueError, match="equal accumulators to begin with equal states"):
        evaluate(nn.Flatten(), IMAGES, rotations(4), {"a": Hidden(1.0), "b": Hidden(2.0)})
    with pytest.raises(TypeError, match="NormalizedRange has one pass"):
        NormalizedRange().end_pass()


def test_a_measure_prints_its_arguments():
    assert repr(WideRows(3.0)) == "WideRows(Ranges(), RowsAbove(factor=3.0))"
    assert RowsAbove(3.0) == RowsAbove(3.0)


class OfLayer(Measure):
    """The transformation variance of each unit over the mean of its layer."""

    needs = (Deviations(),)
    has_intervals = True

    def value(self, sums):
        return sums["row_spread"] / sums["row_spread"].mean()


class OneNumber(Measure):
    """TV over SV of a whole layer."""

    needs = (Deviations(),)
    has_intervals = True

    def value(self, sums):
        n, m = sums.n_samples, sums.n_transformations
        return (sums["row_spread"].sum() / (n * (m - 1))) / (sums["column_spread"].sum() / (m * (n - 1)))

    def value_shape(self, sums):
        return ()


def test_units_that_depend_on_each_other_have_no_intervals():
    with pytest.raises(ValueError, match="OfLayer, which has `has_intervals = True`, .* of this unit alone"):
        evaluate(nn.Flatten(), IMAGES, rotations(4), OfLayer(), confidence=0.95)
    assert "OfLayer" in evaluate(nn.Flatten(), IMAGES, rotations(4), OfLayer())


def test_one_number_of_a_layer_has_an_interval():
    turns = rotations(4)
    result = evaluate(nn.Flatten(), IMAGES, turns, OneNumber(), confidence=0.95)
    cube = turns(IMAGES).flatten(2).double().numpy()
    of_rows, of_columns = cube.var(1, ddof=1).sum(1), ((cube - cube.mean(0)) ** 2).mean(1).sum(1)
    value = of_rows.mean() / (of_columns.sum() / (len(cube) - 1))
    assert float(result["OneNumber"]["Flatten"]) == pytest.approx(value, rel=1e-6)
    psi = value * (of_rows / of_rows.mean() - of_columns / of_columns.mean())
    error = np.sqrt((psi**2).sum() / (len(cube) * (len(cube) - 1)))
    assert result.interval()["Flatten"].standard_error == pytest.approx(error, rel=1e-5)


@dataclass(frozen=True)
class Squares(Accumulator):
    """Mean squares of rows, and how many there are as a state that all units share."""

    told: tuple[str, ...] = ("squares",)

    def empty(self):
        return {"squares": torch.zeros(0, dtype=torch.float64), "rows": torch.zeros((), dtype=torch.float64)}

    def add(self, states, rows):
        squares = self.of_rows(rows).sum(0)
        before = states["squares"]
        states["squares"] = before + squares if before.numel() else squares
        states["rows"] = states["rows"] + len(rows.values)

    def merge(self, a, b):
        return {name: a[name] + b[name] for name in ("squares", "rows")}

    def of_rows(self, rows):
        return rows.flat.double().square().mean(1)

    def shares(self, rows, totals):
        shares = {"squares": self.of_rows(rows), "rows": torch.ones(len(rows.values), dtype=torch.float64)}
        return {name: shares[name] for name in self.told}


class MeanSquare(Measure):
    has_intervals = True

    def __init__(self, *told):
        super().__init__([Squares(told)])

    def value(self, sums):
        return sums["squares"] / sums["rows"]


def test_a_state_that_units_share_counts_as_constant_or_is_an_error():
    turns = rotations(4)
    result = evaluate(nn.Flatten(), IMAGES, turns, MeanSquare("squares"), confidence=0.95)
    of_samples = (turns(IMAGES).flatten(2).double().numpy() ** 2).mean(1)
    errors = of_samples.std(0, ddof=1) / np.sqrt(len(IMAGES))
    np.testing.assert_allclose(result.standard_errors["MeanSquare"]["Flatten"].numpy(), errors, rtol=1e-6)
    with pytest.raises(ValueError, match=r"state 'rows' of MeanSquare .* shape is \(\): leave it out of `shares`"):
        evaluate(nn.Flatten(), IMAGES, turns, MeanSquare("squares", "rows"), confidence=0.95)
