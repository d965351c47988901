"""Read data, step, metrics and other callbacks of a Trainer, and check that the monitor works with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_invariance.data.batches import input_of, takes_batch
from lightning_invariance.data.samples import Batches
from lightning_invariance.engine.options import Options

#: A strategy with which hooks do not see whole layers. A name, since `lightning.pytorch` and `pytorch_lightning` each
#: have their own classes.
REFUSED = "DeepSpeedStrategy"

#: Base class of callbacks that validate the model with averaged weights.
AVERAGING = "WeightAveraging"

#: Hooks that change a batch, before and after its transfer to the device.
BATCH_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")

#: Section of the curves that one looks up, which TensorBoard sorts after the curves of most models.
DETAILS = "values"

#: Number of samples in a trainer with ``fast_dev_run``.
SAMPLES_OF_DEV_RUN = 8


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return the callbacks of a trainer, whose class does not declare them."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def logger_step(trainer: pl.Trainer) -> int:
    """Return the step at which Lightning logs validation metrics, so that pictures and curves agree on it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def refuse_split_models(trainer: pl.Trainer) -> None:
    """Raise for strategies that split layers over processes; parameters may be sharded."""
    name, split = type(trainer.strategy).__name__, getattr(trainer.strategy, "_tensor_parallel_size", 1) != 1
    if split or REFUSED in (cls.__name__ for cls in type(trainer.strategy).__mro__):
        why = " with `tensor_parallel_size` above 1" if split else ""
        raise MisconfigurationException(
            f"InvarianceMonitor needs whole layers on each process, but {name}{why} splits them: use a single device,"
            " `ddp`, `fsdp` or `ModelParallelStrategy(tensor_parallel_size=1)`, or call `evaluate()` on a checkpoint"
            " after training."
        )


def check_validation_data(trainer: pl.Trainer) -> None:
    """Raise for a trainer without validation."""
    if not trainer.enable_validation:
        raise MisconfigurationException(
            "InvarianceMonitor found no validation data in the trainer: give it `data`, or the trainer a validation"
            " loader (and no `limit_val_batches=0`) and the model a `validation_step`."
        )


def validates_often(trainer: pl.Trainer) -> bool:
    """Return whether an epoch has several validations, or the training has no epochs."""
    between: float = getattr(trainer, "val_check_batch", None) or math.inf  # unknown before the first training
    return trainer.check_val_every_n_epoch is None or between < trainer.num_training_batches


def runs_in_child(trainer: pl.Trainer) -> bool:
    """Return whether the training runs in a process that ends with it, as under ``ddp_spawn`` and ``ddp_fork``."""
    launchers = type(trainer.strategy.launcher).__mro__
    return "_MultiProcessingLauncher" in [cls.__name__ for cls in launchers]


def validation_data(trainer: pl.Trainer) -> Any:
    """Return the trainer's (first) validation loader, and set it up if needed."""
    if trainer.val_dataloaders is None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    loop = trainer.validate_loop if trainer.state.fn == "validate" else trainer.fit_loop.epoch_loop.val_loop
    combined = loop._combined_loader
    if combined is not None and combined._mode != "sequential":
        return JointBatches(combined)
    loaders: Any = trainer.val_dataloaders
    while isinstance(loaders, Mapping | list | tuple):
        loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders))
    return loaders if isinstance(loaders, DataLoader) else Batches(loaders)


class JointBatches(Batches):
    """The batches of several loaders at a time.

    Args:
        combined: a ``CombinedLoader``.
    """

    def __init__(self, combined: Any) -> None:
        super().__init__(combined.iterables)
        self._combined = combined

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, *_ in self._anew())

    def __len__(self) -> int:
        return len(iter(self._anew()))

    def _anew(self) -> Any:
        return type(self._combined)(self._combined.iterables, self._combined._mode)


def options_in(trainer: pl.Trainer, model: pl.LightningModule, options: Options, own_data: bool) -> Options:
    """Adapt options to a training: its device, precision, progress bar, and hooks for batches, except of own data."""
    most = options.max_samples
    if getattr(trainer, "fast_dev_run", False):
        most = min(SAMPLES_OF_DEV_RUN, most or SAMPLES_OF_DEV_RUN)
    return replace(
        options,
        max_samples=most,
        input_fn=options.input_fn if own_data else _with_hooks(trainer, model, options.input_fn),
        device=model.device,
        forward=_with_precision(trainer, options.forward),
        progress=getattr(trainer.progress_bar_callback, "is_enabled", False),
    )


def _with_hooks(
    trainer: pl.Trainer, model: pl.LightningModule, input_fn: Callable[..., Tensor] | None
) -> Callable[..., Tensor] | None:
    """Call the hooks of the data module or model that change batches before ``input_fn`` picks the input."""
    owners = [each for each in (getattr(trainer, "datamodule", None), model) if each is not None]
    before, after = ([getattr(each, hook) for each in owners if _overrides(each, hook)] for hook in BATCH_HOOKS)
    if not before and not after:
        return input_fn

    def picked(batch: Any) -> Tensor:
        stage, trainer.validating = trainer.state.stage, True  # hooks may read the stage
        try:
            batch = before[0](batch, 0) if before else batch
            batch = move_data_to_device(batch, model.device)
            batch = after[0](batch, 0) if after else batch
        finally:
            trainer.state.stage = stage
        return input_of(batch, input_fn)

    return picked


def _overrides(owner: Any, hook: str) -> bool:
    """Return whether a hook is defined outside of Lightning."""
    home = next((cls.__module__ for cls in type(owner).__mro__ if hook in vars(cls)), "lightning.")
    return not home.startswith(("lightning.", "pytorch_lightning."))


def _with_precision(trainer: pl.Trainer, forward: Callable[..., Any] | None) -> Callable[..., Any]:
    """Run the model in the precision of the trainer's validation."""
    precision, own = trainer.precision_plugin, forward or (lambda model, x: model(x))

    def run(model: nn.Module, *data: Any) -> Any:
        with precision.val_step_context():
            return own(model, *(precision.convert_input(each) for each in data))

    # `evaluate` gives the batch to functions of three arguments only.
    return (lambda model, x, batch: run(model, x, batch)) if takes_batch(forward) else lambda model, x: run(model, x)


def scores(trainer: pl.Trainer, own: Sequence[str]) -> dict[str, float]:
    """Return the metrics that rank 0 logged in the validation that has just ended, without the tags of monitors."""
    # `callback_metrics` also holds the metrics of the last training epoch, which are older.
    results = getattr(trainer, "_results", None)
    known = trainer.callback_metrics if results is None else results.metrics(on_step=False)["callback"]
    found = {name: float(value) for name, value in known.items() if torch.as_tensor(value).numel() == 1}
    prefixes = tuple(prefix + tag for tag in own for prefix in ("", f"{DETAILS}/"))
    found = {name: value for name, value in found.items() if not name.startswith(prefixes) and math.isfinite(value)}
    of_rank_0: dict[str, float] = trainer.strategy.broadcast(found)
    return of_rank_0


def spare_patience(trainer: pl.Trainer, tags: Mapping[str, str]) -> None:
    """Keep ``EarlyStopping`` from counting a validation without a new value against its patience.

    It counts every validation at which its metric is known, and a metric stays known once it was logged. Only its
    count can be changed from outside: decremented before the check, it is unchanged after the check.
    """
    for callback in callbacks_of(trainer):
        monitored = getattr(callback, "monitor", None)
        if hasattr(callback, "wait_count") and monitored in trainer.callback_metrics and _is_own(monitored, tags):
            callback.wait_count -= 1


def warn_of_old_values(trainer: pl.Trainer, tags: Mapping[str, str], every_n_epochs: int) -> None:
    """Warn if ``ModelCheckpoint`` saves at epochs without a new value."""
    for callback in callbacks_of(trainer):
        monitored, own = getattr(callback, "monitor", None), getattr(callback, "_every_n_epochs", 1) or 1
        if hasattr(callback, "save_top_k") and own % every_n_epochs and _is_own(monitored, tags):
            rank_zero_warn(
                f"ModelCheckpoint monitors {monitored!r}, which has a new value every {every_n_epochs} epochs:"
                f" give it `every_n_epochs={every_n_epochs}`, or it ranks later models by an old value."
            )


def warn_of_averaging(trainer: pl.Trainer, monitor: pl.Callback) -> None:
    """Warn if a callback replaces the averaged weights of the validation before the monitor runs."""
    before = callbacks_of(trainer)[: callbacks_of(trainer).index(monitor)]
    names = [type(each).__name__ for each in before if AVERAGING in (cls.__name__ for cls in type(each).__mro__)]
    if names:
        rank_zero_warn(
            f"{names[0]} stands before InvarianceMonitor in the trainer's callbacks: at the end of validation it"
            " replaces the averaged weights, so that other weights are measured than were validated. Put the monitor"
            " first."
        )


def _is_own(monitored: str | None, tags: Mapping[str, str]) -> bool:
    """Return whether the monitor with these tags logs a metric."""
    return monitored is not None and any(
        monitored in (f"{tag}_mean", f"{tag}_last", f"{tag}_worst") or monitored.startswith(f"{tag}/")
        for tag in tags.values()
    )
