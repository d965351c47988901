"""Scalars, pictures and explanations to whatever loggers a trainer has."""

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
from lightning_invariance.monitor.trainer import logger_step
from lightning_invariance.plots import evolution, heatmap, response
from lightning_invariance.plots.common import limits_of, render
from lightning_invariance.results.intervals import NOTABLE
from lightning_invariance.results.result import InvarianceResult

#: Signs that some logger drops from the name of a curve, as MLflow's does with the # of ``relu#1``.
DROPPED = re.compile(r"[^\w./ -]")


def check_tags(names: Sequence[str]) -> None:
    """Raise for names of measures and monitors that some logger, or a file system, would not take.

    Raises:
        ValueError: If one has other signs than letters, numbers, spaces and ``. _ - /``, or begins or ends with a
            slash, or leads out of a folder.
    """
    for name in names:
        if not name or DROPPED.search(name) or not all(part.strip(". ") for part in name.split("/")):
            raise ValueError(
                "Expected names of measures and monitors to consist of letters, numbers, spaces and the signs . _ - /,"
                f" but got {name!r}: give it another name with a dict, {{'name': measure}}."
            )


@contextmanager
def forgiving(told: set[type]) -> Iterator[None]:
    """What fails here ends no training that would live without it: a full disk, a logger that refuses.

    Args:
        told: the classes of errors that were warned of; each is once.
    """
    try:
        yield
    except Exception as error:
        if type(error) not in told:
            told.add(type(error))
            rank_zero_warn(f"InvarianceMonitor could not log: {type(error).__name__}: {error}. Training goes on.")


def curves(layers: Iterable[str]) -> dict[str, str]:
    """Layer → the name of its curve: its own, or another where a logger would take it for that of another layer."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for layer in layers:
        name, number = layer, 2
        while DROPPED.sub("", name) in taken:
            name, number = f"{layer}_{number}", number + 1
        taken.add(DROPPED.sub("", name))
        names[layer] = name
    return names


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Log numbers where ``self.log`` is not possible."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=step)


def _experiments(trainer: pl.Trainer) -> list[Any]:
    """What the loggers write with."""
    return [getattr(logger, "experiment", None) for logger in trainer.loggers if not is_dummy(logger)]


def scalars(result: InvarianceResult, tags: Mapping[str, str], suffix: str = "") -> dict[str, float]:
    """Tag → the mean of each layer and that over the layers, and the shares of infinite and dead units above 1 %.

    With ``confidence`` also the bounds of the interval of each layer.

    Args:
        result: an evaluation.
        tags: measure → what its tags begin with.
        suffix: of metrics of predictions.
    """
    found: dict[str, float] = {}
    for measure, tag in tags.items():
        names = curves(result[measure])
        for row in result.table(measure):
            for kind, share in (("infinite", row.share_infinite), ("dead", row.share_dead)):
                if share > NOTABLE:
                    found[f"{tag}_{kind}/{names[row.layer]}"] = share
            found[f"{tag}/{names[row.layer]}"] = row.mean
            if math.isfinite(row.low):
                found[f"{tag}_low/{names[row.layer]}"] = row.low
                found[f"{tag}_high/{names[row.layer]}"] = row.high
        found[f"{tag}_mean"] = result.mean(measure)
    for metric, values in result.outputs.items():
        found[f"{metric}{suffix}_mean"] = values.mean
        for end, bound in (("low", values.mean_low), ("high", values.mean_high)):
            if bound is not None and math.isfinite(bound):
                found[f"{metric}{suffix}_mean_{end}"] = bound
        if math.isfinite(values.worst):
            found[f"{metric}{suffix}_worst"] = values.worst
    return found


def log_pictures(trainer: pl.Trainer, history: Sequence[InvarianceResult], tags: Mapping[str, str]) -> None:
    """Draw and log the pictures of the last result of a history.

    Args:
        trainer: whose loggers.
        history: results, the last of this moment.
        tags: measure → what its tags begin with.
    """
    latest, step = history[-1], logger_step(trainer)
    for measure, tag in tags.items():
        if not latest[measure]:  # which has skipped every layer
            continue
        limits = _fixed_limits(history[0], measure)
        log_image(trainer, f"{tag}/heatmap", render(heatmap(latest, measure, limits=limits)), step)
        log_image(trainer, f"{tag}/evolution", render(evolution(history, measure, limits=limits)), step)
        if measure in latest.response:
            log_image(trainer, f"{tag}/response", render(response(latest, measure, limits=limits)), step)


def _fixed_limits(first: InvarianceResult, measure: str) -> tuple[float, float] | None:
    """One scale for a whole training: ten times beyond what there was at its beginning."""
    if first.ratios.get(measure, False):  # which have a fixed scale already
        return None
    values = [v for layer in first[measure] for v in first.per_channel(measure, layer).tolist()]
    found = limits_of(values)
    return found and (found[0] / 10, found[1] * 10)


def log_histograms(trainer: pl.Trainer, result: InvarianceResult, tags: Mapping[str, str]) -> None:
    """Log the distribution over the channels of each layer to the loggers that take histograms (TensorBoard)."""
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
    """Tell TensorBoard, once, what the tags mean, and to show all layers of a measure in one chart.

    Args:
        trainer: whose loggers.
        result: the first evaluation, which knows the layers.
        tags: measure → what its tags begin with.
        measures: the measures.
        suffix: of the tag of the text, and of metrics of predictions.
    """
    for experiment in _experiments(trainer):
        if hasattr(experiment, "add_text"):
            text = _text(result, tags, measures, suffix)
            experiment.add_text(f"invariance{suffix}", text, logger_step(trainer))
        if hasattr(experiment, "add_custom_scalars"):
            categories = {tag: _category(tag, result, measure) for measure, tag in tags.items()}
            categories |= {f"{metric}{suffix}": _category_of_output(f"{metric}{suffix}") for metric in result.outputs}
            _write_layout(experiment, {**_known_layout(experiment), **categories})


def _category(tag: str, result: InvarianceResult, measure: str) -> Category:
    """The charts of a measure: lines of all layers, bands where there are intervals, and the mean."""
    # The tags of a chart are regular expressions that need not match to the end.
    names = [*curves(result[measure]).values()]
    every = MultilineChartContent(tag=[f"{re.escape(f'{tag}/{name}')}$" for name in names])
    mean = MultilineChartContent(tag=[f"{re.escape(tag)}_mean$"])
    charts = [Chart(title="all layers", multiline=every), Chart(title="mean over the layers", multiline=mean)]
    if measure in result.influences and result.confidence is not None:
        bands = [(f"{tag}/{name}", f"{tag}_low/{name}", f"{tag}_high/{name}") for name in names]
        series = [MarginChartContent.Series(value=value, lower=low, upper=high) for value, low, high in bands]
        title = f"all layers, {result.confidence:.0%} intervals"
        charts.insert(1, Chart(title=title, margin=MarginChartContent(series=series)))
    return Category(title=tag, chart=charts)


def _category_of_output(tag: str) -> Category:
    """The chart of a metric of predictions."""
    ends = MultilineChartContent(tag=[f"{re.escape(tag)}_{end}$" for end in ("mean", "worst")])
    return Category(title=tag, chart=[Chart(title="mean and worst of the transformations", multiline=ends)])


def _write_layout(writer: Any, categories: Mapping[str, Category]) -> None:
    """Write a layout; `SummaryWriter.add_custom_scalars` makes charts with a single band only."""
    summary = custom_scalars({})  # type: ignore[no-untyped-call]
    summary.value[0].tensor.string_val[0] = Layout(category=categories.values()).SerializeToString()
    writer._get_file_writer().add_summary(summary)


def _known_layout(writer: Any) -> dict[str, Category]:
    """The layout that this process has written so far, from its event files.

    A run has one layout, and the last that is written replaces those before: without this the user's would be lost.
    ``SummaryWriter`` does not tell what it has written. Done once a training.
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
    """What is measured and what the tags mean, as Markdown."""
    labels = result.transformations
    shown = labels if len(labels) <= 32 else [*labels[:16], "…", labels[-1]]
    lines = [
        f"{result.n_samples} samples × {len(labels)} transformations: {', '.join(shown)}.",
        "",
        "| tag | meaning |",
        "|---|---|",
    ]
    for measure, tag in tags.items():
        about = (inspect.getdoc(type(measures[measure])) or "").split("\n")[0]
        higher = result.higher_is_better.get(measure)
        better = "" if higher is None else f" {'Higher' if higher else 'Lower'} is more invariant."
        lines += [
            f"| `{tag}/LAYER` | {about}{better} The mean over the finite values of the layer's activations. |",
            f"| `{tag}_mean` | The mean of these over the layers. |",
            f"| `{tag}_infinite/LAYER`, `{tag}_dead/LAYER` | Which share of its units is infinite, and so not in the"
            " mean; or never changes. Only above 1 %. |",
            *_lines_of_intervals(tag, result, measure),
            f"| `{tag}/heatmap` | A column for each layer, a cell for each channel. |",
            f"| `{tag}/evolution` | A row for each layer, a column for each evaluation so far. |",
        ]
        if measure in result.response:
            lines.append(f"| `{tag}/response` | What each transformation does to each layer. |")
    for metric, values in result.outputs.items():
        about = f"| {metric} of the network's predictions"
        lines.append(f"| `{metric}{suffix}_mean` {about}, the mean over the transformations. |")
        if math.isfinite(values.worst):
            lines.append(f"| `{metric}{suffix}_worst` {about} under the transformation where it is worst. |")
    lines += ["", "| layer | shape |", "|---|---|"]
    shapes = {row.layer: row.shape for measure in tags for row in result.table(measure)}
    lines += [f"| {layer} | {' × '.join(map(str, shape)) or 'scalar'} |" for layer, shape in shapes.items()]
    return "\n".join(lines)


def _lines_of_intervals(tag: str, result: InvarianceResult, measure: str) -> list[str]:
    """What the tags of intervals mean, where there are any."""
    if measure not in result.influences or result.confidence is None:
        return []
    about = f"The bounds of the {result.confidence:.0%} confidence interval over samples of `{tag}/LAYER`."
    return [f"| `{tag}_low/LAYER`, `{tag}_high/LAYER` | {about} |"]
