"""What an evaluation found: values by measure and layer."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_invariance.messages import number_of
from lightning_invariance.results.drawing import drawn
from lightning_invariance.results.layer_intervals import LayerIntervals
from lightning_invariance.results.npz import BY_LAYER, read, write
from lightning_invariance.results.table import LayerStatistics, Table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


#: Attributes that are plain data: numbers, strings, lists and dicts of them, and in ``floor`` tensors.
PLAIN = (
    "n_samples",
    "transformations",
    "parameters",
    "epoch",
    "step",
    "floor",
    "skipped",
    "left_out",
    "reached",
    "channel_axis",
    "convergence",
    "higher_is_better",
    "ratios",
    "units",
    "biases",
    "response",
    "response_bounds",
    "scores",
    "confidence",
    "sparse",
)


@dataclass(frozen=True)
class OutputValues:
    """What a metric of predictions and targets is under each transformation.

    Attributes:
        values: one for each transformation.
        higher_is_better: whether higher values are better; None where the metric does not say.
        low: lower bounds of confidence intervals over samples, one for each transformation, with ``confidence`` and for
            metrics that are means over samples, else empty; NaN where all samples have the same value.
        high: upper bounds.
        mean_low: lower bound of the mean over the transformations.
        mean_high: upper bound.
    """

    values: list[float]
    higher_is_better: bool | None = None
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    mean_low: float | None = None
    mean_high: float | None = None

    @property
    def mean(self) -> float:
        """The mean over the transformations."""
        return sum(self.values) / len(self.values) if self.values else math.nan

    @property
    def worst(self) -> float:
        """The lowest value, or the highest of metrics where lower is better; NaN where that or a value is not known."""
        if self.higher_is_better is None or not self.values or any(map(math.isnan, self.values)):
            return math.nan
        return min(self.values) if self.higher_is_better else max(self.values)


class InvarianceResult(LayerIntervals):
    """Values of the measures for every layer: ``result["NormalizedVariance"]["conv1"]`` is a float64 tensor.

    A mapping measure → {layer: tensor of ``activation_shape``}, layers in the order in which they ran. Made by
    :func:`evaluate` and :class:`InvarianceMonitor`.

    Args:
        values: measure → {layer: tensor}.
        dead: layer → bool tensor, true for activations that never changed (where the measures know).
        n_samples: how many samples were measured.
        transformations: labels of the transformations.
        parameters: their parameters, a list for each name.
        epoch: epoch of the training at which it was measured; -1 is the untrained network.
        step: the logger step of that moment.
        floor: same-equivariance measure → its values for the network that returns its input: what interpolation and
            the borders cost by themselves.
        skipped: measure → layers for which it is not defined, such as those without spatial axes.
        left_out: layer → why no measure could be taken of it: that it does not depend on the input, or on other
            samples too, that it has not as much for every sample, or that it is random.
        reached: layer → number of samples that reached it, where that is not all of them.
        channel_axis: layer → which axis of its activation holds the channels (units); by default the first.
        convergence: measure → layer → number of samples → mean of the layer after so many samples.
        higher_is_better: measure → whether higher values are more invariant; None where neither is.
        ratios: measure → whether it is a ratio, for which 1 means as much as samples do.
        units: measure → unit of its values; empty where there is none.
        biases: measure → ``relative_bias`` of its values, where it is known.
        response: measure → layer → what each transformation does to the layer, where the measure was asked for it
            (``NormalizedVariance(response=True)``).
        response_bounds: measure → layer → lower and upper bounds of the response under each transformation, of
            intervals over samples with ``confidence``.
        scores: the trainer's metrics of that moment, such as an accuracy.
        standard_errors: measure → layer → standard error of each value, for samples drawn at random. Without
            ``confidence`` only measures have it that are estimated from pairs of samples.
        confidence: of the intervals; None where there are none.
        freedom: measure → layer → degrees of freedom of each standard error.
        influences: measure → layer → how much each sample (each group of samples, for sample distances) moves the mean
            of the layer; see :mod:`lightning_invariance.results.intervals`. NaN for samples that did not reach it.
        sample_keys: measure → a number of 64 bits for each of these samples or groups, by what they hold.
        sparse: measure → layer → share of the units whose values few samples decide.
        outputs: metric of predictions and targets → its value under each transformation, with ``mean`` and ``worst``.

    Attributes:
        n_samples: see Args. So are ``transformations``, ``parameters``, ``epoch``, ``step``, ``floor``, ``skipped``,
            ``left_out``, ``reached``, ``channel_axis``, ``convergence``, ``higher_is_better``, ``ratios``, ``units``,
            ``biases``, ``response``, ``response_bounds``, ``scores``, ``standard_errors``, ``confidence``, ``freedom``,
            ``influences``, ``sample_keys``, ``sparse`` and ``outputs``.
    """

    def __init__(
        self,
        values: Mapping[str, Mapping[str, Tensor]],
        *,
        dead: Mapping[str, Tensor] | None = None,
        n_samples: int = 0,
        transformations: Sequence[str] = (),
        parameters: Mapping[str, Sequence[float]] | None = None,
        epoch: int | None = None,
        step: int | None = None,
        floor: Mapping[str, Tensor] | None = None,
        skipped: Mapping[str, Sequence[str]] | None = None,
        left_out: Mapping[str, str] | None = None,
        reached: Mapping[str, int] | None = None,
        channel_axis: Mapping[str, int] | None = None,
        convergence: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
        higher_is_better: Mapping[str, bool | None] | None = None,
        ratios: Mapping[str, bool] | None = None,
        units: Mapping[str, str] | None = None,
        biases: Mapping[str, float] | None = None,
        response: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
        response_bounds: Mapping[str, Mapping[str, Sequence[Sequence[float]]]] | None = None,
        scores: Mapping[str, float] | None = None,
        standard_errors: Mapping[str, Mapping[str, Tensor]] | None = None,
        confidence: float | None = None,
        freedom: Mapping[str, Mapping[str, Tensor]] | None = None,
        influences: Mapping[str, Mapping[str, Tensor]] | None = None,
        sample_keys: Mapping[str, Tensor] | None = None,
        sparse: Mapping[str, Mapping[str, float]] | None = None,
        outputs: Mapping[str, OutputValues | Mapping[str, Any]] | None = None,
    ) -> None:
        layers = dict.fromkeys(layer for of_layers in values.values() for layer in of_layers)
        samples = {layer: (reached or {}).get(layer, n_samples) for layer in layers}
        super().__init__(values, dead, channel_axis, samples)
        self.n_samples = n_samples
        self.transformations = list(transformations)
        self.parameters = {name: list(numbers) for name, numbers in (parameters or {}).items()}
        self.epoch = epoch
        self.step = step
        self.floor = dict(floor or {})
        self.skipped = {measure: list(layers) for measure, layers in (skipped or {}).items() if layers}
        self.left_out = dict(left_out or {})
        self.reached = dict(reached or {})
        self.higher_is_better = dict(higher_is_better or {})
        # Results of earlier versions and those made by hand do not say: then the package's names for ratios count.
        self.ratios = {m: m.startswith("Normalized") for m in self._values} if ratios is None else dict(ratios)
        self.units = dict(units or {})
        self.biases = dict(biases or {})
        self.response = {measure: dict(layers) for measure, layers in (response or {}).items()}
        self.response_bounds = {measure: dict(layers) for measure, layers in (response_bounds or {}).items()}
        self.scores = dict(scores or {})
        self.convergence = {
            measure: {layer: {int(n): value for n, value in found.items()} for layer, found in layers.items()}
            for measure, layers in (convergence or {}).items()
        }
        self.outputs = {
            name: found if isinstance(found, OutputValues) else OutputValues(**found)
            for name, found in (outputs or {}).items()
        }
        self.sparse = {measure: dict(layers) for measure, layers in (sparse or {}).items()}
        self.set_intervals(confidence, standard_errors, freedom, influences, sample_keys)

    def plot(self, measure: str | None = None) -> Figure:
        """The heatmap of a measure: :func:`lightning_invariance.plots.heatmap`.

        Args:
            measure: its name; by default the first.
        """
        return drawn("heatmap", self, measure)

    def to_pandas(self) -> pandas.DataFrame:
        """The tables of all measures as one ``DataFrame`` (pandas must be installed): a row for each measure and layer.

        The columns are ``measure`` and those of :class:`LayerStatistics`.
        """
        import pandas

        rows = [{"measure": measure, **asdict(row)} for measure, table in self._tables.items() for row in table]
        return pandas.DataFrame(rows)

    def reduced(self) -> InvarianceResult:
        """The same result with one value for each channel, without errors; tables, means and pictures stay the same.

        The influences of samples on layers stay, too.
        """
        state = self.state_dict()
        state["standard_errors"], state["freedom"] = {}, {}
        state["values"] = {
            measure: {layer: self.per_channel(measure, layer) for layer in layers}
            for measure, layers in self._values.items()
        }
        state["dead"] = {layer: self.dead_channels(layer) for layer in self.dead}
        state["channel_axis"] = {}  # there is but one axis
        return InvarianceResult.from_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors, numbers, strings, lists and dicts, which ``torch.load(weights_only=True)`` reads."""
        statistics = {
            measure: [{**asdict(row), "shape": list(row.shape)} for row in table]
            for measure, table in self._tables.items()
        }
        return {
            "values": {measure: dict(layers) for measure, layers in self._values.items()},
            "dead": self.dead,
            **{name: getattr(self, name) for name in BY_LAYER},
            "sample_keys": self.sample_keys,
            "outputs": {name: asdict(found) for name, found in self.outputs.items()},
            "statistics": statistics,
            **{name: getattr(self, name) for name in PLAIN},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> InvarianceResult:
        """The result that :meth:`state_dict` described."""
        known = ("dead", "sample_keys", "outputs", *BY_LAYER, *PLAIN)  # and not what later versions add
        rest = {name: value for name, value in state.items() if name in known}
        result = cls(state["values"], **rest)
        for measure, rows in state["statistics"].items():
            result._tables[measure] = Table(LayerStatistics.from_plain(row) for row in rows)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to one file (numpy's npz format, no pickle); a half-written file is never left behind."""
        write(self.state_dict(), Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InvarianceResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is broken, or something else.
        """
        try:
            return cls.from_state_dict(read(Path(path)))
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
        return "\n\n".join([self._heading(), *(f"{measure}\n{table}" for measure, table in self._tables.items())])

    def _repr_html_(self) -> str:
        tables = "".join(f"<h4>{html.escape(m)}</h4>{table._repr_html_()}" for m, table in self._tables.items())
        return f"<p>{html.escape(self._heading())}</p>{tables}"
