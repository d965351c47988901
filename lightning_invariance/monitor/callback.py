"""The Lightning callback: it evaluates during a training and logs the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.engine.options import Options
from lightning_invariance.evaluate import check_transformations, evaluate_with, named_measures, named_metrics
from lightning_invariance.messages import check_int
from lightning_invariance.model.selection import Layers, select_layers
from lightning_invariance.monitor.history import Evaluations, Handover, History
from lightning_invariance.monitor.logging import check_tags, draw, errors_as_warnings, scalars
from lightning_invariance.monitor.trainer import (
    callbacks_of,
    check_validation_data,
    logger_step,
    options_in,
    refuse_split_models,
    runs_in_child,
    scores,
    spare_patience,
    validates_often,
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
        """The base class of both distributions of Lightning: the LightningCLI of each requires its own."""


#: Bytes of memory for values of single activations in the history; beyond, older results keep one value per channel.
HISTORY_BYTES = 256 * 2**20


class InvarianceMonitor(Callback):
    """Shows, while a model trains, how invariant every layer is to a set of transformations of its input.

    It evaluates the untrained network before the first epoch, and then at the end of validation every
    ``every_n_epochs`` epochs (``(epoch + 1) % every_n_epochs == 0``), and always at the first validation of a run.
    Where an epoch has several validations it counts them instead of epochs, and evaluates at the first of every
    ``every_n_epochs``. Without validation it does so at the end of the training epoch. The training is bit for bit the
    one without it.

    **Logged metrics**, to every logger of the trainer, at the step of Lightning's validation metrics: the mean over the
    finite values of each layer, ``{Measure}/{layer}``; the value of the last layer that runs, ``{Measure}_last``; and
    the mean over the layers, ``{Measure}_mean``. ``EarlyStopping`` and ``ModelCheckpoint`` can monitor the last two:
    watch ``_last``, since the mean over all layers hardly moves when only the last layers become invariant. Give
    ``ModelCheckpoint`` this ``every_n_epochs``: it would rank later models by the last value; ``EarlyStopping`` counts
    new values alone.

    **Logged images**, to loggers that accept images: ``{Measure}/heatmap``, layers × channels (the paper's figure 8);
    ``{Measure}/evolution``, layers × evaluations so far, under the accuracy or loss that the model logs; and
    ``{Measure}/response``, the effect of each transformation on each layer, for measures with ``response=True``. **In
    TensorBoard** also, once, charts of a few layers of each measure (Custom Scalars; your own layout is kept) and the
    meaning of the tags and of the values (Text). A failure to write is one warning, never an error.

    Args:
        transformations: the set, such as ``rotations(16)``; at least two transformations.
        measures: metrics of ``lightning_invariance.measures``, or a dict that names them; by default
            :class:`~lightning_invariance.measures.NormalizedVariance` with ``response=True``.
        data: dataset, loader or tensor; by default the trainer's (first) validation loader.
        layers: which layers, by default every leaf; see :func:`layer_names`.
        every_n_epochs: how often to evaluate, in epochs, or in validations where an epoch has several; by default 1.
        every_n_steps: how often to evaluate, in steps of the optimiser (``trainer.global_step``), instead: after the
            training batch, between validations and with any number of epochs.
        max_samples: how many samples: a random choice, equal at every evaluation. None uses all.
        batch_size: see :func:`evaluate`, as for ``forward``, ``input_fn``, ``seed``, ``channel_axis``, ``vectors``,
            ``operations``.
        include_input: whether the first row of every table and picture is the transformed input itself, ``"input"``.
        name: added to the names of the measures, ``{Measure}_rotation``; needed where there are several monitors.
        histograms: whether TensorBoard gets the distribution over channels.
        limits: the ends of the colour scale of heatmap and evolution; by default they follow the values so far.
        confidence: of intervals over samples, such as 0.95, which cost most measures a second pass: also logs
            ``values/{Measure}_low/{layer}`` and ``_high/{layer}``, which TensorBoard draws as bands (Custom Scalars),
            and marks differences from the untrained network in the evolution picture. By default there are none.
        outputs: metrics of predictions, see :func:`evaluate`, as for ``outputs_move``; logged as ``{Metric}_mean`` and
            ``{Metric}_worst``.

    Attributes:
        history: the results so far, the untrained network first, each with ``epoch`` (−1 for the untrained one; None
            in ``trainer.validate``), ``step`` and ``scores``, the metrics of the model in that validation. A checkpoint
            contains it; a training from the start begins a new one.

    Raises:
        ValueError: If ``every_n_epochs`` or ``every_n_steps`` is below 1, or both are given, ``confidence`` is not in
            (0, 1), a name contains characters that loggers do not accept, or (when training starts) a layer is unknown.
        MisconfigurationException: When training starts, without ``data`` and validation data, with another monitor of
            the same name, or with a strategy that splits layers (DeepSpeed, tensor parallel).
    """

    def __init__(
        self,
        transformations: TransformationSet,
        measures: Sequence[Metric] | Mapping[str, Metric] | None = None,
        data: Any = None,
        layers: Layers = None,
        every_n_epochs: int | None = None,
        max_samples: int | None = 256,
        batch_size: int | Literal["auto"] = "auto",
        *,
        every_n_steps: int | None = None,
        forward: Callable[..., Any] | None = None,
        input_fn: Callable[..., Tensor] | None = None,
        seed: int = 0,
        name: str | None = None,
        histograms: bool = False,
        limits: tuple[float, float] | None = None,
        channel_axis: Mapping[str, int] | None = None,
        vectors: Mapping[str, int | Sequence[int]] | None = None,
        operations: bool = False,
        include_input: bool = True,
        confidence: float | None = None,
        outputs: Metric | Sequence[Metric] | Mapping[str, Metric] | None = None,
        outputs_move: bool = False,
    ) -> None:
        super().__init__()
        check_transformations(transformations)
        if every_n_steps is not None:
            check_int("every_n_steps", every_n_steps)
            if every_n_epochs is not None:
                raise ValueError(
                    f"Expected one of the arguments `every_n_epochs` and `every_n_steps`, but got {every_n_epochs} and"
                    f" {every_n_steps}."
                )
        every_n_epochs = 1 if every_n_epochs is None else check_int("every_n_epochs", every_n_epochs)
        if max_samples is not None:
            check_int("max_samples", max_samples, 2)
        self.options = Options(
            layers=layers,
            batch_size=batch_size,
            max_samples=max_samples,
            forward=forward,
            input_fn=input_fn,
            channel_axis=channel_axis,
            vectors=vectors,
            operations=operations,
            include_input=include_input,
            confidence=confidence,
            outputs=named_metrics(outputs),
            outputs_move=outputs_move,
            seed=seed,
        )
        self.data, self.transformations = data, transformations
        self.measures = named_measures(measures)
        check_tags([*self.measures, *self.options.outputs, *([] if name is None else [name])])
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.name, self.histograms, self.limits = name, histograms, limits
        self._suffix = "" if name is None else f"_{name}"
        self._tags = {measure: measure + self._suffix for measure in self.measures}  # measure → prefix of its tags
        self._own_tags = self._tags | {metric: metric + self._suffix for metric in self.options.outputs}
        self._history = History(self.options, self.measures, transformations)
        self._handover = Handover(self)
        self._has_validated = self._has_new_result = False
        self._explained_in: str | None = None  # folders of the loggers that have the text already
        self._validations = 0  # of the training so far
        self._evaluated_at = 0  # the step of the optimiser, for `every_n_steps`
        self._is_new = False  # whether there was an evaluation since the last validation
        self._is_fitting = True  # until :meth:`setup`
        self._warned: set[type] = set()  # classes of errors while logging

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint, different for monitors of different names."""
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that split layers."""
        refuse_split_models(trainer)
        self._is_fitting = stage == "fit"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check names, data, layers and other callbacks before the training starts."""
        self._has_validated = False
        _check_names([monitor.name for monitor in _monitors_of(trainer)])
        if self.data is None:
            check_validation_data(trainer)
        select_layers(pl_module, self.options.layers)
        warn_of_averaging(trainer, self)
        warn_of_old_values(trainer, self._own_tags, self.every_n_epochs)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate the untrained network."""
        if self.history and trainer.global_step:  # resumed, or trained further
            return
        self._history.start_new_training()
        self._validations, self._evaluated_at = 0, trainer.global_step
        self._explained_in = None
        self._log_now(trainer, self._evaluate(trainer, pl_module, epoch=trainer.current_epoch - 1))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate after every ``every_n_steps`` steps of the optimiser."""
        step, every = trainer.global_step, self.every_n_steps
        if every is None or step // every == self._evaluated_at // every:
            return
        self._evaluated_at, self._is_new = step, True
        result = self._evaluate(trainer, pl_module, epoch=trainer.current_epoch)
        self._tell_callbacks(result, on_step=True)
        self._log_now(trainer, result)  # whatever `log_every_n_steps` is

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate at the end of validation."""
        if trainer.sanity_checking:
            return
        is_fitting = trainer.state.fn == "fit"
        if self.every_n_steps is not None and is_fitting:
            if not self._is_new:  # the last result again, for `EarlyStopping`, which wants a value
                spare_patience(trainer, self._own_tags)
                self._tell_callbacks(self.history[-1], on_step=False)
            self._is_new = False
            return
        if validates_often(trainer):
            is_due = self._validations % self.every_n_epochs == 0
        else:
            is_due = _is_due(trainer, self.every_n_epochs) or not self._has_validated
        self._validations += is_fitting
        if is_due or not is_fitting:
            self._has_validated = self._has_validated or is_fitting
            self._evaluate_and_log(trainer, pl_module)
        else:
            spare_patience(trainer, self._own_tags)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the result of this validation, now that all metrics of the trainer are known."""
        if self._has_new_result:
            own = [tag for monitor in _monitors_of(trainer) for tag in monitor._tags.values()]
            self.history[-1].scores = scores(trainer, own)
            self._draw(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Spare the patience of ``EarlyStopping`` in epochs without validation and evaluation."""
        if self.every_n_steps is None and not trainer.enable_validation and not _is_due(trainer, self.every_n_epochs):
            spare_patience(trainer, self._own_tags)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate at the end of an epoch that has no validation."""
        if self.every_n_steps is None and not trainer.enable_validation and _is_due(trainer, self.every_n_epochs):
            self._evaluate_and_log(trainer, pl_module)
            self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the history as plain data of bounded size."""
        counts = {"validations": self._validations, "evaluated_at": self._evaluated_at}
        return {**self._history.state_dict(), **counts, "explained_in": self._explained_in}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint, or begin a new one if it was measured with other arguments.

        A checkpoint that is restored only for a validation or test does not replace the history of a training.
        """
        if self._is_fitting or not self.history:
            self._validations = state_dict.get("validations", 0)
            self._evaluated_at = state_dict.get("evaluated_at", 0)
            self._explained_in = state_dict.get("explained_in")
            self._history.load_state_dict(state_dict)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Hand the history over to the process that called ``fit``, if that is another one."""
        if trainer.is_global_zero and runs_in_child(trainer):
            self._handover.give(self.state_dict())

    @property
    def history(self) -> Evaluations:
        """The results so far."""
        if (state := self._handover.take()) is not None:
            self._history.load_state_dict(state)
        return self._history.results

    @property
    def earlier_histories(self) -> list[Evaluations]:
        """Histories set aside at a resume with other arguments (part of a checkpoint), then at new trainings."""
        return self._history.archived()

    def _evaluate_and_log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        result = self._evaluate(trainer, pl_module, epoch=trainer.current_epoch if self._is_fitting else None)
        # All ranks have equal values: `rank_zero_only` logs them without a collective and without a warning.
        self.log_dict(  # type: ignore[attr-defined]
            scalars(result, self._tags, self._suffix), on_step=False, on_epoch=True, sync_dist=True, rank_zero_only=True
        )

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int | None) -> InvarianceResult:
        data = self.data if self.data is not None else validation_data(trainer)
        options = options_in(trainer, pl_module, self.options, self.data is not None)
        result = evaluate_with(options, pl_module, data, self.transformations, self.measures)
        result.epoch, result.step = epoch, logger_step(trainer)
        self._history.add(result, HISTORY_BYTES)
        self._has_new_result = True
        return result

    def _tell_callbacks(self, result: InvarianceResult, on_step: bool) -> None:
        """Make values known to callbacks such as ``EarlyStopping``, but not to loggers."""
        how = {"logger": False, "on_step": on_step, "on_epoch": not on_step, "rank_zero_only": True}
        self.log_dict(scalars(result, self._tags, self._suffix), **how)  # type: ignore[attr-defined]

    def _log_now(self, trainer: pl.Trainer, result: InvarianceResult) -> None:
        """Log and draw a result at once; `self.log` would wait for the end of the epoch."""
        with errors_as_warnings(self._warned):
            for logger in trainer.loggers:
                logger.log_metrics(scalars(result, self._tags, self._suffix), step=logger_step(trainer))
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        """Log pictures, text and histograms, on rank 0."""
        self._has_new_result = False
        if trainer.is_global_zero and trainer.loggers:
            # `trainer.log_dir` would wait for the other processes.
            folder = str([getattr(each, "log_dir", None) or each.save_dir for each in trainer.loggers])
            measures = {} if self._explained_in == folder else self.measures
            self._explained_in = folder
            looks = self._suffix, self.histograms, self._warned, self.limits
            draw(trainer, self.history, self._tags, measures, *looks)


def _is_due(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    return (trainer.current_epoch + 1) % every_n_epochs == 0


def _monitors_of(trainer: pl.Trainer) -> list[InvarianceMonitor]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, InvarianceMonitor)]


def _check_names(names: Sequence[str | None]) -> None:
    if len({*names}) < len(names):
        raise MisconfigurationException(
            f"Expected InvarianceMonitors of different names in one trainer, but got {names}: set `name`."
        )
