"""Log pictures to the loggers of a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

#: Classes of loggers for which a warning said that they cannot take pictures.
_warned: set[type] = set()


def log_image(trainer: pl.Trainer, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
    """Log a picture ``(height, width, 3)`` to every logger that can take one; warn once of one that cannot."""
    for logger in trainer.loggers:
        if is_dummy(logger) or _log_image(logger, tag, image, step):
            continue
        if type(logger) not in _warned:
            _warned.add(type(logger))
            rank_zero_warn(f"InvarianceMonitor cannot log pictures to {type(logger).__name__}: it gets numbers only.")


def is_dummy(logger: Any) -> bool:
    """Whether a logger is the one of `fast_dev_run`, which discards everything."""
    return type(logger).__name__ == "DummyLogger"


def _log_image(logger: Any, tag: str, image: npt.NDArray[np.uint8], step: int) -> bool:
    """Log a picture with the methods that a logger has, because forks of a logger are other classes.

    Returns:
        Whether the logger could take it.
    """
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):  # TensorBoard
        experiment.add_image(tag, image, step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(tag, [Image.fromarray(image)], step=step)
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_image(logger.run_id, image, f"{tag}_step={step}.png")
    elif logger.log_dir is not None or logger.save_dir is not None:  # CSV: a file beside the table
        path = Path(logger.log_dir or logger.save_dir or ".") / "images" / f"{tag}_step={step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    else:
        return False
    return True
