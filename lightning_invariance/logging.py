"""Scalars and pictures to whatever loggers a trainer has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

#: Classes of loggers that were warned of.
_warned: set[type] = set()


def logger_step(trainer: pl.Trainer) -> int:
    """The step at which Lightning logs validation metrics now: pictures and curves must agree on it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Log numbers where ``self.log`` is not possible."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=step)


def log_image(trainer: pl.Trainer, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
    """Log a picture ``(height, width, 3)`` to every logger that can take one; warn once of one that cannot."""
    for logger in trainer.loggers:
        if isinstance(logger, DummyLogger) or _log_image(logger, tag, image, step):
            continue
        if type(logger) not in _warned:
            _warned.add(type(logger))
            rank_zero_warn(f"InvarianceMonitor cannot log pictures to {type(logger).__name__}: it gets numbers only.")


def _log_image(logger: Any, tag: str, image: npt.NDArray[np.uint8], step: int) -> bool:
    """Whether the logger took the picture. Asked by what it can do: forks of a logger are other classes."""
    if hasattr(getattr(logger, "experiment", None), "add_image"):  # TensorBoard
        logger.experiment.add_image(tag, image, step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(tag, [Image.fromarray(image)], step=step)
    elif hasattr(getattr(logger, "experiment", None), "log_image") and hasattr(logger, "run_id"):  # MLflow
        logger.experiment.log_image(logger.run_id, image, f"{tag}_step={step}.png")
    elif logger.log_dir is not None or logger.save_dir is not None:  # CSV: a file beside the table
        path = Path(logger.log_dir or logger.save_dir or ".") / "images" / f"{tag}_step={step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    else:
        return False
    return True
