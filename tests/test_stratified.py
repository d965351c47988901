"""Stratified measures: each class by itself, in one pass."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_invariance import evaluate, functional, rotations
from lightning_invariance.measures import (
    ChannelEquivariance,
    DistanceSameEquivariance,
    EquivarianceCorrelation,
    Goodfellow,
    NormalizedVariance,
    SampleDistance,
    Stratified,
    TransformationVariance,
)

LABELS = torch.tensor([0, 2, 2, 0, 1, 0, 2, 1, 0, 0])


def cube():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(10, 4, 5, generator=generator, dtype=torch.float64)
    return 9 * LABELS[:, None, None] + noise


def measured(metric, st, labels):
    for rows, of_rows in zip(st.split(3), labels.split(3), strict=True):
        metric.update(rows, of_rows)
    return metric


@pytest.mark.parametrize("weighted", [False, True])
def test_the_values_of_the_classes_and_their_mean(weighted):
    metric = measured(Stratified(NormalizedVariance(), 3, weighted), cube(), LABELS)
    classes = torch.stack([functional.normalized_variance(cube()[label == LABELS]) for label in range(3)])
    torch.testing.assert_close(metric.per_class(), classes, rtol=1e-9, atol=0)
    weights = torch.tensor([5.0, 2.0, 3.0] if weighted else [1.0] * 3, dtype=torch.float64)
    expected = (weights[:, None] * classes).sum(0) / weights.sum()
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=0)


def test_a_class_with_too_few_samples_is_nan_and_named():
    labels = LABELS.clone()
    labels[4] = 0  # leaves one sample of class 1
    metric = measured(Stratified(NormalizedVariance(), 5), cube(), labels)
    with pytest.warns(UserWarning, match=r"NaN: 1 \(1\), 3 \(0\), 4 \(0\)"):
        classes = metric.per_class()
    assert classes.isnan().all(1).tolist() == [False, True, False, True, True]
    with pytest.warns(UserWarning, match="NaN"):
        torch.testing.assert_close(metric.compute(), classes[[0, 2]].mean(0))


def test_evaluate_hands_over_labels_and_indices():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).double()
    images, labels = torch.rand(20, 1, 6, 6, dtype=torch.float64), torch.arange(20) % 2
    data, t = TensorDataset(images, labels), rotations(4)
    measures = {
        "tv": Stratified(TransformationVariance(), 2),
        "sd": Stratified(SampleDistance(), 2),
        "se": Stratified(DistanceSameEquivariance(), 2),
        "channels": Stratified(ChannelEquivariance(channels="identity"), 2),
        "correlation": Stratified(EquivarianceCorrelation(), 2),
    }
    result = evaluate(model, data, t, measures)
    for name, single in (
        ("tv", TransformationVariance()),
        ("sd", SampleDistance()),
        ("se", DistanceSameEquivariance()),
        ("channels", ChannelEquivariance(channels="identity")),
        ("correlation", EquivarianceCorrelation()),
    ):
        parts = [evaluate(model, images[labels == label], t, {name: single}) for label in range(2)]
        for layer, found in result[name].items():
            expected = torch.stack([part[name][layer] for part in parts]).nanmean(0)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert result.skipped == {"se": ["3"], "correlation": ["3"]}


def test_bad_arguments():
    metric = Stratified(NormalizedVariance(), 3)
    with pytest.raises(ValueError, match="`labels`, the class of each sample, but got None"):
        metric.update(cube())
    with pytest.raises(ValueError, match=r"`labels` to be in \[0, 3\), but got values from 0 to 3"):
        metric.update(cube(), LABELS + (LABELS == 2))
    with pytest.raises(ValueError, match=r"`labels` of shape \(10,\), but got \(4,\)"):
        metric.update(cube(), LABELS[:4])
    with pytest.raises(TypeError, match="`labels` to hold integers"):
        metric.update(cube(), LABELS.float())
    with pytest.raises(TypeError, match="`measure` to be a measure"):
        Stratified("NormalizedVariance", 3)
    with pytest.raises(ValueError, match="one pass"):
        Stratified(Goodfellow(), 3)
    with pytest.raises(ValueError, match="`num_classes` to be an int of at least 1, but got 0"):
        Stratified(NormalizedVariance(), 0)
