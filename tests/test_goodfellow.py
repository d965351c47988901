"""Goodfellow's measure: hand calculations, and what it must tell apart."""

import pytest
import torch
from torch import nn

from lightning_invariance import evaluate, functional, rotations
from lightning_invariance.measures import Goodfellow, NormalizedVariance

# Two of eight values lie above 4, both in the first row: L = 1, G = 1/4.
BY_HAND = torch.tensor([[9.0, 8.0], [1.0, 2.0], [0.0, 3.0], [4.0, 1.0]])


def measured(st, size=100, **arguments):
    metric = Goodfellow(**arguments)
    for rows in st.split(size):
        metric.update(rows)
    if not metric.complete:
        metric.end_pass()
        for rows in st.split(size):
            metric.update(rows)
    return metric.compute()


def invariant_and_noise(n=100, m=10):
    generator = torch.Generator().manual_seed(0)
    invariant = torch.randn(n, 1, generator=generator).expand(n, m)
    return torch.stack([invariant, torch.randn(n, m, generator=generator)], 2)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({}, 4.0),
        ({"direction": "lower_is_invariant"}, 0.25),
        # Below 1 lies one value, 0; two share the 1: only one fires, so L = 1/2, G = 1/8.
        ({"sign": -1}, 4.0),
        ({"sign": "best"}, 4.0),
    ],
)
def test_values_worked_out_by_hand(arguments, value):
    found = measured(BY_HAND, alpha=0.25, threshold="quantile", **arguments)
    assert found.item() == pytest.approx(value)


def test_the_better_sign_is_taken():
    st = torch.stack([BY_HAND, -BY_HAND, torch.tensor([[9.0, 1.0], [8.0, 2.0], [0.0, 0.5], [3.0, 4.0]])], 2)
    plus, minus, best = (measured(st, alpha=0.25, threshold="quantile", sign=sign) for sign in (1, -1, "best"))
    assert best.tolist() == torch.maximum(plus, minus).tolist()
    assert plus[2] == 2  # 9 and 8 fire, in two of four rows
    assert minus[2] == 4  # 0 and 0.5 fire, in one


@pytest.mark.parametrize("threshold", ["normal", "quantile"])
@pytest.mark.parametrize("sign", [1, -1, "best"])
def test_one_pass_and_two_give_the_same(threshold, sign):
    st = invariant_and_noise()
    once, twice = Goodfellow(0.05, threshold, sign), Goodfellow(0.05, threshold, sign, capacity=99)
    for metric in (once, twice):
        for rows in st.split(30):
            metric.update(rows)
    assert once.complete
    assert not twice.complete
    with pytest.raises(RuntimeError, match="two passes for 100 samples"):
        twice.compute()
    twice.end_pass()
    twice.update(st)
    assert torch.equal(once.compute(), twice.compute())
    once.end_pass()  # which is not needed, but possible
    once.update(st)
    assert torch.equal(once.compute(), twice.compute())


def test_a_walk_shows_rows_twice_only_where_they_do_not_fit(monkeypatch):
    calls = []

    def forward(model, x):
        calls.append(len(x))
        return model(x)

    model, images = nn.Conv2d(1, 2, 3), torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    values = []
    # 2 × 4 × 4 activations of 4 bytes: ten rows of them, and one byte less.
    for capacity, room, passes in ((10, 1280, 1), (9, 1280, 2), (10, 1279, 2)):
        monkeypatch.setattr("lightning_invariance.accumulators.peaks.MOST_PEAKS", room)
        calls.clear()
        measures = [NormalizedVariance(), Goodfellow(0.1, capacity=capacity)]
        values.append(evaluate(model, images, rotations(4), measures, forward=forward, batch_size=40))
        assert calls == [5, 4] + [40] * passes  # after a probe of a few inputs
    for result in values[1:]:
        for measure in ("NormalizedVariance", "Goodfellow"):
            assert torch.equal(result[measure]["Conv2d"], values[0][measure]["Conv2d"])


def test_units_that_never_fire_are_nan():
    st = torch.stack([torch.full((5, 4), 2.0), torch.rand(5, 4, generator=torch.Generator().manual_seed(0))], 2)
    assert measured(st, alpha=0.001).isnan().tolist() == [True, True]


def test_errors():
    with pytest.raises(ValueError, match=r"`alpha` to be in \(0, 1\), but got 0"):
        Goodfellow(alpha=0)
    with pytest.raises(ValueError, match="`threshold` to be .* but got 'median'"):
        Goodfellow(threshold="median")
    with pytest.raises(ValueError, match="`sign` to be .* but got 2"):
        Goodfellow(sign=2)
    with pytest.raises(ValueError, match="`direction` to be .* but got 'up'"):
        Goodfellow(direction="up")
    with pytest.raises(ValueError, match=r"`alpha` to be at least 1 / 8, .* but got 0.1"):
        measured(BY_HAND, alpha=0.1, threshold="quantile")
    with pytest.raises(ValueError, match=r"`capacity` to be larger than alpha·n·m = 2, but got 2"):
        measured(BY_HAND, alpha=0.25, threshold="quantile", capacity=2)


@pytest.mark.parametrize(("alpha", "n", "m"), [(0.29, 25, 4), (0.3, 18, 5), (0.07, 50, 2), (0.1, 10, 3)])
def test_the_share_of_the_quantile_is_not_rounded_down_by_floating_point(alpha, n, m):
    # 0.29 · 100 is 28.999999999999996. All values differ, and exactly alpha · n · m of them fire.
    st = torch.arange(float(n * m), dtype=torch.float64).view(n, m, 1)
    metric = Goodfellow(alpha, "quantile")
    metric.update(st)
    firing = round(alpha * n * m)
    rows = -(-firing // m)  # the last ones
    assert metric.compute().item() == pytest.approx(n / rows)
    assert functional.goodfellow(st, alpha, "quantile").item() == pytest.approx(n / rows)
