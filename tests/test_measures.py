"""What every measure has in common: splits, merges and the habits of torchmetrics."""

import itertools
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_invariance import functional, rotations
from lightning_invariance.measures import (
    Anova,
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    SampleVariance,
    Stratified,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

TURNS = rotations(4)
LABELS = torch.arange(13) % 3


def cube(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(13, 1, 3, 5, 5, generator=generator, dtype=torch.float64)
    return (samples + torch.randn(13, 4, 3, 5, 5, generator=generator, dtype=torch.float64)).to(dtype)


def by_class(st):
    return torch.stack([functional.normalized_variance(st[label == LABELS]) for label in range(3)]).mean(0)


# name: (how to make the measure, its definition on the whole ST tensor)
MEASURES = {
    "TV": (TransformationVariance, functional.transformation_variance),
    "SV": (SampleVariance, functional.sample_variance),
    "NV": (NormalizedVariance, functional.normalized_variance),
    "TD": (TransformationDistance, functional.transformation_distance),
    "SD": (SampleDistance, functional.sample_distance),
    "ND": (NormalizedDistance, functional.normalized_distance),
    "ND euclidean": (
        lambda: NormalizedDistance("euclidean", over="channel"),
        lambda st: functional.normalized_distance(st, "euclidean", "channel"),
    ),
    "ND squared": (lambda: NormalizedDistance("squared"), lambda st: functional.normalized_distance(st, "squared")),
    "Anova F": (lambda: Anova("f"), lambda st: functional.anova(st)[0]),
    "Anova p": (lambda: Anova("p", paired=True), lambda st: functional.anova(st, paired=True)[1]),
    "Anova effect": (lambda: Anova("effect"), lambda st: functional.anova(st)[2]),
    "Goodfellow": (lambda: Goodfellow(0.1), lambda st: functional.goodfellow(st, 0.1)),
    "Goodfellow quantile": (
        lambda: Goodfellow(0.1, threshold="quantile", sign=-1),
        lambda st: functional.goodfellow(st, 0.1, "quantile", -1),
    ),
    "VSE": (lambda: VarianceSameEquivariance(TURNS), lambda st: functional.variance_same_equivariance(st, TURNS)),
    "DSE": (
        lambda: DistanceSameEquivariance(TURNS, normalized_by="samples"),
        lambda st: functional.distance_same_equivariance(st, TURNS, normalized_by="samples"),
    ),
    "Stratified": (lambda: Stratified(NormalizedVariance(), 3), by_class),
}


def update(metric, st, rows=slice(None)):
    metric.update(st[rows], **metric._filter_kwargs(labels=LABELS[rows]))


def feed(metrics, st, shares):
    """Show each metric its share of the rows as often as it needs, and merge all into the first."""
    for position in range(metrics[0].passes):
        if position:
            for metric in metrics:
                metric.end_pass()
        for metric, share in zip(metrics, shares, strict=True):
            for rows in share:
                update(metric, st, rows)
        for metric in metrics[1:] if position + 1 == metrics[0].passes else []:
            metrics[0].merge_state(metric)
        if position + 1 < metrics[0].passes:
            # What a walk does: all of them learn what all have seen.
            states = [metric.clone() for metric in metrics]
            for metric in metrics:
                others = [state for state, own in zip(states, metrics, strict=True) if own is not metric]
                for other in others:
                    metric.merge_state(other)
    return metrics[0].compute()


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_any_block_size_gives_the_definition(name, size):
    make, definition = MEASURES[name]
    rows = [slice(start, start + size) for start in range(0, 13, size)]
    value = feed([make()], cube(), [rows])
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, definition(cube()), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("shares", [(5, 3, 5), (1, 12, 0), (0, 6, 7)])
def test_merged_parts_give_the_definition(name, shares):
    make, definition = MEASURES[name]
    ends = list(itertools.accumulate(shares))
    rows = [[slice(end - share, end)] if share else [] for share, end in zip(shares, ends, strict=True)]
    value = feed([make() for _ in shares], cube(), rows)
    torch.testing.assert_close(value, definition(cube()), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", MEASURES)
def test_the_order_of_samples_does_not_matter(name):
    make, definition = MEASURES[name]
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    order = order[LABELS[order].argsort(stable=True)]  # sorted by class
    metric = make()
    for position in range(metric.passes):
        if position:
            metric.end_pass()
        metric.update(cube()[order], **metric._filter_kwargs(labels=LABELS[order]))
    torch.testing.assert_close(metric.compute(), definition(cube()), rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_activations_of_every_float_type(name, dtype):
    make, definition = MEASURES[name]
    value = feed([make()], cube(dtype), [[slice(0, 7), slice(7, 13)]])
    torch.testing.assert_close(value, definition(cube(dtype).double()), rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", MEASURES)
def test_metric_habits(name):
    make, definition = MEASURES[name]
    expected = definition(cube())
    metric = make()
    value = feed([metric], cube(), [[slice(0, 13)]])
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        torch.testing.assert_close(copy.compute(), value, rtol=0, atol=0, equal_nan=True)
    assert isinstance(hash(metric), int)
    assert metric.state_dict() == {}
    metric.set_dtype(torch.float64)
    torch.testing.assert_close(metric.compute(), value, rtol=0, atol=0, equal_nan=True)
    figure, axes = metric.plot()
    assert axes.figure is figure
    metric.reset()
    assert metric.n_samples == 0
    torch.testing.assert_close(
        feed([metric], cube(), [[slice(0, 13)]]), expected, rtol=1e-9, atol=1e-12, equal_nan=True
    )
    doubled = 2 * metric + 1
    torch.testing.assert_close(doubled.compute(), 2 * expected + 1, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in MEASURES if not name.startswith("Goodfellow")])
def test_forward_returns_the_value_of_the_batch(name):
    make, definition = MEASURES[name]
    metric = make()
    if name == "Stratified":
        value = metric(cube(), labels=LABELS)
    else:
        metric(cube(seed=1)[:4])
        metric.reset()
        value = metric(cube())
    torch.testing.assert_close(value, definition(cube()), rtol=1e-9, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(metric.compute(), definition(cube()), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_collection_of_all_measures_of_one_pass():
    single = {name.replace(" ", "_"): make() for name, (make, _) in MEASURES.items() if not name.startswith("Goodf")}
    metrics = MetricCollection(single)
    for rows in (slice(0, 6), slice(6, 13)):
        metrics.update(cube()[rows], labels=LABELS[rows])
    values = metrics.compute()
    for name, (_, definition) in MEASURES.items():
        if not name.startswith("Goodfellow"):
            expected = definition(cube())
            found = values[name.replace(" ", "_")]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("kind", [torch.complex64, torch.int64])
def test_complex_and_integer_activations_are_refused(name, kind):
    metric = MEASURES[name][0]()
    with pytest.raises(TypeError, match="real floating-point"):
        update(metric, cube().to(kind))


@pytest.mark.parametrize("name", MEASURES)
def test_one_sample_is_nan_with_a_warning(name):
    metric = MEASURES[name][0]()
    if name in ("TV", "TD", "VSE") or name.startswith("Goodfellow"):
        pytest.skip("defined for one sample, or by threshold")
    with pytest.warns(UserWarning, match="NaN"):
        value = feed([metric], cube(), [[slice(0, 1)]])
    assert value.isnan().all()


@pytest.mark.parametrize("name", MEASURES)
def test_one_transformation_is_nan_with_a_warning(name):
    if name in ("SV", "SD", "VSE", "DSE"):
        pytest.skip("defined for one transformation, or fixed to four")
    metric = MEASURES[name][0]()
    with pytest.warns(UserWarning, match="NaN"):
        value = feed([metric], cube()[:, :1], [[slice(0, 13)]])
    assert value.isnan().all()
