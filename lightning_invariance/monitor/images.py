"""Pictures to whatever loggers a trainer has."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

#: Classes of loggers that were warned of.
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
    """Whether it is the one of `fast_dev_run`, which takes everything and keeps nothing."""
    return type(logger).__name__ == "DummyLogger"


def _log_image(logger: Any, tag: str, image: npt.NDArray[np.uint8], step: int) -> bool:
    """Whether the logger took the picture. Asked by what it can do: forks of a logger are other classes."""
    if isinstance(getattr(logger, "experiment", None), SummaryWriter):  # TensorBoard
        _add_image(logger.experiment, tag, image, step)
    elif hasattr(getattr(logger, "experiment", None), "add_image"):  # another writer for it
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


def _add_image(writer: SummaryWriter, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
    """What ``writer.add_image`` does, in a quarter of the time: without scaling it, and with a faster PNG."""
    height, width, colours = image.shape
    picture = Summary.Image(height=height, width=width, colorspace=colours, encoded_image_string=png(image))
    summary = Summary(value=[Summary.Value(tag=tag, image=picture)])
    writer._get_file_writer().add_summary(summary, step)  # type: ignore[no-untyped-call]


def png(image: npt.NDArray[np.uint8]) -> bytes:
    """A picture ``(height, width, 3)`` as a PNG file.

    Each row is written as the difference from the row above it ("filter 2"), which suits pictures of cells. Pillow
    tries five filters for each row, which takes three times as long for files of the same size.
    """
    height, width, colours = image.shape
    rows = np.full((height, 1 + colours * width), 2, np.uint8)
    flat = image.reshape(height, -1)
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits for each of three colours
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b"")
    chunks = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
