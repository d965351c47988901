"""The result of an evaluation: values by measure and layer that print, plot, and are saved to a file."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_invariance.messages import instead_of, number_of
from lightning_invariance.results.drawing import drawn
from lightning_invariance.results.orbits import Orbits, orbits_of
from lightning_invariance.results.record import OutputValues, Record
from lightning_invariance.results.table import LayerStatistics, Table, Worst, WorstTable
from lightning_invariance.results.values import LayerValues

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["InvarianceResult", "OutputValues"]

#: In the JSON text of a file, an object with this key alone stands for a tensor: its value is the name of an array.
ARRAY = "array of this file"


class InvarianceResult(LayerValues):
    """Values of the measures for every layer: ``result["NormalizedVariance"]["conv1"]`` is a float64 tensor.

    A mapping measure → {layer: tensor of ``activation_shape``}, layers in the order in which they ran. Made by
    :func:`evaluate` and :class:`InvarianceMonitor`.

    Args:
        values: measure → {layer: tensor}.
        dead: layer → bool tensor, true for activations that never change (where the measures know).
        about: any of the following attributes by name.

    Attributes:
        n_samples: how many samples were measured.
        n_skipped: how many samples were missing: None, or dropped by a ``collate_fn``. A batch that is None counts as
            one.
        input_layer: name of the row that is the network's transformed input (``include_input=True``); else empty. It
            counts in no mean over layers.
        layer_types: layer → class of its module, such as ``"Conv2d"``, or name of the operation.
        transformations: labels of the transformations.
        parameters: their parameters, a list for each name.
        identity: label of the transformation that changes nothing; empty if none is known to.
        epoch: epoch of the training at which it was measured; -1 is the untrained network.
        step: step of the logger at which it was measured.
        floor: same-equivariance measure → its values for the network that returns its input: the error of interpolation
            and borders alone.
        skipped: measure → layers for which it is not defined, such as layers without spatial axes.
        left_out: layer → why it could not be measured, such as that it does not depend on the input, or depends on
            other samples too.
        reached: layer → number of samples that passed through it, for layers that some samples bypass.
        channel_axis: layer → which axis of its activation holds the channels (units); by default the first.
        higher_is_better: measure → whether higher values are more invariant; None where neither direction is.
        ratios: measure → whether it is a ratio: at 1, transformations change activations as much as samples do.
        units: measure → unit of its values; empty where there is none.
        biases: measure → number of samples × relative bias of its values, where it is known.
        details: measure → layer → what else the measure finds there, by name, such as the ``scores`` of
            :class:`~lightning_invariance.measures.ChannelEquivariance` under each transformation.
        response: measure → layer → how much each transformation changes the layer, from its value under the identity,
            for measures with ``response=True``: 0 for the identity. Without a known identity from the mean of the row.
        response_bounds: measure → layer → lower and upper bounds of the response under each transformation:
            confidence intervals over samples, with ``confidence``.
        scores: metrics that the trainer logged in the same validation, such as an accuracy.
        standard_errors: measure → layer → standard error of each value, for samples drawn at random. Without
            ``confidence`` only measures have it that are estimated from pairs of samples.
        confidence: of the intervals; None where there are none.
        freedom: measure → layer → degrees of freedom of each standard error.
        influences: measure → layer → influence of each sample (each group of samples, for sample distances) on the mean
            of the layer; see :mod:`lightning_invariance.results.intervals`. NaN for samples that bypass the layer.
        sample_keys: measure → a 64-bit hash of the content of each of these samples or groups.
        sparse: measure → layer → fraction of the units whose values depend on few samples.
        outputs: metric of predictions and targets → its value under each transformation, with ``mean`` and ``worst``;
            prints as a table.
    """

    @property
    def by_class(self) -> dict[str, dict[str, Tensor]]:
        """Measure → layer → value of each class, ``(num_classes, *shape)``, of ``Stratified``.

        :meth:`table` has the mean over the layer of each class.
        """
        return self.detail("by_class")

    @property
    def channel_maps(self) -> dict[str, Tensor]:
        """Layer → where each channel goes under each transformation, ``(m, channels)``.

        Channel c of f(x) is channel ``channel_maps[layer][j, c]`` of f(t_j x), as far as a permutation explains it:
        found by :class:`~lightning_invariance.measures.ChannelEquivariance` with ``channels="permutation"``.
        """
        return next(iter(self.detail("channel_map").values()), {})

    def orbits(self, layer: str, least: float = 0.5) -> Orbits:
        """Return the groups of channels that the transformations permute among each other: a list that prints.

        Args:
            layer: its name, one of :attr:`channel_maps`.
            least: lowest R² at which a channel counts as going to another one, and lowest mean of a group.

        Raises:
            ValueError: If the result has no :attr:`channel_maps`.
            KeyError: If the layer has none.
        """
        for measure, maps in self.detail("channel_map").items():
            if layer not in maps:
                raise KeyError(f"No channel maps of layer {layer!r}. {instead_of(layer, maps, 'There are')}")
            identity = self.transformations.index(self.identity)
            return orbits_of(maps[layer], self.details[measure][layer]["scores"], identity, least)
        raise ValueError(
            'Expected a result with channel maps: measure with `ChannelEquivariance(channels="permutation")`;'
            " reduced results have none."
        )

    def worst(self, measure: str | None = None) -> WorstTable:
        """Return the transformation that changes each layer most: rows that print as a table.

        Args:
            measure: its name; by default the first that has a response.

        Raises:
            ValueError: If the result has no response of the measure.
        """
        if not self.response or (measure is not None and measure not in self.response):
            raise ValueError(
                f"Expected a measure with a response, {list(self.response)}, but got {measure!r}: measure it with"
                " `NormalizedVariance(response=True)`."
            )
        measure = measure or next(iter(self.response))
        rows = WorstTable()
        for layer, values in self.response[measure].items():
            known = {j: value for j, value in enumerate(values) if not math.isnan(value)}
            if known:
                j = max(known, key=lambda i: known[i])
                low, high = self.response_bounds.get(measure, {}).get(layer) or ([math.nan] * len(values),) * 2
                rows.append(Worst(layer, self.transformations[j], values[j], low[j], high[j]))
        return rows

    def plot(self, measure: str | None = None) -> Figure:
        """Draw the heatmap of a measure: :func:`lightning_invariance.plots.heatmap`.

        Args:
            measure: its name; by default the first.
        """
        return drawn("heatmap", "heatmap", self, measure)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the tables of all measures as one ``DataFrame`` (pandas must be installed).

        It has a row for each measure and layer; the columns are ``measure`` and the fields of
        :class:`LayerStatistics`. Metrics of ``outputs`` have a row for each transformation, with its label in the
        column ``transformation`` and the value in ``mean``.
        """
        import pandas

        rows = [{"measure": measure, **asdict(row)} for measure, table in self._tables.items() for row in table]
        for row in rows:
            row.update({f"class {label}": mean for label, mean in enumerate(row.pop("by_class"))})
        for metric, found in self.outputs.items():
            rows += [{"measure": metric, "mean": row.pop("value"), **row} for row in found.rows()]
        return pandas.DataFrame(rows)

    def reduced(self) -> InvarianceResult:
        """Return a smaller result with one value for each channel and without standard errors.

        Tables, means, intervals of layers and pictures stay equal; :attr:`details` are left out.
        """
        state = self.state_dict()
        state["standard_errors"], state["freedom"], state["details"] = {}, {}, {}
        state["values"] = {
            measure: {layer: self.per_channel(measure, layer) for layer in layers}
            for measure, layers in self._values.items()
        }
        state["dead"] = {layer: self.dead_channels(layer) for layer in self.dead}
        state["channel_axis"] = {}  # only the axis of the channels is left
        return InvarianceResult.from_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts, which ``torch.load(weights_only=True)`` reads."""
        statistics = {
            measure: [{**asdict(row), "shape": list(row.shape), "by_class": list(row.by_class)} for row in table]
            for measure, table in self._tables.items()
        }
        return {
            "values": {measure: dict(layers) for measure, layers in self._values.items()},
            "dead": self.dead,
            "statistics": statistics,
            **{each.name: getattr(self, each.name) for each in fields(Record)},
            "outputs": {name: asdict(found) for name, found in self.outputs.items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> InvarianceResult:
        """Make a result from the value of :meth:`state_dict`; unknown entries are ignored."""
        about = {each.name: state[each.name] for each in fields(Record)}
        result = cls(state["values"], dead=state["dead"], **about)
        columns = [each.name for each in fields(LayerStatistics)]
        for measure, rows in state["statistics"].items():
            known = [{name: row[name] for name in columns} for row in rows]
            tuples = [{name: tuple(row[name]) for name in ("shape", "by_class")} for row in known]
            result._tables[measure] = Table(
                LayerStatistics(**{**row, **t}) for row, t in zip(known, tuples, strict=True)
            )
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to one file; an existing file stays until the new one is complete.

        The file is in numpy's npz format without pickle: the state dict as a JSON text, ``about``, and its tensors.
        """
        path, arrays = Path(path), dict[str, Any]()

        def named(tensor: Tensor) -> dict[str, str]:
            name = f"array{len(arrays)}"
            arrays[name] = tensor.numpy()
            return {ARRAY: name}

        about = np.array(json.dumps(self.state_dict(), default=named))
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with unfinished.open("wb") as file:
                np.savez_compressed(file, about=about, **arrays)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InvarianceResult:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: If the file is broken, or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:

                def tensors(found: dict[str, Any]) -> Any:
                    return torch.from_numpy(arrays[found[ARRAY]]) if found.keys() == {ARRAY} else found

                return cls.from_state_dict(json.loads(str(arrays["about"]), object_hook=tensors))
        except OSError:
            raise
        except Exception as error:  # whatever numpy, zlib, zipfile and json raise of broken files
            raise ValueError(
                f"Expected {os.fspath(path)!r} to be a file that `InvarianceResult.save` wrote, but it is broken or"
                f" another: {type(error).__name__}: {error}."
            ) from error

    def _heading(self) -> str:
        when = "" if self.epoch is None else f", epoch {self.epoch}, step {self.step}"
        return (
            f"InvarianceResult({', '.join(self._values)}: {number_of(len(self.layers), 'layer')},"
            f" {self.n_samples} samples × {len(self.transformations)} transformations{when})"
        )

    def __repr__(self) -> str:
        tables = {**self._tables, **self.outputs}
        return "\n\n".join([self._heading(), *(f"{name}\n{table}" for name, table in tables.items())])

    def _repr_html_(self) -> str:
        tables = "".join(f"<h4>{html.escape(m)}</h4>{table._repr_html_()}" for m, table in self._tables.items())
        return f"<p>{html.escape(self._heading())}</p>{tables}"
