"""The evaluations of one training: in memory, and as the plain data of a checkpoint whose size is bounded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.engine.options import Options
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.transforms import TransformationSet

#: Bytes of a checkpoint for evaluations with a value for each channel; others keep the means of their layers.
CHECKPOINT_BYTES = 4 * 2**20

#: What a row of a table takes in a checkpoint, in bytes.
ROW = 700


class History:
    """The evaluations that one monitor has made with the same arguments, and apart from them those of before.

    Args:
        options: how evaluations run.
        measures: name → metric.
        transformations: the set.

    Attributes:
        results: the evaluations, the first one first.
    """

    def __init__(self, options: Options, measures: Mapping[str, Metric], transformations: TransformationSet) -> None:
        self.results: list[InvarianceResult] = []
        self._earlier: list[dict[str, Any]] = []  # of other arguments; part of a checkpoint
        self._trainings: list[dict[str, Any]] = []  # of before; a checkpoint is that of one training
        self._configuration = {
            "measures": {name: _described(measure) for name, measure in measures.items()},
            "transformations": list(transformations.labels),
            "layers": _described(options.layers),
            "operations": options.operations,
            "max_samples": options.max_samples,
        }

    def add(self, result: InvarianceResult, budget: int) -> None:
        """Add an evaluation; older ones are reduced to channels once the whole takes more bytes than the budget."""
        self.results = within_budget([*self.results, result], budget)

    def begin(self) -> None:
        """Begin a new history, and keep that of before apart."""
        if self.results:
            self._trainings.append(packed(self.results))
            self.results = []

    def earlier(self) -> list[list[InvarianceResult]]:
        """The histories of before, the oldest first."""
        return [unpacked(state) for state in (*self._earlier, *self._trainings)]

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"configuration": self._configuration, **packed(self.results), "earlier": self._earlier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the history of a checkpoint, or keep it apart where it was measured with other arguments."""
        self._earlier = list(state["earlier"])
        if not state["history"] or _agree(state["configuration"], self._configuration):
            self.results = unpacked(state)
            return
        self._earlier.append({key: state[key] for key in state if key != "earlier"})
        self.results = []
        rank_zero_warn(
            "The checkpoint holds a history that InvarianceMonitor measured with other measures, layers,"
            " transformations or samples: a new one begins, and `earlier_histories` keeps that of before."
        )


def within_budget(history: Sequence[InvarianceResult], budget: int) -> list[InvarianceResult]:
    """The history with older results reduced to channels once the whole of it takes more bytes than the budget."""
    kept: list[InvarianceResult] = []
    for result in reversed(history):
        budget -= sum(values.nbytes for layers in result.values() for values in layers.values())
        kept.insert(0, result if budget >= 0 or result is history[-1] else result.reduced())
    return kept


def packed(history: Sequence[InvarianceResult]) -> dict[str, Any]:
    """A history as plain data: the first and the newest evaluations by channel, those between by layer."""
    budget = CHECKPOINT_BYTES
    newest: list[dict[str, Any]] = []
    for result in reversed(history[1:]):
        state = result.reduced().state_dict()
        by_layer = (*state["values"].values(), *state["influences"].values())
        budget -= sum(v.nbytes + ROW for layers in by_layer for v in layers.values())
        if newest and budget < 0:
            break
        newest.insert(0, state)
    first = [result.reduced().state_dict() for result in history[:1]]
    return {"history": [*first, *newest], "means": _means(history[1 : len(history) - len(newest)])}


def unpacked(state: Mapping[str, Any]) -> list[InvarianceResult]:
    """The history that :func:`packed` described."""
    whole = [InvarianceResult.from_state_dict(each) for each in state["history"]]
    return [*whole[:1], *_of_means(state["means"], whole), *whole[1:]]


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations agree in all that both tell."""
    for key in one.keys() & other.keys():
        a, b = one[key], other[key]
        if key == "measures":
            if list(a) != list(b) or any(a[m] != b[m] for m in a if a[m] and b[m]):
                return False
        elif a != b:
            return False
    return True


def _described(argument: Any) -> str:
    """An argument as text that is the same in every run, so that functions are told apart by their names only."""
    if isinstance(argument, Metric):
        names = ["needs", "needs_again", *inspect.signature(type(argument).__init__).parameters]
        given = {name: value for name in names if not inspect.ismethod(value := getattr(argument, name, None))}
        return f"{type(argument).__name__}({', '.join(f'{n}={_described(v)}' for n, v in given.items())})"
    if is_dataclass(argument) and not isinstance(argument, type):
        given = {field.name: getattr(argument, field.name) for field in fields(argument)}
        return f"{type(argument).__name__}({', '.join(f'{n}={_described(v)}' for n, v in given.items())})"
    if isinstance(argument, str | int | float | TransformationSet) or argument is None:
        return repr(argument)
    if isinstance(argument, Mapping):
        return repr({str(name): str(new) for name, new in argument.items()})
    if isinstance(argument, Iterable):
        return f"[{', '.join(_described(item) for item in argument)}]"
    return str(getattr(argument, "__qualname__", type(argument).__qualname__))


def _means(history: Sequence[InvarianceResult]) -> dict[str, Any]:
    """Layer means and moments of many evaluations, a table for each measure."""
    if not history:
        return {}
    tables: dict[str, Any] = {}
    for measure in dict.fromkeys(m for result in history for m in result.measures):
        layers = list(dict.fromkeys(layer for result in history for layer in result.get(measure, {})))
        rows = [result.per_layer(measure) if measure in result else {} for result in history]
        values = torch.tensor([[row.get(layer, math.nan) for layer in layers] for row in rows], dtype=torch.float64)
        tables[measure] = {"layers": layers, "values": values}
    return {
        "tables": tables,
        "epochs": [result.epoch for result in history],
        "steps": [result.step for result in history],
        "n_samples": [result.n_samples for result in history],
        "scores": [result.scores for result in history],
    }


def _of_means(means: Mapping[str, Any], whole: Sequence[InvarianceResult]) -> Iterator[InvarianceResult]:
    """A result for each row of the tables; what all results of a history share is that of its first."""
    for i in range(len(means.get("epochs", []))):
        values: dict[str, dict[str, Tensor]] = {
            measure: {layer: table["values"][i, j : j + 1] for j, layer in enumerate(table["layers"])}
            for measure, table in means["tables"].items()
        }
        yield InvarianceResult(
            values,
            n_samples=means["n_samples"][i],
            epoch=means["epochs"][i],
            step=means["steps"][i],
            scores=means["scores"][i],
            transformations=whole[0].transformations,
            parameters=whole[0].parameters,
            higher_is_better=whole[0].higher_is_better,
            ratios=whole[0].ratios,
            units=whole[0].units,
        )
