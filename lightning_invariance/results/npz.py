"""The file of a result: numpy's npz format without pickle, arrays beside one text in JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Tensors for each layer of a measure.
BY_LAYER = ("standard_errors", "freedom", "influences")

#: Tensors by layer or by measure, and where the file keeps the names.
SINGLE = {"dead": "layers_of_dead", "floor": "measures_with_floor", "sample_keys": "measures_with_sample_keys"}


def write(state: dict[str, Any], path: Path) -> None:
    """Write the state dict of a result; the file of before stays until the new one is complete.

    Args:
        state: see :meth:`InvarianceResult.state_dict`.
        path: of the file.
    """
    state, arrays = dict(state), {}
    for i, layers in enumerate(state.pop("values").values()):
        arrays.update({f"values/{i}/{j}": values.numpy() for j, values in enumerate(layers.values())})
    for kind in BY_LAYER:
        tensors = state.pop(kind)
        for i, layers in enumerate(tensors.values()):
            arrays.update({f"{kind}/{i}/{j}": tensor.numpy() for j, tensor in enumerate(layers.values())})
        state[f"measures_with_{kind}"] = {measure: list(layers) for measure, layers in tensors.items()}
    for kind, names in SINGLE.items():
        tensors = state.pop(kind)
        arrays.update({f"{kind}/{j}": values.numpy() for j, values in enumerate(tensors.values())})
        state[names] = list(tensors)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(state)), **arrays)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The state dict that :func:`write` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        state: dict[str, Any] = json.loads(str(arrays["about"]))
        for kind, names in SINGLE.items():
            state[kind] = {name: torch.from_numpy(arrays[f"{kind}/{j}"]) for j, name in enumerate(state.pop(names))}
        for kind in BY_LAYER:
            state[kind] = {
                measure: {name: torch.from_numpy(arrays[f"{kind}/{i}/{j}"]) for j, name in enumerate(layers)}
                for i, (measure, layers) in enumerate(state.pop(f"measures_with_{kind}").items())
            }
        state["values"] = {
            measure: {row["layer"]: torch.from_numpy(arrays[f"values/{i}/{j}"]) for j, row in enumerate(rows)}
            for i, (measure, rows) in enumerate(state["statistics"].items())
        }
    return state
