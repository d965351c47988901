"""What every measure has in common: ST blocks in, one value for each activation out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, TypeGuard

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_invariance.accumulators.base import States, check_states, declares
from lightning_invariance.accumulators.sums import Sums, dead_of
from lightning_invariance.aggregation import aggregate_maps
from lightning_invariance.measures.accumulating import AccumulatingMetric
from lightning_invariance.plots.style import draw_bars
from lightning_invariance.precision import has_float64


def quotient(transformation: Tensor, sample: Tensor) -> Tensor:
    """What a normalised measure divides, with the paper's special cases: 0/0 is 1 (a dead activation), x/0 is inf.

    Args:
        transformation: how much an activation varies with the transformation.
        sample: how much it varies with the sample, of the same shape.
    """
    dead = (transformation == 0) & (sample == 0)
    return torch.where(dead, 1.0, transformation / sample)


class Measure(AccumulatingMetric):
    """Base of all measures: a ``torchmetrics.Metric`` of ST blocks whose states merge exactly.

    As input to ``forward`` and ``update`` every measure accepts ``st_block``, a floating-point tensor ``(samples,
    transformations, *activation_shape)``: complete rows of the ST matrix of every activation of one layer; and, as far
    as it uses them, ``indices`` and ``labels`` of the samples. Blocks that do not fit together are a ``ValueError``,
    others than real floating-point tensors a ``TypeError``. As output of ``forward`` and ``compute`` it returns
    float64. All take the arguments of ``torchmetrics.Metric``; an argument out of its range is a ``ValueError``.

    To make a measure of your own, name the accumulators in ``needs`` and override :meth:`value`. The sums, their
    merging over batches and processes, and everything else that a ``Metric`` does follow from the accumulators. A
    measure that needs a second pass over the same rows also names ``needs_again``, and overrides
    :meth:`needs_second_pass` and
    :meth:`second_pass`.

    Args:
        needs: accumulators; by default those of the class.
        needs_again: accumulators of a second pass; by default those of the class.
        kwargs: additional arguments of ``torchmetrics.Metric``.

    Raises:
        TypeError: If an accumulator is no frozen dataclass, or a state is not a tensor of an allowed type.
        ValueError: If two of the accumulators have a state of the same name.
    """

    #: Whether higher values are more invariant; None where neither is.
    higher_is_better: bool | None = False

    #: Whether the value is a ratio, for which 1 means as much as samples do. Pictures of ratios share one scale.
    is_ratio: bool = False

    #: Unit of the value, for labels; empty where it has none.
    unit: str = ""

    #: Fewer samples or transformations than this give NaN, with a warning.
    least_samples: int = 1
    least_transformations: int = 2

    #: Whether results also hold the value for a network that returns its input, ``result.floor``.
    has_floor: ClassVar[bool] = False

    #: Whether the value is a smooth function of sums over samples, so that it has standard errors and intervals.
    has_intervals: ClassVar[bool] = False

    #: Whether the value is the mean over samples of what each gives by itself: intervals then need no second pass.
    is_mean_over_samples: bool = False

    #: n times the part of itself by which the value of n samples is above that of very many, by its definition.
    relative_bias: float = 0.0

    #: Whether its response has intervals, too: it is linear in the state ``changes``, and of a ratio inverse to the sum
    #: of ``column_spread`` over the positions of the channel.
    has_response_intervals: ClassVar[bool] = False

    #: Whether :meth:`value` is right where the channels are another axis of the activation, ``sums.channel_axis``.
    #: Declared by each class for itself: subclasses do not inherit it.
    any_channel_axis: ClassVar[bool] = False

    @property
    def takes_any_channel_axis(self) -> bool:
        """Whether an evaluation may leave values as they lie in memory, such as channels last, instead of copying."""
        accumulators = (*self.needs, *self.needs_again)
        return all(declares(each, "any_channel_axis") for each in (self, *accumulators))

    @abstractmethod
    def value(self, sums: Sums) -> Tensor:
        """What the measure is for every activation, given the states of ``needs`` (and of ``needs_again``) by name.

        Returns:
            ``(activations,)``, or another tensor with as many values as :meth:`value_shape` says; of any type, it
            becomes float64.
        """

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """The shape of the value: by default that of the activation."""
        return sums.activation_shape

    def is_by_activation(self, sums: Sums) -> bool:
        """Whether the last axes of the value are the axes of the activation; otherwise it has others, or none."""
        shape, own = sums.activation_shape, self.value_shape(sums)
        return own[len(own) - len(shape) :] == shape

    def needs_second_pass(self, sums: Sums) -> bool:
        """Whether :meth:`value` needs more than the sums of the first pass; by default where there is a second."""
        return bool(self.needs_again)

    def second_pass(self, sums: Sums) -> States:
        """The states of ``needs_again`` with which a second pass begins, such as thresholds, and counts of 0.

        At least one must not be empty. They must follow from the sums and from the fields of the accumulators in
        ``needs_again``, since equal accumulators share them. ``rows.before`` begins at 0 again.
        """
        name = type(self).__name__
        if self.needs_again:
            raise TypeError(f"Expected {name}, which names accumulators in `needs_again`, to override `second_pass`.")
        raise TypeError(f"Expected a measure with a second pass, but {name} has one pass.")

    def response_of(self, sums: Sums) -> Tensor | None:
        """The part of each transformation in the value of the layer, ``(m,)``; None where it is not measured."""
        return None

    def standard_error(self, sums: Sums) -> Tensor | None:
        """The standard error of an estimated :meth:`value`, in the same shape; None where the value is exact."""
        return None

    def of_layer(self, sums: Sums) -> Tensor:
        """What :meth:`of_network` gets of a layer: by default the value."""
        return self.value(sums)

    def of_network(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The values of all layers of a network, given what :meth:`of_layer` found: by default these."""
        return values

    def evaluated(self, sums: Sums, value_of: Callable[[Sums], Tensor] | None = None) -> Tensor:
        """:meth:`value` in its shape; NaN, with a warning, for too few samples or transformations.

        Args:
            sums: the states.
            value_of: what to take instead of :meth:`value`.
        """
        shape = self.value_shape(sums)
        n, m = sums.n_samples, sums.n_transformations
        if n >= self.least_samples and m >= self.least_transformations:
            value = (value_of or self.value)(sums)
            if not isinstance(value, Tensor) or value.numel() != math.prod(shape):
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise ValueError(
                    f"Expected {type(self).__name__}.value to return a tensor of {math.prod(shape)} values, for the"
                    f" shape {shape}, but got {got}."
                )
            return value.reshape(shape).double()
        rank_zero_warn(
            f"{type(self).__name__} needs at least {self.least_samples} samples and {self.least_transformations}"
            f" transformations, but got {n} and {m}: the value is NaN.",
            UserWarning,
        )
        return torch.full(shape, torch.nan, dtype=torch.float64)

    def compute(self) -> Tensor:
        """The value of every activation, in float64 where :attr:`device` has it.

        Raises:
            RuntimeError: Before a second pass that is needed.
        """
        if not self.complete:
            raise RuntimeError(
                f"{type(self).__name__} needs two passes for {int(self.n_samples)} samples: call `end_pass()`, and"
                " update with all blocks again."
            )
        value = self.evaluated(self.sums())
        return (value if has_float64(self.device) else value.float()).to(self.device)

    def response(self) -> Tensor | None:
        """The part of each transformation in the value of the layer, ``(m,)``; None where it is not measured."""
        return self.response_of(self.sums())

    def dead(self) -> Tensor | None:
        """Which activations never changed: bool of ``activation_shape``; None where the measure does not know."""
        return dead_of(self.needs, self.sums())

    def sums(self) -> Sums:
        """The states as :meth:`value` takes them."""
        shape = tuple(self.activation_shape.tolist())
        return Sums(self.states(), int(self.n_samples), self.n_transformations, shape)

    @property
    def complete(self) -> bool:
        """Whether the passes so far are enough to compute the value."""
        if self.in_second_pass or not self.needs_again or not int(self.n_samples):
            return True
        return not self.needs_second_pass(self.sums())

    def end_pass(self) -> None:
        """Prepare for a second pass over the same rows; the states must be those of all processes.

        Raises:
            TypeError: If the measure has one pass.
        """
        begun = self.second_pass(self.sums())
        for accumulator in self.needs_again:
            own = {**accumulator.empty(), **begun}
            check_states(accumulator, own, "second_pass")
            for name in accumulator.empty():
                setattr(self, name, own[name])
        self.n_samples = torch.zeros_like(self.n_samples)

    def extra_repr(self) -> str:
        """The accumulators."""
        return ", ".join(map(repr, (*self.needs, *self.needs_again)))

    def applies_to(self, activation_shape: Sequence[int]) -> bool:
        """Whether the measure is defined for activations of this shape; an evaluation leaves out the other layers."""
        return all(accumulator.applies_to(tuple(activation_shape)) for accumulator in self.needs)

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw a bar for each channel: the mean over the spatial axes. Infinite values reach the top, NaN are grey.

        Args:
            val: what ``compute`` or ``forward`` returned; by default ``compute()`` is called.
            ax: axes to draw into; by default those of a new figure.

        Returns:
            The figure and the axes.
        """
        values = self.compute() if val is None else val
        if ax is None:
            ax = Figure(figsize=(6, 3), layout="constrained").add_subplot()
        draw_bars(ax, aggregate_maps(values, "mean").tolist(), type(self).__name__)
        return ax.figure, ax  # type: ignore[return-value]


def names_accumulators(metric: Metric) -> TypeGuard[Measure]:
    """Whether a metric is a measure that is fully told by its accumulators and :meth:`Measure.value`.

    One that overrides ``compute`` instead, as metrics do, is evaluated like any other metric: a clone for each layer.
    """
    return isinstance(metric, Measure) and type(metric).compute is Measure.compute
