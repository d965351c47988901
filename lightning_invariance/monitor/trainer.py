"""What the callback asks of a Trainer: its data, its metrics, its step, and the callbacks beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_invariance.data.batches import input_of, takes_batch
from lightning_invariance.engine.options import Options

#: Strategies under which no process holds the whole model. By name: `lightning.pytorch` and `pytorch_lightning` have
#: classes of their own.
SHARDED = frozenset(["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"])


#: Whose subclasses put averaged weights into the model for the time of a validation.
AVERAGING = "WeightAveraging"

#: Hooks that change a batch before a model sees it; between them the batch goes to the device.
BATCH_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")

#: Samples of an evaluation in a trainer with ``fast_dev_run``.
SAMPLES_OF_DEV_RUN = 8


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks of a trainer."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def logger_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning logs validation metrics now: pictures and curves must agree on it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def refuse_split_models(trainer: pl.Trainer) -> None:
    """Raise for strategies under which no process holds the whole model."""
    if SHARDED.intersection(cls.__name__ for cls in type(trainer.strategy).__mro__):
        raise MisconfigurationException(
            f"InvarianceMonitor needs the whole model on each process, but {type(trainer.strategy).__name__} splits it:"
            " use a single device or one of the `ddp` strategies, or call `evaluate()` on a checkpoint after training."
        )


def validation_data(trainer: pl.Trainer) -> Any:
    """The trainer's (first) validation loader, loaded if it is not yet."""
    if trainer.val_dataloaders is None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    loaders = trainer.val_dataloaders
    while isinstance(loaders, Mapping | list | tuple):
        loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders))
    return loaders


def is_due(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    """Whether this epoch is one of every so many."""
    return (trainer.current_epoch + 1) % every_n_epochs == 0


def options_in(trainer: pl.Trainer, model: pl.LightningModule, options: Options, own_data: bool) -> Options:
    """How to evaluate within a training: on its device, in its precision, with a progress bar if it has one.

    Args:
        trainer: that runs.
        model: what it trains.
        options: of the monitor.
        own_data: whether the monitor has data of its own; those of the trainer go through its hooks.
    """
    most = options.max_samples
    if getattr(trainer, "fast_dev_run", False):
        most = min(SAMPLES_OF_DEV_RUN, most or SAMPLES_OF_DEV_RUN)
    return replace(
        options,
        max_samples=most,
        input_fn=options.input_fn if own_data else with_hooks(trainer, model, options.input_fn),
        device=model.device,
        forward=with_precision(trainer, options.forward),
        progress=getattr(trainer.progress_bar_callback, "is_enabled", False),
    )


def with_hooks(
    trainer: pl.Trainer, model: pl.LightningModule, input_fn: Callable[..., Tensor] | None
) -> Callable[..., Tensor] | None:
    """How to pick the input of a batch where a module or data module changes batches on their way to the device."""
    owners = [each for each in (getattr(trainer, "datamodule", None), model) if each is not None]
    before, after = ([getattr(each, hook) for each in owners if _overrides(each, hook)] for hook in BATCH_HOOKS)
    if not before and not after:
        return input_fn

    def picked(batch: Any) -> Tensor:
        stage, trainer.validating = trainer.state.stage, True  # hooks may ask for it
        try:
            batch = before[0](batch, 0) if before else batch
            batch = move_data_to_device(batch, model.device)
            batch = after[0](batch, 0) if after else batch
        finally:
            trainer.state.stage = stage
        return input_of(batch, input_fn)

    return picked


def _overrides(owner: Any, hook: str) -> bool:
    """Whether a hook is that of a user."""
    home = next((cls.__module__ for cls in type(owner).__mro__ if hook in vars(cls)), "lightning.")
    return not home.startswith(("lightning.", "pytorch_lightning."))


def with_precision(trainer: pl.Trainer, forward: Callable[..., Any] | None) -> Callable[..., Any]:
    """How to run a model as the trainer's validation does: in its precision."""
    precision, own = trainer.precision_plugin, forward or _called

    def run(model: nn.Module, *data: Any) -> Any:
        with precision.val_step_context():
            return own(model, *(precision.convert_input(each) for each in data))

    # `evaluate` gives the batch to functions of three arguments only.
    return (lambda model, x, batch: run(model, x, batch)) if takes_batch(forward) else lambda model, x: run(model, x)


def _called(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def scores(trainer: pl.Trainer, own: Sequence[str]) -> dict[str, float]:
    """The metrics of the validation that has just ended, the same on every process: those of the first.

    Args:
        trainer: in ``on_validation_end``.
        own: what the names of metrics that are left out begin with.
    """
    # `callback_metrics` also holds the metrics of the last training epoch, which are older.
    results = getattr(trainer, "_results", None)
    known = trainer.callback_metrics if results is None else results.metrics(on_step=False)["callback"]
    found = {name: float(value) for name, value in known.items() if torch.as_tensor(value).numel() == 1}
    found = {name: value for name, value in found.items() if not name.startswith(tuple(own)) and math.isfinite(value)}
    told: dict[str, float] = trainer.strategy.broadcast(found)
    return told


def spare_patience(trainer: pl.Trainer, tags: Mapping[str, str]) -> None:
    """Keep ``EarlyStopping`` from counting an old value once more as one that is no better.

    It counts every validation at which its metric is known, and a metric that is logged once stays known. Nothing but
    its own count can be changed from outside: taken back by one before it checks, the check leaves it as it was.

    Args:
        trainer: whose callbacks.
        tags: measure → what the tags of the monitor begin with.
    """
    for callback in callbacks_of(trainer):
        monitored = getattr(callback, "monitor", None)
        if hasattr(callback, "wait_count") and monitored in trainer.callback_metrics and _is_own(monitored, tags):
            callback.wait_count -= 1


def warn_of_old_values(trainer: pl.Trainer, tags: Mapping[str, str], every_n_epochs: int) -> None:
    """Warn where ``ModelCheckpoint`` would take an old value for that of a later model."""
    for callback in callbacks_of(trainer):
        monitored, own = getattr(callback, "monitor", None), getattr(callback, "_every_n_epochs", 1) or 1
        if hasattr(callback, "save_top_k") and own % every_n_epochs and _is_own(monitored, tags):
            rank_zero_warn(
                f"ModelCheckpoint monitors {monitored!r}, which is new every {every_n_epochs} epochs:"
                f" give it `every_n_epochs={every_n_epochs}`, or it takes a value for that of a later model."
            )


def warn_of_averaging(trainer: pl.Trainer, monitor: pl.Callback) -> None:
    """Warn where weights that validation sees averaged are put back before the monitor runs."""
    before = callbacks_of(trainer)[: callbacks_of(trainer).index(monitor)]
    names = [type(each).__name__ for each in before if AVERAGING in (cls.__name__ for cls in type(each).__mro__)]
    if names:
        rank_zero_warn(
            f"{names[0]} stands before InvarianceMonitor in the trainer's callbacks: it takes the averaged weights out"
            " of the model at the end of validation, so that others are measured than were validated. Put the monitor"
            " first."
        )


def _is_own(monitored: str | None, tags: Mapping[str, str]) -> bool:
    """Whether a metric is one that the monitor of these tags logs."""
    return monitored is not None and any(
        monitored == f"{tag}_mean" or monitored.startswith(f"{tag}/") for tag in tags.values()
    )
