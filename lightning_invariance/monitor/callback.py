"""The callback: when to evaluate, what to log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.engine.options import Options
from lightning_invariance.evaluate import check_transformations, evaluate_with, named_measures, named_metrics
from lightning_invariance.measures import NormalizedVariance
from lightning_invariance.model.selection import Layers, select_layers
from lightning_invariance.monitor.history import History
from lightning_invariance.monitor.logging import (
    check_tags,
    explain,
    forgiving,
    log_histograms,
    log_pictures,
    log_scalars,
    scalars,
)
from lightning_invariance.monitor.trainer import (
    callbacks_of,
    is_due,
    logger_step,
    options_in,
    refuse_split_models,
    scores,
    spare_patience,
    validation_data,
    warn_of_averaging,
    warn_of_old_values,
)
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.transforms import TransformationSet

if TYPE_CHECKING or find_spec("pytorch_lightning") is None:
    Callback = pl.Callback
else:
    from pytorch_lightning import Callback as OtherCallback

    class Callback(pl.Callback, OtherCallback):
        """The callback of both distributions of Lightning: the LightningCLI of each asks for an instance of its own."""


#: Memory for the values of every single activation in the history; older results then keep one value a channel.
HISTORY_BYTES = 256 * 2**20


class InvarianceMonitor(Callback):
    """Shows, while a model trains, how invariant every layer is to a set of transformations of its input.

    It evaluates the untrained network before the first epoch, and then at the end of validation every
    ``every_n_epochs`` epochs (``(epoch + 1) % every_n_epochs == 0``), and always at the first validation of a run.
    Without validation it does so at the end of the training epoch. Training is bit for bit what it would be.

    **Logged metrics**, to every logger of the trainer, at the step of Lightning's validation metrics: the mean over the
    finite values of each layer, ``{Measure}/{layer}``, and their mean over the layers, ``{Measure}_mean``.
    ``EarlyStopping`` and ``ModelCheckpoint`` can monitor all of these. With ``every_n_epochs`` above 1 a validation
    without a new value does not count against the patience of ``EarlyStopping``; give ``ModelCheckpoint`` the same
    ``every_n_epochs``, since it would take the last value for that of a later model.

    **Logged images**, where the logger takes images: ``{Measure}/heatmap``, layers × channels (the paper's figure 8);
    ``{Measure}/evolution``, layers × evaluations so far, under the accuracy or loss that the model logs; and
    ``{Measure}/response``, what each transformation does to each layer, for measures with ``response=True``. What
    cannot be written is warned of once. **In TensorBoard** also, once, a chart of all layers of each measure (Custom
    Scalars; your own layout is kept) and what the tags mean (Text); with ``histograms=True`` the distribution over
    channels, ``{Measure}/channels/{layer}``.

    Args:
        transformations: the set, such as ``rotations(16)``; at least two transformations.
        measures: metrics of ``lightning_invariance.measures``, or a dict that names them; by default
            :class:`~lightning_invariance.measures.NormalizedVariance` with ``response=True``.
        data: dataset, loader or tensor; by default the trainer's (first) validation loader.
        layers: which layers, by default every leaf; see :func:`layer_names`.
        every_n_epochs: how often.
        max_samples: how many samples: a random choice, the same every time. None takes all.
        batch_size: largest number of transformed inputs in one forward pass, or ``"auto"``; see :func:`evaluate`.
        forward: ``forward(model, x)``, or ``forward(model, x, batch)``, see :func:`evaluate`.
        input_fn: picks x from a collated batch where :class:`STLoader` does not find it.
        seed: of the choice of samples.
        name: added to the names of the measures, ``{Measure}_rotation``; needed where there are several monitors.
        histograms: whether TensorBoard gets the distribution over channels.
        channel_axis: where the units stand in the activations of some layers; see :func:`evaluate`.
        operations: whether to measure operations, too; see there.
        confidence: of intervals over samples, such as 0.95, which cost most measures a second pass: also logs
            ``{Measure}_low/{layer}`` and ``{Measure}_high/{layer}``, which TensorBoard draws as bands (Custom Scalars),
            and marks in the evolution picture what differs from the untrained network. By default there are none.
        outputs: metrics of predictions and targets, such as an accuracy, of the network under each transformation; see
            :func:`evaluate`. Logged as ``{Metric}_mean`` and ``{Metric}_worst``.

    Attributes:
        history: the results so far, the untrained network first, each with ``epoch`` (−1 for the untrained network),
            ``step`` and ``scores``, the metrics that the model logged in the same validation; ``epoch`` is None where
            ``trainer.validate`` asked for it. A training from the start begins a new one. It is part of the
            checkpoint, there with a value for each channel of the first and the newest results (4 MB) and the mean of
            each layer of the others; in memory older results keep one value a channel when it exceeds 256 MB.

    Raises:
        ValueError: If ``every_n_epochs`` is below 1, ``confidence`` is not in (0, 1), the name of a measure holds signs
            that loggers do not take, or (when training starts) a layer is unknown.
        MisconfigurationException: When training starts, without ``data`` and validation data, with another monitor of
            the same name, or with a strategy that splits the model (FSDP, DeepSpeed, tensor parallel).
    """

    def __init__(
        self,
        transformations: TransformationSet,
        measures: Sequence[Metric] | Mapping[str, Metric] | None = None,
        data: Any = None,
        layers: Layers = None,
        every_n_epochs: int = 1,
        max_samples: int | None = 256,
        batch_size: int | Literal["auto"] = "auto",
        *,
        forward: Callable[..., Any] | None = None,
        input_fn: Callable[..., Tensor] | None = None,
        seed: int = 0,
        name: str | None = None,
        histograms: bool = False,
        channel_axis: Mapping[str, int] | None = None,
        operations: bool = False,
        confidence: float | None = None,
        outputs: Metric | Sequence[Metric] | Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        check_transformations(transformations)
        for argument, value, least in (("every_n_epochs", every_n_epochs, 1), ("max_samples", max_samples, 2)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"Expected argument `{argument}` to be an int of at least {least}, but got {value}.")
        options = Options(layers, batch_size, max_samples, forward=forward, input_fn=input_fn, seed=seed)
        self.options = replace(
            options,
            channel_axis=channel_axis,
            operations=operations,
            confidence=confidence,
            outputs=named_metrics(outputs),
        )
        self.data, self.transformations = data, transformations
        self.measures = named_measures([NormalizedVariance(response=True)] if measures is None else measures)
        check_tags([*self.measures, *self.options.outputs, *([] if name is None else [name])])
        self.every_n_epochs, self.name, self.histograms = every_n_epochs, name, histograms
        self._kept = History(self.options, self.measures, transformations)
        self._validated = self._undrawn = self._explained = False
        self._fits = True  # until the trainer says otherwise
        self._told: set[type] = set()

    @property
    def state_key(self) -> str:
        """Monitors of different names keep different states in a checkpoint."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that split the model."""
        refuse_split_models(trainer)
        self._fits = stage == "fit"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what can be checked before any work is done."""
        self._validated = False
        names = [callback.name for callback in callbacks_of(trainer) if isinstance(callback, InvarianceMonitor)]
        if names.count(self.name) > 1:
            raise MisconfigurationException(
                f"Expected InvarianceMonitors of different names in one trainer, but got {names}: set `name`."
            )
        if self.data is None and not trainer.enable_validation:
            raise MisconfigurationException(
                "InvarianceMonitor found no validation data in the trainer: give it `data`, or the trainer a validation"
                " loader (and no `limit_val_batches=0`) and the model a `validation_step`."
            )
        select_layers(pl_module, self.options.layers)
        warn_of_averaging(trainer, self)
        if self.every_n_epochs > 1:
            warn_of_old_values(trainer, self._tags, self.every_n_epochs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the untrained network."""
        if self.history and trainer.global_step:  # resumed, or trained further
            return
        self._kept.begin()
        self._explained = False
        result = self._evaluate(trainer, pl_module, epoch=trainer.current_epoch - 1)
        # `self.log` here would wait for the end of the epoch.
        with forgiving(self._told):
            log_scalars(trainer, scalars(result, self._tags, self._suffix), logger_step(trainer))
        self._draw(trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate at the end of validation."""
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == "fit"
        if is_due(trainer, self.every_n_epochs) or not self._validated or not fitting:
            self._validated = self._validated or fitting
            self._evaluate_and_log(trainer, pl_module)
        else:
            spare_patience(trainer, self._tags)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what the validation has measured, now that all of its metrics are known."""
        if self._undrawn:
            monitors = [callback for callback in callbacks_of(trainer) if isinstance(callback, InvarianceMonitor)]
            self.history[-1].scores = scores(trainer, [tag for monitor in monitors for tag in monitor._tags.values()])
            self._draw(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep an old value from counting once more where this epoch has no validation and no evaluation is due."""
        if not trainer.enable_validation and not is_due(trainer, self.every_n_epochs):
            spare_patience(trainer, self._tags)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate at the end of an epoch that has no validation."""
        if not trainer.enable_validation and is_due(trainer, self.every_n_epochs):
            self._evaluate_and_log(trainer, pl_module)
            self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The history, as plain data of bounded size."""
        return self._kept.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint, or begin a new one where it was measured with other arguments.

        A checkpoint that is restored for a validation or test alone does not replace the history of a training.
        """
        if self._fits or not self.history:
            self._kept.load_state_dict(state_dict)

    @property
    def history(self) -> list[InvarianceResult]:
        """The results so far."""
        return self._kept.results

    @property
    def earlier_histories(self) -> list[list[InvarianceResult]]:
        """Those of before a resume with other arguments, and those of before a new training, the oldest of each first.

        A checkpoint holds the former alone.
        """
        return self._kept.earlier()

    def _evaluate_and_log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        result = self._evaluate(trainer, pl_module, epoch=trainer.current_epoch if self._fits else None)
        # Every rank has the same values: `rank_zero_only` logs them without a collective and without a warning.
        self.log_dict(  # type: ignore[attr-defined]
            scalars(result, self._tags, self._suffix), on_step=False, on_epoch=True, sync_dist=True, rank_zero_only=True
        )

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int | None) -> InvarianceResult:
        data = self.data if self.data is not None else validation_data(trainer)
        options = options_in(trainer, pl_module, self.options, self.data is not None)
        result = evaluate_with(options, pl_module, data, self.transformations, self.measures)
        result.epoch, result.step = epoch, logger_step(trainer)
        self._kept.add(result, HISTORY_BYTES)
        self._undrawn = True
        return result

    @property
    def _tags(self) -> dict[str, str]:
        """Measure → what its tags begin with."""
        return {measure: measure if self.name is None else f"{measure}_{self.name}" for measure in self.measures}

    @property
    def _suffix(self) -> str:
        """What the tags of metrics of predictions, and of the text, end with."""
        return "" if self.name is None else f"_{self.name}"

    def _draw(self, trainer: pl.Trainer) -> None:
        """Log pictures, text and histograms, on one process."""
        self._undrawn = False
        if not trainer.is_global_zero or not trainer.loggers:
            return
        drawn: list[Callable[[], None]] = [partial(log_pictures, trainer, self.history, self._tags)]
        if not self._explained:
            self._explained = True
            drawn.insert(0, partial(explain, trainer, self.history[-1], self._tags, self.measures, self._suffix))
        if self.histograms:
            drawn.append(partial(log_histograms, trainer, self.history[-1], self._tags))
        for draw in drawn:
            with forgiving(self._told):
                draw()
