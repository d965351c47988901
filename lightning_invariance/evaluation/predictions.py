"""What metrics of predictions and targets say under each transformation, from the same walk."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.batches import target_of
from lightning_invariance.loader import STBlock
from lightning_invariance.outputs import all_tensors_of
from lightning_invariance.result import OutputValues

#: Where the prediction stands in an output that holds several tensors; by default it is the first.
LOGITS = "[logits]"


class Predictions:
    """Metrics of the output of a network and the targets, a clone for each transformation.

    Args:
        metrics: name → metric, which is updated as ``metric(predictions, targets)``.
        m: number of transformations.
        device: where they are updated.
    """

    def __init__(self, metrics: Mapping[str, Metric], m: int, device: torch.device) -> None:
        self._clones: dict[str, list[Metric]] = {}
        for name, metric in metrics.items():
            metric = deepcopy(metric)
            metric.reset()
            self._clones[name] = [deepcopy(metric).to(device) for _ in range(m)]

    def add(self, block: STBlock, output: Any) -> None:
        """Update with what the network made of a block, columns of each row one after the other.

        Raises:
            ValueError: If the batch has no targets, or the output no tensor with a prediction for each input.
        """
        if not self._clones:
            return
        rows, columns = block.inputs.shape[:2]
        targets = target_of(block.batch, rows)
        if targets is None:
            raise ValueError(
                "Expected data with targets for the metrics in argument `outputs`, as pairs (x, y) or dicts with a"
                " label, but a batch has none."
            )
        predictions = prediction_of(output, rows * columns)
        predictions = predictions.detach().reshape(rows, columns, *predictions.shape[1:])
        for clones in self._clones.values():
            for column, metric in enumerate(clones[block.columns]):
                # Some metrics view their arguments, which only contiguous ones allow.
                metric.update(predictions[:, column].contiguous(), targets.to(predictions.device).contiguous())

    def values(self) -> dict[str, OutputValues]:
        """Name → the value under each transformation; of all processes, by the metrics' own synchronisation.

        Raises:
            ValueError: If a metric has more than one value.
        """
        found: dict[str, OutputValues] = {}
        for name, clones in self._clones.items():
            with warnings.catch_warnings():  # of metrics that were not updated: in processes without samples
                warnings.simplefilter("ignore", UserWarning)
                values = [metric.compute() for metric in clones]
            if any(not isinstance(value, Tensor) or value.numel() != 1 for value in values):
                raise ValueError(
                    f"Expected metrics in argument `outputs` to have one value, but {name} has {values[0]!r}: average"
                    " over classes."
                )
            found[name] = OutputValues([float(value) for value in values], clones[0].higher_is_better)
        return found


def prediction_of(output: Any, n: int) -> Tensor:
    """The tensor in an output that holds a prediction for each of n inputs: its logits, or else the first that fits.

    Raises:
        ValueError: If there is none.
    """
    tensors = {place: tensor for place, tensor in all_tensors_of(output) if tensor.ndim and len(tensor) == n}
    if not tensors:
        shapes = [tuple(tensor.shape) for _, tensor in all_tensors_of(output)]
        raise ValueError(
            f"Expected the model to return a prediction for each of {n} inputs for the metrics in argument `outputs`,"
            f" but its output has tensors of shapes {shapes}: let `forward` return the predictions."
        )
    return tensors.get(LOGITS, next(iter(tensors.values())))
