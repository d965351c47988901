"""Write and read the file of a result: numpy's npz format without pickle, one JSON text and numbered arrays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: The only key of the JSON object that stands for a tensor; its value is the name of an array.
ARRAY = "array of this file"


def write(state: dict[str, Any], path: Path) -> None:
    """Write the state dict of a result; an existing file stays until the new one is complete."""
    arrays: dict[str, Any] = {}

    def named(tensor: Tensor) -> dict[str, str]:
        name = f"array{len(arrays)}"
        arrays[name] = tensor.numpy()
        return {ARRAY: name}

    about = np.array(json.dumps(state, default=named))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, about=about, **arrays)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Read the state dict that :func:`write` wrote."""
    with np.load(path, allow_pickle=False) as arrays:

        def tensors(found: dict[str, Any]) -> Any:
            return torch.from_numpy(arrays[found[ARRAY]]) if found.keys() == {ARRAY} else found

        state: dict[str, Any] = json.loads(str(arrays["about"]), object_hook=tensors)
    return state
