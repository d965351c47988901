"""The evaluations of one training, in memory and as a checkpoint of bounded size."""

from __future__ import annotations

import inspect
import math
import os
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.engine.options import Options
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.results.table import aligned, format_cell
from lightning_invariance.transforms import TransformationSet

if TYPE_CHECKING:
    import pandas

#: Bytes of a checkpoint for evaluations with a value for each channel; others keep the means of their layers.
CHECKPOINT_BYTES = 4 * 2**20

#: Attributes that all evaluations of a training share.
COMMON = (
    *("transformations", "parameters", "identity", "higher_is_better", "ratios", "units", "input_layer"),
    *("layer_types", "floor"),
)

#: Approximate bytes of one table row in a checkpoint.
BYTES_PER_ROW = 700


class Evaluations(list[InvarianceResult]):
    """The evaluations of a training, the untrained network first."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return the tables of all evaluations as one ``DataFrame`` (pandas must be installed).

        A row for each evaluation, measure and layer; the columns are ``epoch``, ``step`` and the columns of
        :meth:`InvarianceResult.to_pandas`. The first epoch at which each layer is below 0.5:
        ``frame[frame["mean"] < 0.5].groupby("layer")["epoch"].min()``.
        """
        import pandas

        frames = [result.to_pandas().assign(epoch=result.epoch, step=result.step) for result in self]
        if not frames:
            return pandas.DataFrame()
        found = pandas.concat(frames, ignore_index=True)
        return found[["epoch", "step", *(name for name in found if name not in ("epoch", "step"))]]

    def __repr__(self) -> str:
        heading = ["epoch", "step"]
        for measure in self[0] if self else ():
            heading += [f"{measure}_last", f"{measure}_mean"]
        rows = []
        for result in self:
            values = [value for measure in result for value in (result.last(measure), result.mean(measure))]
            rows.append([format_cell(cell) for cell in (result.epoch, result.step, *values)])
        return aligned([heading, *rows], left=0)


class History:
    """All evaluations of one monitor in one training.

    Evaluations with other arguments, or of an earlier training in this process, are kept in separate histories.

    Attributes:
        results: the evaluations, the first one first.
    """

    def __init__(self, options: Options, measures: Mapping[str, Metric], transformations: TransformationSet) -> None:
        self.results = Evaluations()
        self._of_other_arguments: list[dict[str, Any]] = []  # part of a checkpoint
        self._of_other_trainings: list[dict[str, Any]] = []  # not part of a checkpoint, which is of one training
        self._configuration = {
            "measures": [f"{name}: {_described(measure)}" for name, measure in measures.items()],
            "transformations": list(transformations.labels),
            "parameters": transformations.parameters,
            "layers": _described(options.layers),
            "operations": options.operations,
            "max_samples": options.max_samples,
        }

    def add(self, result: InvarianceResult, budget: int) -> None:
        """Add an evaluation; reduce older ones to channels where all values take more bytes than the budget."""
        kept = Evaluations()
        for each in (result, *reversed(self.results)):
            budget -= sum(values.nbytes for layers in each.values() for values in layers.values())
            kept.insert(0, each if budget >= 0 or each is result else each.reduced())
        self.results = kept

    def start_new_training(self) -> None:
        """Archive the results and start an empty history."""
        if self.results:
            self._of_other_trainings.append(_packed(self.results))
            self.results = Evaluations()

    def archived(self) -> list[Evaluations]:
        """Return the histories of other arguments and of other trainings, the oldest of each first."""
        return [_unpacked(state) for state in (*self._of_other_arguments, *self._of_other_trainings)]

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return {"configuration": self._configuration, **_packed(self.results), "earlier": self._of_other_arguments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the history of a checkpoint, or archive it if it was measured with other arguments."""
        self._of_other_arguments = list(state["earlier"])
        if not state["history"] or state["configuration"] == self._configuration:
            self.results = _unpacked(state)
            return
        self._of_other_arguments.append({key: state[key] for key in state if key != "earlier"})
        self.results = Evaluations()
        rank_zero_warn(
            "The checkpoint holds a history that InvarianceMonitor measured with other measures, layers,"
            " transformations or samples: a new one begins, and the other is kept in `earlier_histories`."
        )


class Handover:
    """A file by which a process that trains gives the history to the process that made the monitor.

    Args:
        owner: the monitor, with which the file goes away.
    """

    def __init__(self, owner: Any) -> None:
        self._process = os.getpid()
        self._path = Path(tempfile.gettempdir()) / f"lightning_invariance_{uuid.uuid4().hex}.pt"
        weakref.finalize(owner, self._path.unlink, missing_ok=True)

    def give(self, state: Mapping[str, Any]) -> None:
        """Write the file, where another process made the monitor."""
        if os.getpid() != self._process:
            torch.save(state, self._path)

    def take(self) -> dict[str, Any] | None:
        """Return what the file holds, once; None where there is none."""
        if os.getpid() != self._process or not self._path.exists():
            return None
        state: dict[str, Any] = torch.load(self._path, weights_only=True)
        self._path.unlink()
        return state


def _packed(history: Sequence[InvarianceResult]) -> dict[str, Any]:
    """Convert a history to plain data: the first and the newest evaluations by channel, the others by layer."""
    budget = CHECKPOINT_BYTES
    newest: list[dict[str, Any]] = []
    for result in reversed(history[1:]):
        state = result.reduced().state_dict()
        by_layer = (*state["values"].values(), *state["influences"].values())
        budget -= sum(v.nbytes + BYTES_PER_ROW for layers in by_layer for v in layers.values())
        if newest and budget < 0:
            break
        newest.insert(0, state)
    first = [result.reduced().state_dict() for result in history[:1]]
    return {"history": [*first, *newest], "means": _means(history[1 : len(history) - len(newest)])}


def _unpacked(state: Mapping[str, Any]) -> Evaluations:
    whole = [InvarianceResult.from_state_dict(each) for each in state["history"]]
    return Evaluations([*whole[:1], *_of_means(state["means"], whole), *whole[1:]])


def _described(argument: Any) -> str:
    """Describe an argument by a text that is equal in every run; functions and modules by their names."""
    if isinstance(argument, str | int | float | TransformationSet) or argument is None:
        return repr(argument)
    if isinstance(argument, Mapping):
        return repr({str(name): str(new) for name, new in argument.items()})
    names: list[str] = []
    if isinstance(argument, Metric):
        names = ["needs", "needs_again", *inspect.signature(type(argument).__init__).parameters]
    elif is_dataclass(argument) and not isinstance(argument, type):
        names = [field.name for field in fields(argument)]
    elif isinstance(argument, Iterable):
        return f"[{', '.join(_described(item) for item in argument)}]"
    else:
        return str(getattr(argument, "__qualname__", type(argument).__qualname__))
    given = {name: value for name in names if not inspect.ismethod(value := getattr(argument, name, None))}
    return f"{type(argument).__name__}({', '.join(f'{n}={_described(v)}' for n, v in given.items())})"


def _means(history: Sequence[InvarianceResult]) -> dict[str, Any]:
    """Convert evaluations to one table of layer means for each measure, and lists of other attributes."""
    tables: dict[str, Any] = {}
    for measure in dict.fromkeys(m for result in history for m in result.measures):
        layers = list(dict.fromkeys(layer for result in history for layer in result.get(measure, {})))
        found: dict[str, Any] = {"layers": layers}
        for name, means_of in (("values", InvarianceResult.per_layer), ("live", InvarianceResult.live_mean)):
            rows = [means_of(result, measure) if measure in result else {} for result in history]
            found[name] = torch.tensor([[row.get(n, math.nan) for n in layers] for row in rows], dtype=torch.float64)
        tables[measure] = found
    attributes = ("epoch", "step", "n_samples", "scores")
    return {"tables": tables, "about": [{name: getattr(result, name) for name in attributes} for result in history]}


def _of_means(means: Mapping[str, Any], whole: Sequence[InvarianceResult]) -> Iterator[InvarianceResult]:
    """Make a result from each row of the tables; attributes that are common to a history come from its first result."""
    for i, about in enumerate(means["about"]):
        values: dict[str, dict[str, Tensor]] = {
            measure: {layer: table["values"][i, j : j + 1] for j, layer in enumerate(table["layers"])}
            for measure, table in means["tables"].items()
        }
        result = InvarianceResult(values, **about, **{name: getattr(whole[0], name) for name in COMMON})
        for measure, table in means["tables"].items():
            result.set_live_means(measure, dict(zip(table["layers"], table["live"][i].tolist(), strict=True)))
        yield result
