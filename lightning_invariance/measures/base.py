"""Base class of all measures: ST blocks in, one value for each activation out."""

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

from lightning_invariance.accumulators.base import check_states, declares
from lightning_invariance.accumulators.rows import States
from lightning_invariance.accumulators.sums import Sums, dead_of
from lightning_invariance.aggregation import aggregate_maps
from lightning_invariance.measures.adapter import AccumulatingMetric
from lightning_invariance.plots.style import draw_bars
from lightning_invariance.precision import has_float64


def quotient(transformation: Tensor, sample: Tensor) -> Tensor:
    """Divide variation over transformations by variation over samples: 0/0 is 1 (a dead activation), x/0 is inf."""
    dead = (transformation == 0) & (sample == 0)
    return torch.where(dead, 1.0, transformation / sample)


class Measure(AccumulatingMetric):
    """Base of all measures: a ``torchmetrics.Metric`` of ST blocks whose states merge exactly.

    ``update`` and ``forward`` take ``st_block``, a real floating-point tensor ``(samples, transformations,
    *activation_shape)``: complete rows of the ST matrix of every activation of a layer; some need ``indices`` or
    ``labels`` of the samples. ``compute`` and ``forward`` return a float64 value for each activation or channel.

    To write a measure, name its accumulators in ``needs`` and override :meth:`value`; they determine the states, and
    how these merge over batches and processes. For a second pass over the same rows, also name ``needs_again`` and
    override :meth:`second_pass`, and :meth:`needs_second_pass` where one pass can be enough.

    Args:
        needs: accumulators; by default the class attribute.
        needs_again: accumulators of a second pass; by default the class attribute.
        kwargs: additional arguments of ``torchmetrics.Metric``, which all measures accept.

    Raises:
        TypeError: If an accumulator is no frozen dataclass, a state is not a tensor of an allowed type, or a block is
            not a real floating-point tensor.
        ValueError: If two accumulators have a state of one name, an argument is out of its range, or blocks differ in
            their transformations or activations.
    """

    #: Whether higher values are more invariant; None for values that say nothing of invariance by themselves.
    higher_is_better: bool | None = False

    #: Whether the value is a ratio, in which 1 means that transformations matter as much as samples do.
    is_ratio: bool = False

    #: Unit of the value, for labels; empty for none.
    unit: str = ""

    #: With fewer samples or transformations the value is NaN, with a warning.
    least_samples, least_transformations = 1, 2

    #: Whether results include the value of a network that returns its input, ``result.floor``.
    has_floor: ClassVar[bool] = False

    #: Whether the value is a smooth function of sums over samples, and so has standard errors and intervals.
    has_intervals: ClassVar[bool] = False

    #: State of squared deviations by whose sum the value divides, if any: standard errors leave samples out of it.
    denominator: str | None = None

    #: n times the relative bias of the value of n samples, as far as it follows from the definition.
    relative_bias: float = 0.0

    #: Whether the response has intervals, too. It must be linear in the state ``changes``, and for a ratio inversely
    #: proportional to the sum of ``column_spread`` over the positions of each channel.
    has_response_intervals: ClassVar[bool] = False

    #: Whether :meth:`value` accepts any ``sums.channel_axis``. Not inherited: a subclass may compute another value.
    any_channel_axis: ClassVar[bool] = False

    @property
    def takes_any_channel_axis(self) -> bool:
        """Whether blocks in another memory order, such as channels last, can be added without a copy."""
        return all(declares(each, "any_channel_axis") for each in (self, *self.needs, *self.needs_again))

    @abstractmethod
    def value(self, sums: Sums) -> Tensor:
        """Compute the value of every activation from the states of ``needs`` (and of ``needs_again``) by name.

        It is a tensor of :meth:`value_shape`, or flat with as many values, and is converted to float64.
        """

    def value_shape(self, sums: Sums) -> tuple[int, ...]:
        """The shape of the value: by default ``activation_shape``."""
        return sums.activation_shape

    def is_by_activation(self, sums: Sums) -> bool:
        """Whether the last axes of the value are the axes of the activation."""
        shape, own = sums.activation_shape, self.value_shape(sums)
        return own[len(own) - len(shape) :] == shape

    def needs_second_pass(self, sums: Sums) -> bool:
        """Whether one pass is not enough for :meth:`value`; by default true for measures with ``needs_again``."""
        return bool(self.needs_again)

    def second_pass(self, sums: Sums) -> States:
        """Return the states of ``needs_again`` at the start of a second pass, such as thresholds, and counts of 0.

        At least one must not be empty. They may depend only on the sums and on the fields of the accumulators in
        ``needs_again``, since equal accumulators share them. ``rows.before`` starts at 0 again.
        """
        name = type(self).__name__
        if self.needs_again:
            raise TypeError(f"Expected {name}, which names accumulators in `needs_again`, to override `second_pass`.")
        raise TypeError(f"Expected a measure with a second pass, but {name} has one pass.")

    def response_of(self, sums: Sums) -> Tensor | None:
        """The contribution of each transformation to the value of the layer, ``(m,)``; None for none."""
        return None

    def details(self, sums: Sums) -> Mapping[str, Tensor]:
        """What else the measure finds in a layer, by name: ``result.details[measure][layer]``.

        ``"by_class"`` is the value of each class of samples, ``(num_classes, *value_shape)``.
        """
        return {}

    def completed(self, sums: Sums) -> Sums:
        """The sums with states that are computed from them once, for the value, details and standard errors.

        Accumulators must know the shares of states that the value then depends on.
        """
        return sums

    def why_not(self, activation_shape: tuple[int, ...], channel_axis: int) -> str:
        """Why a layer to which the measure :meth:`applies <applies_to>` is left out; empty if it is not."""
        return next(filter(None, (each.why_not(activation_shape, channel_axis) for each in self.needs)), "")

    def standard_error(self, sums: Sums) -> Tensor | None:
        """The standard error of an estimated :meth:`value`, in the same shape; None where the value is exact."""
        return None

    def of_layer(self, sums: Sums) -> Tensor:
        """The input of :meth:`of_network` for one layer: by default the value."""
        return self.value(sums)

    def of_network(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The values of all layers, given :meth:`of_layer` of each; by default unchanged."""
        return values

    def evaluated(self, sums: Sums, value_of: Callable[[Sums], Tensor] | None = None) -> Tensor:
        """Call :meth:`value`, or ``value_of`` instead, and check its shape.

        NaN, with a warning, for too few samples or transformations.
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
        """The value of every activation, in float64 where :attr:`device` supports it.

        Raises:
            RuntimeError: If a second pass is missing; see :attr:`complete`.
        """
        if not self.complete:
            raise RuntimeError(
                f"{type(self).__name__} needs two passes for {int(self.n_samples)} samples: call `end_pass()`, and"
                " update with all blocks again."
            )
        self._value_shape = (value := self.evaluated(self.sums())).shape
        return (value if has_float64(self.device) else value.float()).to(self.device)

    def response(self) -> Tensor | None:
        """:meth:`response_of` the blocks so far."""
        return self.response_of(self.sums())

    def dead(self) -> Tensor | None:
        """Which activations never changed: bool of ``activation_shape``; None where no accumulator records it."""
        return dead_of(self.needs, self.sums())

    def sums(self) -> Sums:
        """The input of :meth:`value`."""
        shape = tuple(self.activation_shape.tolist())
        return Sums(self.states(), int(self.n_samples), self.n_transformations, shape)

    @property
    def complete(self) -> bool:
        """Whether the passes so far are enough to compute the value."""
        if self.in_second_pass or not self.needs_again or not int(self.n_samples):
            return True
        return not self.needs_second_pass(self.sums())

    def end_pass(self) -> None:
        """Begin a second pass over the same rows; the states of all processes must be merged first.

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
        """The accumulators, for ``repr``."""
        return ", ".join(map(repr, (*self.needs, *self.needs_again)))

    def applies_to(self, activation_shape: Sequence[int]) -> bool:
        """Whether the measure is defined for activations of this shape; an evaluation leaves out the other layers."""
        return all(accumulator.applies_to(tuple(activation_shape)) for accumulator in self.needs)

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw a bar for each channel, the mean over the spatial axes; infinite bars have full height, NaN are grey.

        Args:
            val: a value of ``compute`` or ``forward``; by default ``compute()`` is called.
            ax: axes to draw into; by default a new figure.

        Returns:
            The figure and the axes.
        """
        values = self.compute() if val is None else val
        if ax is None:
            ax = Figure(figsize=(6, 3), layout="constrained").add_subplot()
        draw_bars(ax, aggregate_maps(values, "mean").tolist(), type(self).__name__)
        return ax.figure, ax  # type: ignore[return-value]


def names_accumulators(metric: Metric) -> TypeGuard[Measure]:
    """Whether a metric is a measure whose accumulators an evaluation can share between measures.

    A measure that overrides ``compute`` is evaluated like any other metric, with a clone for each layer.
    """
    return isinstance(metric, Measure) and type(metric).compute is Measure.compute
