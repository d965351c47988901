"""Activations whose axes are in another order in memory, as in models that run with ``channels_last``."""

from functools import cache

import definitions
import numpy as np
import pytest
import torch
from torch import nn

from lightning_invariance import evaluate, quarter_turns
from lightning_invariance.accumulators.backends import c_kernels
from lightning_invariance.measures import (
    Anova,
    Consistency,
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedVariance,
    SampleVariance,
    Stratified,
    STTensor,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

N = 24
IMAGES = torch.rand(N, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TURNS = quarter_turns()

#: How (batch, channels, height, width) is permuted to what lies in memory one after the other.
ORDERS = {"channels last": (0, 2, 3, 1), "width first": (0, 3, 1, 2)}


class Ordered(nn.Module):
    """Returns scaled values with the axes in another order in memory; no two of its units are alike."""

    def __init__(self, order=(0, 1, 2, 3)):
        super().__init__()
        self.order = order

    def forward(self, x):
        scale = torch.linspace(0.5, 2, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
        x = ((x - 0.5) * scale).permute(self.order).contiguous()
        return x.permute([self.order.index(axis) for axis in range(4)])


def st_of(images):
    """The ST matrix of every activation of the layer, in numpy's longest floating point."""
    st = Ordered()(TURNS(images).flatten(0, 1)).unflatten(0, (len(images), 4))
    return st.numpy().astype(np.longdouble)


def measured(order, measures, images=IMAGES, **options):
    samples = [(image, i % 2) for i, image in enumerate(images)]
    return evaluate(nn.Sequential(Ordered(order)), samples, TURNS, measures, progress=False, **options)


@cache
def expected_values():
    """By name: a measure, and its value by definition."""
    x = st_of(IMAGES)
    inverses = [lambda maps, k=k: np.rot90(maps, -k, (2, 3)) for k in range(4)]
    tv, sv = definitions.tv(x), definitions.sv(x)
    pixels = definitions.same_equivariance(x, inverses, False, "activation", None)
    maps = definitions.same_equivariance(x, inverses, True, "channel", None, "euclidean")
    winners = x.argmax(2)  # of the channels, at each position
    same = np.mean([winners[:, i] == winners[:, j] for i in range(4) for j in range(i)])
    largest = definitions.aggregated(tv, "max") / definitions.aggregated(sv, "max")
    of_classes = (definitions.tv(x[::2]) + definitions.tv(x[1::2])) / 2
    return {
        "NV": (NormalizedVariance(response=True), tv / sv),
        "SV of deviations": (SampleVariance(squared=False), definitions.sv(x, squared=False)),
        "NV of maps": (NormalizedVariance(aggregate="max"), largest),
        "Anova": (Anova("effect", paired=True), definitions.anova(x, "effect", True)),
        "TD of maps": (TransformationDistance("euclidean", "channel"), definitions.td(x, "euclidean", "channel")),
        "TD of a function": (TransformationDistance(lambda a, b: (a - b).abs()), definitions.td(x)),
        "Goodfellow": (Goodfellow(0.1, "quantile"), definitions.goodfellow(x, 0.1, "quantile", 1)[0]),
        "VSE": (VarianceSameEquivariance(over="activation", normalize=False), pixels),
        "DSE": (DistanceSameEquivariance(), maps),
        "Consistency": (Consistency(), same),
        "of classes": (Stratified(TransformationVariance(), 2), of_classes),
    }


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_values_are_those_of_the_definition_and_stand_where_they_belong(order):
    measures = {name: measure for name, (measure, _) in expected_values().items()}
    result = measured(order, measures, batch_size=20)
    for name, (_, expected) in expected_values().items():
        expected = torch.from_numpy(np.asarray(expected, float))
        torch.testing.assert_close(
            result[name]["0"], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_rows_and_dead_units_stand_where_they_belong(order):
    images = IMAGES.clone()
    images[:, 1, 2] = images[:, 2, :, 0] = images[:, 0, 5] = 0.25
    images[:, 1] = 0.25
    result = measured(order, [STTensor(), NormalizedVariance()], images)
    rows = result["STTensor"]["0"]
    assert rows.shape == (N, 4, 3, 6, 6)
    by_sample = st_of(images).astype(float)
    for row in rows.numpy():
        assert (by_sample == row).all((1, 2, 3, 4)).sum() == 1
    assert result.dead["0"].equal(torch.from_numpy((by_sample == by_sample[:1, :1]).all((0, 1))))
    assert result.dead["0"][1].all()
    assert not result.dead["0"].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standard_errors_responses_and_influences_stand_where_they_belong(dtype):
    images = torch.rand(N, 3, 28, 28, dtype=dtype, generator=torch.Generator().manual_seed(1))  # as many as C adds
    measures = {"TV": TransformationVariance(), "NV": NormalizedVariance(response=True)}
    result = measured(ORDERS["channels last"], measures, images, confidence=0.95)
    x = st_of(images).astype(float)
    rows, columns = x.var(1, ddof=1), ((x - x.mean(0)) ** 2).mean(1) * N / (N - 1)
    ratio = rows.mean(0) / columns.mean(0)
    psi = {"TV": rows - rows.mean(0), "NV": (rows - ratio * columns) / columns.mean(0)}
    psi["NV"] /= 1 - columns / columns.sum(0) * N / (N - 1)
    exact = dtype == torch.float64
    for name, of_units in psi.items():
        errors = torch.from_numpy(np.sqrt((of_units**2).sum(0) / (N * (N - 1))))
        torch.testing.assert_close(result.standard_errors[name]["0"], errors, rtol=1e-9 if exact else 1e-4, atol=0)
        on_mean, found = of_units.mean((1, 2, 3)) - of_units.mean(), result.influences[name]["0"].numpy()
        np.testing.assert_allclose(np.sort(found), np.sort(on_mean), rtol=1e-3, atol=1e-4 * abs(on_mean).max())
    apart = ((x - x[:, :1]) ** 2).mean(0).mean((2, 3)) / 2  # (m, channels)
    response = (apart / columns.mean(0).mean((1, 2))).mean(1)
    assert result.response["NV"]["0"] == pytest.approx(response.tolist(), rel=1e-9 if exact else 1e-4)


class Tokens(nn.Module):
    """Maps as a sequence of tokens: with the channels last, although these lie first in memory."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


@pytest.mark.skipif(c_kernels._kernels is None, reason="the kernels were not compiled here")
@pytest.mark.parametrize("then", [nn.Identity(), Tokens()], ids=["channels last", "transposed tokens"])
def test_activations_are_measured_where_they_lie(then, monkeypatch):
    """Without a copy, whether the user's own model runs with channels last or a layer returns a transposed view."""
    returned, in_place = [], []
    add = c_kernels.add_deviations

    def watched(x, *args):
        if bool(x.any()):  # not the rows of zeros from which the memory of the sums is told
            in_place.append(x.is_contiguous() and x.data_ptr() == returned[-1])
        return add(x, *args)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), then)
    images = IMAGES.float()
    if not isinstance(then, Tokens):
        model = model.to(memory_format=torch.channels_last)
        assert not model(images).is_contiguous()
    expected = model(TURNS(images).flatten(0, 1)).unflatten(0, (N, 4)).detach().double()
    model[1].register_forward_hook(lambda module, args, output: returned.append(output.data_ptr()))
    monkeypatch.setattr(c_kernels, "add_deviations", watched)
    result = evaluate(model, images, TURNS, layers=["1"], batch_size=32, progress=False)
    assert in_place == [True] * 3
    nv = expected.var(1).mean(0) / expected.var(0).mean(0)
    torch.testing.assert_close(result["NormalizedVariance"]["1"], nv, rtol=1e-4, atol=0)
