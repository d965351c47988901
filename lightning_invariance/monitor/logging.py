"""Log scalars, pictures, histograms and explanations to the loggers of a trainer.

Everywhere ``tags`` maps each measure to the prefix of its tags, and ``suffix`` ends the tags of metrics of predictions.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import (
    Category,
    Chart,
    Layout,
    MarginChartContent,
    MultilineChartContent,
)
from torch.utils.tensorboard.summary import custom_scalars
from torchmetrics import Metric

from lightning_invariance.monitor.images import is_dummy, log_image
from lightning_invariance.monitor.trainer import DETAILS, logger_step
from lightning_invariance.plots import evolution, heatmap, response
from lightning_invariance.plots.common import evenly, limits_of, limits_of_ratios, render
from lightning_invariance.plots.labels import shorten, without_prefix
from lightning_invariance.results.intervals import MAX_LEFT_OUT
from lightning_invariance.results.result import InvarianceResult

#: Width and height of a logged picture in inches, small beside its letters, and its pixels in an inch.
SIZE, DPI = (5.2, 3.8), 140

#: The largest number of layers in a chart, which are told apart by colour.
MOST_IN_CHART = 6

#: Meaning of the values of a ratio, for the page in TensorBoard.
SCALE = (
    "0.3 means: the transformations cause 30 % of the variance that another sample causes. 0 is invariant; at 1,"
    " transformations matter as much as samples do; more than 1 means that the layer tells transformations apart better"
    " than samples."
)

#: Characters that some loggers drop from the name of a curve, such as MLflow's the # of ``relu#1``.
DROPPED = re.compile(r"[^\w./ -]")


def check_tags(names: Sequence[str]) -> None:
    """Check that loggers and file systems accept the names of measures and monitors.

    Raises:
        ValueError: If one has other characters than letters, numbers, spaces and ``. _ - /``, begins or ends with a
            slash, or leads out of a folder.
    """
    for name in names:
        if not name or DROPPED.search(name) or not all(part.strip(". ") for part in name.split("/")):
            raise ValueError(
                "Expected names of measures and monitors to consist of letters, numbers, spaces and the signs . _ - /,"
                f" but got {name!r}: give it another name with a dict, {{'name': measure}}."
            )


@contextmanager
def errors_as_warnings(warned: set[type]) -> Iterator[None]:
    """Turn errors into one warning for each class: a failure to log, such as a full disk, must not end a training."""
    try:
        yield
    except Exception as error:
        if type(error) not in warned:
            warned.add(type(error))
            rank_zero_warn(f"InvarianceMonitor could not log: {type(error).__name__}: {error}. Training goes on.")


def curves(layers: Iterable[str]) -> dict[str, str]:
    """Return layer → name of its curve: the layer's, with a number if a logger would confuse it with another."""
    names: dict[str, str] = {}
    used: set[str] = set()
    for layer in layers:
        name, number = layer, 2
        while DROPPED.sub("", name) in used:
            name, number = f"{layer}_{number}", number + 1
        used.add(DROPPED.sub("", name))
        names[layer] = name
    return names


def _experiments(trainer: pl.Trainer) -> list[Any]:
    return [getattr(logger, "experiment", None) for logger in trainer.loggers if not is_dummy(logger)]


def scalars(result: InvarianceResult, tags: Mapping[str, str], suffix: str = "") -> dict[str, float]:
    """Return tag → value: of each layer, the last one and the mean, outputs, and what one looks up in a section apart.

    In the section ``values``: bounds of intervals, and where more than 1 % of the units are infinite or dead their
    fraction and the mean of the live ones.
    """
    found: dict[str, float] = {}
    for measure, tag in tags.items():
        names = curves(result[measure])
        for row in result.table(measure):
            found[f"{tag}/{names[row.layer]}"] = row.mean
            details: dict[str, float] = {}
            if row.share_infinite > MAX_LEFT_OUT:
                details["infinite"] = row.share_infinite
            if row.share_dead > MAX_LEFT_OUT:
                details |= {"dead": row.share_dead, "live": row.live_mean}
            if math.isfinite(row.low):
                details |= {"low": row.low, "high": row.high}
            found |= {f"{DETAILS}/{tag}_{kind}/{names[row.layer]}": value for kind, value in details.items()}
        found[f"{tag}_last"] = result.last(measure)
        found[f"{tag}_mean"] = result.mean(measure)
    for metric, values in result.outputs.items():
        found[f"{metric}{suffix}_mean"] = values.mean
        for end, bound in (("low", values.mean_low), ("high", values.mean_high)):
            if bound is not None and math.isfinite(bound):
                found[f"{DETAILS}/{metric}{suffix}_mean_{end}"] = bound
        if math.isfinite(values.worst):
            found[f"{metric}{suffix}_worst"] = values.worst
    return found


def draw(
    trainer: pl.Trainer,
    history: Sequence[InvarianceResult],
    tags: Mapping[str, str],
    measures: Mapping[str, Metric],
    suffix: str,
    histograms: bool,
    warned: set[type],
    limits: tuple[float, float] | None = None,
) -> None:
    """Log the pictures of a history, the newest result last; a failure is a warning.

    ``measures`` are those whose tags are to be explained: none where they already are.
    """
    if measures:
        with errors_as_warnings(warned):
            explain(trainer, history[-1], tags, measures, suffix)
    with errors_as_warnings(warned):
        log_pictures(trainer, history, tags, limits)
    if histograms:
        with errors_as_warnings(warned):
            log_histograms(trainer, history[-1], tags)


def log_pictures(
    trainer: pl.Trainer,
    history: Sequence[InvarianceResult],
    tags: Mapping[str, str],
    limits: tuple[float, float] | None = None,
) -> None:
    """Draw and log the pictures of the last result of a history, in a size that can be read as a thumbnail."""
    latest, step = history[-1], logger_step(trainer)
    for measure, tag in tags.items():
        if not latest[measure]:  # it is not defined for any layer
            continue
        common: dict[str, Any] = {"title": tag, "size": SIZE}
        ends = limits or _limits_of_training(history, measure)
        figures = {"heatmap": heatmap(latest, measure, limits=ends, **common)}
        figures["evolution"] = evolution(history, measure, limits=limits, **common)
        if measure in latest.response:
            figures["response"] = response(latest, measure, **common)
        for kind, figure in figures.items():
            figure.set_dpi(DPI)
            log_image(trainer, f"{tag}/{kind}", render(figure), step)


def _limits_of_training(history: Sequence[InvarianceResult], measure: str) -> tuple[float, float] | None:
    """Return the ends of the colours, from the channels of the first and the latest result."""
    ends = [result for result in (history[0], history[-1]) if measure in result]
    values = [v for result in ends for layer in result[measure] for v in result.per_channel(measure, layer).tolist()]
    return limits_of_ratios(values) if history[0].ratios.get(measure, False) else limits_of(values)


def log_histograms(trainer: pl.Trainer, result: InvarianceResult, tags: Mapping[str, str]) -> None:
    """Log the distribution over channels of each layer, to loggers with histograms (TensorBoard)."""
    for experiment in _experiments(trainer):
        if not hasattr(experiment, "add_histogram"):
            continue
        for measure, tag in tags.items():
            for layer in result[measure]:
                values = result.per_channel(measure, layer)
                values = values[values.isfinite()]
                if len(values):
                    experiment.add_histogram(f"{tag}/channels/{layer}", values.numpy(), logger_step(trainer))


def explain(
    trainer: pl.Trainer,
    result: InvarianceResult,
    tags: Mapping[str, str],
    measures: Mapping[str, Metric],
    suffix: str = "",
) -> None:
    """Write a page that explains the tags, and charts of each measure, to TensorBoard."""
    for experiment in _experiments(trainer):
        if hasattr(experiment, "add_text"):
            text = _text(result, tags, measures, suffix)
            experiment.add_text(f"invariance{suffix}", text, logger_step(trainer))
        if hasattr(experiment, "add_custom_scalars"):
            categories = {tag: _category(tag, result, measure) for measure, tag in tags.items()}
            for tag in (f"{metric}{suffix}" for metric in result.outputs):
                chart = _chart("mean and worst of the transformations", [f"{tag}_mean", f"{tag}_worst"])
                categories[tag] = Category(title=tag, chart=[chart])
            _write_layout(experiment, {**_known_layout(experiment), **categories})


def _category(tag: str, result: InvarianceResult, measure: str) -> Category:
    """Make the charts of a measure: a few layers from first to last, with bands, and the last layer and the mean."""
    of_layers = [f"/{name}" for name in curves(result[measure]).values()]
    names = [of_layers[i] for i in evenly(len(of_layers), MOST_IN_CHART)]
    title = ", ".join(shorten(name, 20) for name in without_prefix([name[1:] for name in names])[1])
    charts = [_chart(title, [tag + name for name in names])]
    if _has_intervals(result, measure):
        bands = [(tag + name, f"{DETAILS}/{tag}_low{name}", f"{DETAILS}/{tag}_high{name}") for name in names]
        series = [MarginChartContent.Series(value=value, lower=low, upper=high) for value, low, high in bands]
        title = f"{title} ({result.confidence:.0%} intervals)"
        charts = [Chart(title=title, margin=MarginChartContent(series=series))]
    charts.append(_chart("last layer, and mean over the layers", [f"{tag}_last", f"{tag}_mean"]))
    return Category(title=tag, chart=charts)


def _chart(title: str, tags: Iterable[str]) -> Chart:
    """Make a chart of lines; its tags are regular expressions, which TensorBoard matches at the beginning only."""
    return Chart(title=title, multiline=MultilineChartContent(tag=[f"{re.escape(tag)}$" for tag in tags]))


def _write_layout(writer: Any, categories: Mapping[str, Category]) -> None:
    """Write a layout: `SummaryWriter.add_custom_scalars` supports only one band in a chart."""
    summary = custom_scalars({})  # type: ignore[no-untyped-call]
    summary.value[0].tensor.string_val[0] = Layout(category=categories.values()).SerializeToString()
    writer._get_file_writer().add_summary(summary)


def _known_layout(writer: Any) -> dict[str, Category]:
    """Read the layout that this process has written so far from its event files.

    A run has one layout, so that a new one would replace the user's. ``SummaryWriter`` does not keep what it wrote.
    """
    writer.flush()
    layout: dict[str, Category] = {}
    for path in Path(writer.log_dir).glob(f"events.out.tfevents.*.{os.getpid()}.*"):
        events = EventAccumulator(str(path), size_guidance={"images": 1, "tensors": 0})
        events.Reload()
        if "custom_scalars__config__" in events.Tags()["tensors"]:
            found = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
            layout.update({category.title: category for category in Layout.FromString(found).category})
    return layout


def _text(result: InvarianceResult, tags: Mapping[str, str], measures: Mapping[str, Metric], suffix: str) -> str:
    """Return the samples, the transformations, the meaning of the tags, and the layers in Markdown."""
    labels = result.transformations
    first = result.input_layer
    shown = labels if len(labels) <= 32 else [*labels[:16], "…", labels[-1]]
    meanings: dict[str, str] = {}
    for measure, tag in tags.items():
        about = (inspect.getdoc(type(measures[measure])) or "").split("\n")[0]
        if (higher := result.higher_is_better.get(measure)) is not None:
            about += f" {'Higher' if higher else 'Lower'} is more {result.quality(measure)}."
        about += f" {SCALE}" if result.ratios.get(measure) else ""
        meanings[f"`{tag}/LAYER`"] = f"{about} The mean over the finite values of the layer's activations."
        meanings[f"`{tag}_last`"] = "The last layer that runs: the curve to watch, and to stop on."
        meanings[f"`{tag}_mean`"] = f"The mean of `{tag}/LAYER` over the layers{f', without `{first}`' * bool(first)}."
        meanings[f"`{DETAILS}/{tag}_dead/LAYER`, `…_live/LAYER`, `…_infinite/LAYER`"] = (
            "The fraction of its units that never change, the mean without these, and the fraction that are infinite,"
            " and so not in the mean. Only where such units are more than 1 %."
        )
        if _has_intervals(result, measure):
            meanings[f"`{DETAILS}/{tag}_low/LAYER`, `…_high/LAYER`"] = (
                f"The bounds of the {result.confidence:.0%} confidence interval over samples of `{tag}/LAYER`."
            )
        meanings[f"`{tag}/heatmap`"] = "A column for each layer, a cell for each channel."
        meanings[f"`{tag}/evolution`"] = "A row for each layer, a column for each evaluation so far."
        if measure in result.response:
            meanings[f"`{tag}/response`"] = "How much each transformation changes each layer; 0 for no change."
    for metric, values in result.outputs.items():
        about = f"{metric} of the network's predictions"
        meanings[f"`{metric}{suffix}_mean`"] = f"{about}, the mean over the transformations."
        if math.isfinite(values.worst):
            meanings[f"`{metric}{suffix}_worst`"] = f"{about} under the transformation where it is worst."
    rows = [row for measure in tags for row in result.table(measure)]
    shapes = {row.layer: f"{row.type} {' × '.join(map(str, row.shape)) or 'scalar'}".strip() for row in rows}
    parts = [f"{result.n_samples} samples × {len(labels)} transformations: {', '.join(shown)}."]
    if first:
        parts.append(f"`{first}` is the transformed input of the network itself: the value to compare the layers with.")
    for heading, table in ((("tag", "meaning"), meanings), (("layer", "type and shape"), shapes)):
        parts.append("\n".join(f"| {left} | {right} |" for left, right in (heading, ("---", "---"), *table.items())))
    return "\n\n".join(parts)


def _has_intervals(result: InvarianceResult, measure: str) -> bool:
    return measure in result.influences and result.confidence is not None
