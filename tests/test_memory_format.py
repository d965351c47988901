"""Activations whose axes are in another order in memory, such as channels last, and when networks are run so."""

import copy
import warnings
from functools import cache

import definitions
import numpy as np
import pytest
import torch
from torch import nn

from lightning_invariance import TransformationSet, evaluate, quarter_turns, rotations
from lightning_invariance.engine import memory_format
from lightning_invariance.measures import (
    Anova,
    Consistency,
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedDistance,
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
    return evaluate(nn.Sequential(Ordered(order)), samples, TURNS, measures, **options)


@cache
def expected_values():
    """By name: a measure, and what it is by its definition."""
    x = st_of(IMAGES)
    inverses = [lambda maps, k=k: np.rot90(maps, -k, (2, 3)) for k in range(4)]
    tv, sv = definitions.tv(x), definitions.sv(x)
    pixels = definitions.same_equivariance(x, inverses, False, "activation", None)
    maps = definitions.same_equivariance(x, inverses, True, "channel", None, "euclidean")
    winners = x.argmax(2)  # of the channels, at each position
    same = np.mean([winners[:, i] == winners[:, j] for i in range(4) for j in range(i)])
    return {
        "TV": (TransformationVariance(), tv),
        "NV": (NormalizedVariance(response=True), tv / sv),
        "SV of deviations": (SampleVariance(squared=False), definitions.sv(x, squared=False)),
        "NV of maps": (
            NormalizedVariance(aggregate="max"),
            definitions.aggregated(tv, "max") / definitions.aggregated(sv, "max"),
        ),
        "Anova": (Anova("effect", paired=True), definitions.anova(x, "effect", True)),
        "TD": (TransformationDistance(), definitions.td(x)),
        "TD of maps": (TransformationDistance("euclidean", "channel"), definitions.td(x, "euclidean", "channel")),
        "TD of a function": (TransformationDistance(lambda a, b: (a - b).abs()), definitions.td(x)),
        "ND": (NormalizedDistance("squared"), 2 * 3 / 4 * tv / (2 * (N - 1) / N * sv)),
        "Goodfellow": (Goodfellow(0.1, "quantile"), definitions.goodfellow(x, 0.1, "quantile", 1)[0]),
        "VSE": (VarianceSameEquivariance(over="activation", normalize=False), pixels),
        "DSE": (DistanceSameEquivariance(), maps),
        "Consistency": (Consistency(), same),
        "of classes": (
            Stratified(TransformationVariance(), 2),
            (definitions.tv(x[::2]) + definitions.tv(x[1::2])) / 2,
        ),
    }


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("name", expected_values())
def test_values_are_those_of_the_definition_and_stand_where_they_belong(name, order):
    measure, expected = expected_values()[name]
    found = measured(order, {"measure": measure}, batch_size=20)["measure"]["0"]
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected, float)), rtol=1e-9, atol=1e-12)


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
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_standard_errors_responses_and_influences_stand_where_they_belong(order, dtype):
    """Of a mean over samples, from one pass, and of a quotient, from two."""
    images = torch.rand(N, 3, 28, 28, dtype=dtype, generator=torch.Generator().manual_seed(1))  # as many as C adds
    measures = {"TV": TransformationVariance(), "NV": NormalizedVariance(response=True)}
    result = measured(order, measures, images, confidence=0.95)
    x = st_of(images).astype(float)
    rows, columns = x.var(1, ddof=1), ((x - x.mean(0)) ** 2).mean(1) * N / (N - 1)
    ratio = rows.mean(0) / columns.mean(0)
    psi = {"TV": rows - rows.mean(0), "NV": (rows - ratio * columns) / columns.mean(0)}
    exact = dtype == torch.float64
    for name, of_units in psi.items():
        errors = torch.from_numpy(np.sqrt((of_units**2).sum(0) / (N * (N - 1))))
        torch.testing.assert_close(result.standard_errors[name]["0"], errors, rtol=1e-9 if exact else 1e-4, atol=0)
        on_mean, found = of_units.mean((1, 2, 3)), result.influences[name]["0"].numpy()
        np.testing.assert_allclose(np.sort(found), np.sort(on_mean), rtol=1e-3, atol=1e-4 * abs(on_mean).max())
    apart = ((x - x[:, :1]) ** 2).mean(0).mean((2, 3)) / 2  # (m, channels)
    response = (apart / columns.mean(0).mean((1, 2))).mean(1)
    assert result.response["NV"]["0"] == pytest.approx(response.tolist(), rel=1e-9 if exact else 1e-4)


class Clock:
    """Time passes where a network says so, instead of how busy the machine is."""

    now = 0.0

    def perf_counter(self):
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _time(monkeypatch):
    monkeypatch.setattr(memory_format, "time", CLOCK)


class Watched(nn.Module):
    """A convolution that takes longer in one of the formats, and counts what comes."""

    def __init__(self, slow, then=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.slow, self.then = nn.Conv2d(3, 8, 3), slow, then or nn.Identity()
        self.inputs = {"first": 0, "last": 0}

    def forward(self, x):
        layout = "last" if x.stride(1) == 1 else "first"
        self.inputs[layout] += len(x)
        CLOCK.now += 2.0 if layout == self.slow else 1.0
        return self.then(self.conv(x))


class Viewed(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


class OfMemory(nn.Module):
    """Takes values as they lie in memory, which is wrong unless they lie as it expects."""

    def forward(self, x):
        return torch.as_strided(x, (len(x), 12), (x[0].numel(), 1))


MANY = torch.rand(130, 3, 6, 6, generator=torch.Generator().manual_seed(2))


def run(model, images=MANY, measures=None, transformations=None, **options):
    return evaluate(model, images, transformations or rotations(8), measures, progress=False, **options)


def test_a_network_that_is_faster_with_channels_last_is_run_so_and_gives_the_same():
    model = Watched(slow="first")
    result = run(model)
    assert model.inputs["last"] >= 1040
    before = model.inputs["first"]
    again = run(model)  # it is remembered, so that only the probe sees the other format
    assert model.inputs["first"] <= before + 15
    fixed = run(copy.deepcopy(model), batch_size=64)
    for layer, values in fixed["NormalizedVariance"].items():
        torch.testing.assert_close(result["NormalizedVariance"][layer], values, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(again["NormalizedVariance"][layer], values, rtol=1e-4, atol=1e-6)
    assert model.conv.weight.is_contiguous()


def test_complex_outputs():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Watched(slow="first", then=Spectrum())
        result = run(model, measures=[TransformationVariance()])
    assert model.inputs["last"] >= 1040
    fixed = run(model, measures=[TransformationVariance()], batch_size=64)
    for layer, values in fixed["TransformationVariance"].items():
        torch.testing.assert_close(result["TransformationVariance"][layer], values, rtol=1e-4, atol=1e-5)


class OfUsers(NormalizedVariance):
    """Might look at the axes of the activation."""


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Watched(slow="last"), {}),
        (Watched(slow="first", then=Viewed()), {}),
        (Watched(slow="first", then=OfMemory()), {}),
        (Watched(slow="first"), {"batch_size": 64}),
        (Watched(slow="first"), {"max_samples": 100}),
        (Watched(slow="first"), {"measures": [OfUsers()]}),
        (Watched(slow="first"), {"measures": [TransformationDistance(lambda a, b: (a - b).abs())]}),
    ],
    ids=["slower", "fails", "other values", "batch size", "few", "measure of a user", "function of a user"],
)
def test_otherwise_it_is_run_as_images_come(model, options):
    fixed = run(copy.deepcopy(model), **{**options, "batch_size": 64})
    result = run(model, **options)
    assert model.inputs["last"] <= 5 + 3 * 32  # that were compared and timed
    for measure, layers in fixed.items():
        for layer, values in layers.items():
            torch.testing.assert_close(result[measure][layer], values, rtol=1e-4, atol=1e-6)


class Late(nn.Module):
    """Needs the format of the images for some of them only."""

    def forward(self, x):
        return x.view(len(x), -1) if (x[:, 1] > 100).any() else x.flatten(1)


class Side(nn.Module):
    """What it reads from memory does not show in what it returns."""

    def __init__(self):
        super().__init__()
        self.wrong, self.seen = OfMemory(), nn.Identity()

    def forward(self, x):
        self.seen(self.wrong(x))
        return x.mean((2, 3))


def rolled(x, steps):
    """Turns maps ``(..., height, width)`` that lie in memory one after the other."""
    return x.view(-1, *x.shape[-2:]).roll(steps, -1).view(x.shape)


STEPS = {f"{k} pixels": k % 4 for k in range(8)}  # as many as make 1,024 inputs of the samples
VIEWS = TransformationSet.from_callables(
    {name: lambda x, k=k: x.roll(k, -1) for name, k in STEPS.items()},
    {name: lambda x, k=k: rolled(x, -k) for name, k in STEPS.items()},
)
INNER = TransformationSet.from_callables({name: lambda x, k=k: rolled(x, k) for name, k in STEPS.items()})


@pytest.mark.parametrize(
    ("then", "options"),
    [
        (Late(), {}),
        (Side(), {}),
        (nn.Identity(), {"transformations": VIEWS, "measures": [VarianceSameEquivariance()]}),
        (nn.Identity(), {"transformations": INNER, "transform_at": "then"}),
    ],
    ids=["late", "side", "inverses", "within"],
)
def test_what_needs_the_format_of_the_images_gets_it(then, options):
    """Also where that is noticed after the choice."""
    many = MANY.clone()
    many[100, :, 0, 0] = 1e4
    fixed = run(Watched(slow="first", then=then), many, **options, batch_size=64)
    model = Watched(slow="first", then=then)
    for _ in range(2):
        result = run(model, many, **options)
        for measure, layers in fixed.items():
            for layer, values in layers.items():
                torch.testing.assert_close(result[measure][layer], values, rtol=1e-4, atol=1e-6)


def test_another_way_to_run_a_model_is_timed_anew():
    model = Watched(slow="first", then=Viewed())
    run(model, forward=lambda model, x: model.conv(x) if len(x) > 64 else (model(x), model.conv(x))[1])
    run(model, layers=["conv"], forward=lambda model, x: model.conv(x))
    result = run(model)
    expected = run(Watched(slow="first", then=Viewed()), batch_size=64)
    for layer, values in expected["NormalizedVariance"].items():
        torch.testing.assert_close(result["NormalizedVariance"][layer], values, rtol=1e-4, atol=1e-6)


def test_an_error_that_has_other_reasons_is_that_of_the_model():
    class Broken(nn.Module):
        def forward(self, x):
            if (x[:, 1] > 100).any():
                raise KeyError("no such thing")
            return x

    many = MANY.clone()
    many[100, :, 0, 0] = 1e4
    with pytest.raises(KeyError, match="no such thing"):
        run(Watched(slow="first", then=Broken()), many)


def test_not_where_algorithms_must_be_deterministic():
    model = Watched(slow="first")
    torch.use_deterministic_algorithms(True)
    try:
        run(model)
    finally:
        torch.use_deterministic_algorithms(False)
    assert model.inputs["last"] == 0


def test_images_of_one_channel():
    class Grey(Watched):
        def __init__(self):
            super().__init__(slow="first")
            self.conv = nn.Conv2d(1, 8, 3)

        def forward(self, x):
            output = super().forward(x)
            self.last = output.is_contiguous(memory_format=torch.channels_last)
            return output

    model = Grey()
    run(model, MANY[:, :1])
    assert model.last
