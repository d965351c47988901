"""TensorBoard: the text page, the chart of all layers, histograms, responses and bands."""

import re

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightnings import TensorBoardLogger
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torchmetrics.classification import MulticlassAccuracy
from trainings import LAYERS, events, fit_with_tensorboard

from lightning_invariance import InvarianceMonitor, rotations
from lightning_invariance.measures import TransformationVariance


def layout(logged):
    charts = Layout.FromString(logged.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return {part.title: {chart.title: list(chart.multiline.tag) for chart in part.chart} for part in charts.category}


def test_charts_of_the_layers_in_the_order_of_the_network(tmp_path):
    fit_with_tensorboard(tmp_path, InvarianceMonitor(rotations(4)), epochs=1)
    charts = layout(events(tmp_path))["NormalizedVariance"]
    tags = [f"NormalizedVariance/{layer}" for layer in ("input", *LAYERS)]
    assert len(charts["input, conv, bn, relu, fc"]) == len(tags)
    for pattern, tag in zip(charts["input, conv, bn, relu, fc"], tags, strict=True):
        assert re.match(pattern, tag)
        assert not re.match(pattern, tag + "0")  # TensorBoard matches the beginning only
        assert not re.match(pattern, tag.replace("/", ".") + "x")
    ends = charts["last layer, and mean over the layers"]
    for pattern, tag in zip(ends, ("NormalizedVariance_last", "NormalizedVariance_mean"), strict=True):
        assert re.match(pattern, tag)


def test_a_layout_of_the_user_is_kept(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    losses, band = ["Multiline", ["train_loss", "val_loss"]], ["Margin", ["value", "low", "high"]]
    logger.experiment.add_custom_scalars({"mine": {"losses": losses, "band": band}})
    fit_with_tensorboard(tmp_path, InvarianceMonitor(rotations(4), confidence=0.9), epochs=1, logger=logger)
    found = layout(events(tmp_path))
    assert found["mine"]["losses"] == ["train_loss", "val_loss"]
    assert "NormalizedVariance" in found
    charts = Layout.FromString(events(tmp_path).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    mine = next(part for part in charts.category if part.title == "mine")
    assert [(s.value, s.lower, s.upper) for s in mine.chart[1].margin.series] == [("value", "low", "high")]


def test_a_page_says_what_the_tags_mean(tmp_path):
    measures = {"spread": TransformationVariance()}
    fit_with_tensorboard(tmp_path, InvarianceMonitor(rotations(4), measures, name="turns"), epochs=2)
    pages = events(tmp_path).Tensors("invariance_turns/text_summary")
    assert len(pages) == 1
    text = pages[0].tensor_proto.string_val[0].decode()
    assert "40 samples × 4 transformations: 0°, 90°, 180°, 270°." in text
    assert "| `spread_turns/LAYER` | Transformation Variance (TV)" in text
    assert "Lower is more invariant." in text
    assert "| conv | Conv2d 3 × 4 × 4 |" in text
    assert "`input` is the transformed input" in text
    assert "0.3 means" not in text  # of ratios alone


def test_metrics_of_predictions_have_a_chart_and_are_explained(tmp_path):
    metric = {"score.1": MulticlassAccuracy(2)}
    fit_with_tensorboard(tmp_path, InvarianceMonitor(rotations(4), outputs=metric, name="turns"), epochs=1)
    logged = events(tmp_path)
    tags = ["score.1_turns_mean", "score.1_turns_worst"]
    assert set(tags) <= set(logged.Tags()["scalars"])
    (patterns,) = layout(logged)["score.1_turns"].values()
    assert [[tag for tag in logged.Tags()["scalars"] if re.match(pattern, tag)] for pattern in patterns] == [
        [tag] for tag in tags
    ]
    text = logged.Tensors("invariance_turns/text_summary")[0].tensor_proto.string_val[0].decode()
    for tag, meaning in zip(tags, ("the mean over the transformations", "where it is worst"), strict=True):
        assert re.search(rf"\| `{re.escape(tag)}` \| .*{meaning}", text)


def test_histograms_over_channels_only_where_they_are_asked_for(tmp_path):
    monitor = InvarianceMonitor(rotations(4), histograms=True)
    fit_with_tensorboard(tmp_path / "with", monitor, epochs=1)
    fit_with_tensorboard(tmp_path / "without", InvarianceMonitor(rotations(4)), epochs=1)
    logged = events(tmp_path / "with")
    assert set(logged.Tags()["histograms"]) == {f"NormalizedVariance/channels/{layer}" for layer in ("input", *LAYERS)}
    last = logged.Histograms("NormalizedVariance/channels/conv")[-1].histogram_value
    channels = monitor.history[-1].per_channel("NormalizedVariance", "conv")
    assert last.num == len(channels) == 3
    torch.testing.assert_close(last.sum, channels.sum().item(), rtol=1e-6, atol=0)
    assert events(tmp_path / "without").Tags()["histograms"] == []


def test_the_default_measure_tells_the_response_and_the_history_the_scores(tmp_path):
    monitor = InvarianceMonitor(rotations(4))
    fit_with_tensorboard(tmp_path, monitor, epochs=2)
    logged = events(tmp_path)
    assert len(logged.Images("NormalizedVariance/response")) == 3
    assert [set(result.scores) & {"val_loss"} for result in monitor.history] == [set(), {"val_loss"}, {"val_loss"}]
    last = logged.Scalars("val_loss")[-1].value
    torch.testing.assert_close(monitor.history[-1].scores["val_loss"], last, rtol=1e-6, atol=0)
    assert not any("NormalizedVariance" in name for name in monitor.history[-1].scores)


def test_bands_where_there_are_intervals(tmp_path):
    monitor = InvarianceMonitor(rotations(4), confidence=0.9)
    fit_with_tensorboard(tmp_path, monitor, epochs=1)
    logged = events(tmp_path)
    found = Layout.FromString(logged.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    (bands,) = [chart for part in found.category for chart in part.chart if chart.HasField("margin")]
    assert "90%" in bands.title
    series = {band.value: (band.lower, band.upper) for band in bands.margin.series}
    assert [*series] == [f"NormalizedVariance/{layer}" for layer in ("input", *LAYERS)]
    for value, (low, high) in series.items():
        interval = monitor.history[-1].interval()[value.split("/")[1]]
        assert logged.Scalars(low)[-1].value == pytest.approx(interval.low, rel=1e-6)
        assert logged.Scalars(high)[-1].value == pytest.approx(interval.high, rel=1e-6)
        assert interval.low <= logged.Scalars(value)[-1].value <= interval.high
    text = logged.Tensors("invariance/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "90% confidence interval" in text
    assert "0.3 means: the transformations cause 30 %" in text


def test_early_stopping_can_watch_a_bound(tmp_path):
    monitor = InvarianceMonitor(rotations(4), confidence=0.9)
    stopping = EarlyStopping("values/NormalizedVariance_high/conv", patience=100)
    fit_with_tensorboard(tmp_path, monitor, stopping, epochs=1)
    assert float(stopping.best_score) == pytest.approx(monitor.history[-1].interval()["conv"].high, rel=1e-6)
