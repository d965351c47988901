"""What an accumulator is: one family of sums over the rows of the ST matrix of a layer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_invariance.distributed import DTYPES
from lightning_invariance.messages import given
from lightning_invariance.transforms import TransformationSet

#: The sums of one accumulator by name.
States: TypeAlias = dict[str, Tensor]

#: Types of networks in half precision, which float32 holds exactly; and all types of rows.
HALF = {torch.float16, torch.bfloat16}
TYPES = {torch.float32, torch.float64, *HALF}

#: The state that counts rows, which the package keeps beside those of an accumulator.
N_SAMPLES = "n_samples"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Context:
    """What is known before the first row.

    Attributes:
        transformations: the columns.
        input_shape: of a network input; ``()`` where it is not known yet.
        n_samples: how many samples all processes together will show, named by the ``indices`` 0 to n − 1, if known.
        run: how many samples each process shows in a row, in rising order of ``indices``, before another shows those
            that follow: see :func:`~lightning_invariance.distributed.places_of`. Their order is random, and
            ``n_samples`` is known. 0 where samples come in any other order.
    """

    transformations: TransformationSet
    input_shape: tuple[int, ...] = ()
    n_samples: int | None = None
    run: int = 0


@dataclass(slots=True)
class Rows:
    """Rows of the ST matrix of every activation of one layer.

    Attributes:
        values: complete rows ``(samples, transformations, *activation_shape)`` in float32 or float64; or in float16 or
            bfloat16, if the accumulator :attr:`~Accumulator.takes_half`.
        indices: ``(samples,)`` in int64, on the CPU: numbers that name the samples; None in an update by hand without.
        labels: ``(samples,)``, the class of each sample; None where the data have none.
        before: how many rows were added before these.
        memo: what the accumulators of this layer have computed of these rows; see :meth:`once`.
        block_memo: what the accumulators of all layers have computed of these samples.
        channel_axis: which axis of the activation holds the channels.
    """

    values: Tensor
    indices: Tensor | None = None
    labels: Tensor | None = None
    before: int = 0
    memo: dict[Hashable, Any] = field(default_factory=dict)
    block_memo: dict[Hashable, Any] = field(default_factory=dict)
    channel_axis: int = 0

    @property
    def flat(self) -> Tensor:
        """``(samples, transformations, activations)``."""
        return self.values.flatten(2) if self.values.ndim > 2 else self.values[..., None]

    @property
    def channels_first(self) -> Tensor:
        """``(samples, transformations, channels, *positions)``."""
        return self.values.movedim(2 + self.channel_axis, 2) if self.channel_axis else self.values

    @property
    def maps(self) -> Tensor:
        """``(samples, transformations, channels, positions)``."""
        values = self.channels_first
        return values.flatten(3) if values.ndim > 3 else values.reshape(*values.shape[:2], -1, 1)

    def widen(self) -> None:
        """Make float16 and bfloat16 values float32, once for all who do not take them as they are."""
        if self.values.dtype in HALF:
            self.values = self.values.float()

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What several accumulators of a layer need of these rows, computed by the first of them."""
        if key not in self.memo:
            self.memo[key] = make()
        found: Value = self.memo[key]
        return found

    def of(self, values: Tensor) -> Rows:
        """The same samples with other values, whose channels come first."""
        return dataclasses.replace(self, values=values, memo={}, channel_axis=0)

    def some(self, samples: Tensor, before: int) -> Rows:
        """The rows of some samples, given by their positions ``(count,)`` on the CPU, after ``before`` others."""
        there = samples.to(self.values.device, non_blocking=True)
        indices = None if self.indices is None else self.indices[samples]
        labels = None if self.labels is None else self.labels[samples.to(self.labels.device)]
        return Rows(self.values[there], indices, labels, before, channel_axis=self.channel_axis)


class Group(NamedTuple):
    """Rows of one group of samples in a block.

    Attributes:
        number: of the group.
        size: how many samples it holds.
        rows: how many of them the block holds.
    """

    number: int
    size: int
    rows: int


class GroupShare(NamedTuple):
    """What a group of samples adds to the sums.

    Attributes:
        shares: state → ``(1, *state shape)``.
        expected: which part of the sums a group of this size adds on average.
        groups: how many groups there are.
    """

    shares: States
    expected: float
    groups: int


class Influenced(NamedTuple):
    """A value that is made of sums, and how it changes with them.

    Attributes:
        n_samples: number of rows of the sums.
        n_transformations: number of columns.
        derivative: gives the derivatives of the value of each unit with respect to some states, in their shapes.
        finite: which units have a finite value, ``(units,)``.
        factors: ``(activations,)`` in float32, by which changes are multiplied in the response of the measure; None
            where they are not constant, or not wanted.
        with_response: whether the influences on the response are wanted, too.
    """

    n_samples: int
    n_transformations: int
    derivative: Callable[[Sequence[str]], States]
    finite: Tensor
    factors: Tensor | None
    with_response: bool


class FoundInfluences(NamedTuple):
    r"""What an :class:`InfluenceKernel` has found of some rows.

    Attributes:
        on_sum: :math:`\sum_u \psi_{iu}` over activations, ``(n,)`` in float64.
        changes: :math:`\sum_u f_u (x_{iju} - x_{iru})^2` with the factors f, ``(n, m)`` in float64; empty without.
        spreads: squared deviations of each row from the means of the columns, ``(n, k)`` in float32; empty without
            factors.
    """

    on_sum: Tensor
    changes: Tensor
    spreads: Tensor


class InfluenceKernel(Protocol):
    """Sums the influences of samples on the value of each unit."""

    def add(self, rows: Rows, squares: Tensor, fourths: Tensor) -> FoundInfluences | None:
        r"""Add :math:`\sum_i \psi_i^2` and :math:`\sum_i \psi_i^4` in place; None, and no change, if it cannot."""


class Accumulator(ABC):
    """One family of sums over the rows of the ST matrix of a layer.

    A subclass is a frozen dataclass, whose fields are its arguments, immutable and hashable: equal accumulators exist
    once for a layer, and serve every measure that needs them. It overrides :meth:`empty`, :meth:`add` and
    :meth:`merge`, which work on plain dicts of tensors:

    - The states before the first row are those of :meth:`empty`. A state keeps its number of dimensions from then on,
      and is float64, float32, int64, int32 or bool, so that processes know what they send to each other.
    - :meth:`add` changes the dict in place. The number of rows before is ``rows.before``.
    - :meth:`merge` is called with states that have rows, returns every state, and must give the same for any split and
      order of the rows. The dicts that it gets also hold ``n_samples``, the number of their rows; whatever else it
      needs, such as the number of transformations, must be a state.
    """

    #: States that stay on the CPU, since the accumulator reads them: reading from a GPU would synchronise.
    cpu_states: ClassVar[tuple[str, ...]] = ()

    #: Whether it adds float16 and bfloat16 values as they are; otherwise they are float32.
    takes_half: ClassVar[bool] = False

    #: Whether states grow with the number of rows; otherwise the first row tells how much memory they take.
    grows: ClassVar[bool] = False

    #: Whether it looks at samples in groups, which then take the place of samples in standard errors.
    in_groups: ClassVar[bool] = False

    #: Whether sums have the channels first, whichever axis of the activation holds them.
    channels_first: ClassVar[bool] = False

    #: Whether it gives the same sums where another axis of the activation holds the channels (``rows.channel_axis``).
    #: Declared by each class for itself: subclasses do not inherit it.
    any_channel_axis: ClassVar[bool] = False

    @property
    def least_run(self) -> int:
        """How many samples, one after the other, it needs from one process; see :attr:`Context.run`."""
        return 1

    @abstractmethod
    def empty(self) -> States:
        """The states before the first row."""

    @abstractmethod
    def add(self, states: States, rows: Rows) -> None:
        """Add rows to the states: change the dict, or the tensors in it, in place."""

    @abstractmethod
    def merge(self, a: States, b: States) -> States:
        """The states after the rows of both, neither of which is changed."""

    def prepared(self, context: Context) -> Accumulator:
        """The accumulator for what is known before the first row.

        Raises:
            ValueError: If it cannot work with these transformations.
        """
        return self

    def includes(self, other: Accumulator) -> bool:
        """Whether its states hold those of the other, so that the other need not exist beside it."""
        return self == other

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Whether the sums are defined for activations of this shape; other layers are left out."""
        return True

    @property
    def has_shares(self) -> bool:
        """Whether :meth:`shares` is there, so that values have standard errors over samples."""
        return type(self).shares is not Accumulator.shares

    def shares(self, rows: Rows, totals: States) -> States:
        """What each sample adds to the sums, given what they came to: what they change if it weighs a little more.

        Args:
            rows: of a second pass over the same samples.
            totals: the states after all rows.

        Returns:
            ``(samples, *state shape)`` in float64 for each state that a value is made of, whose last axis is that of
            activations or channels.
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell the shares of samples.")

    def group_of(self, indices: Tensor) -> Tensor:
        """The number of the group of each sample, ``(samples,)``, if it looks at samples :attr:`in_groups`."""
        raise NotImplementedError(f"{type(self).__name__} does not look at samples in groups.")

    def groups(self, rows: Rows) -> list[Group]:
        """The groups that rows belong to, one after the other, if it looks at samples :attr:`in_groups`."""
        raise NotImplementedError(f"{type(self).__name__} does not look at samples in groups.")

    def share_of_group(self, states: States, totals: States) -> GroupShare | None:
        """What the group that was just added to ``states`` adds to the sums, which begin anew; None while it waits."""
        raise NotImplementedError(f"{type(self).__name__} does not look at samples in groups.")

    def influence_kernel(self, totals: States, about: Influenced) -> InfluenceKernel | None:
        """A fast way to sum the influences of samples on a value that is made of these sums alone, if there is one.

        Args:
            totals: the states after all rows.
            about: the value.
        """
        return None

    def dead(self, states: States) -> Tensor | None:
        """Which activations never changed: bool ``(activations,)``; None where the states do not tell."""
        return None


def merged(accumulator: Accumulator, a: States, b: States) -> States:
    """The states after the rows of both, either of which may have none."""
    if not int(a[N_SAMPLES]) or not int(b[N_SAMPLES]):
        full = a if int(a[N_SAMPLES]) else b
        return {name: state.clone() for name, state in full.items()}
    states = accumulator.merge(a, b)
    if not isinstance(states, dict):
        raise TypeError(f"Expected {type(accumulator).__name__}.merge to return a dict, but got {given(states)}.")
    check_states(accumulator, states, "merge")
    return {**states, N_SAMPLES: a[N_SAMPLES] + b[N_SAMPLES]}


def add_to(states: States, **added: Tensor) -> None:
    """Add tensors to states of these names, which are empty before the first row."""
    for name, value in added.items():
        states[name] = states[name] + value if states[name].numel() else value


def declares(thing: Any, attribute: str) -> bool:
    """Whether the class of an accumulator or a measure says itself that something holds: subclasses do not inherit it.

    A subclass may compute other sums, or another value.
    """
    return bool(vars(type(thing)).get(attribute, False))


def started(accumulator: Accumulator, device: torch.device) -> States:
    """The states before the first row, on a device."""
    states, on_cpu = accumulator.empty(), accumulator.cpu_states
    for name in states.keys() - {*on_cpu}:
        states[name] = states[name].to(device)
    return states


def check_declaration(accumulator: Accumulator) -> States:
    """The empty states of an accumulator.

    Raises:
        TypeError: If it is no frozen dataclass with immutable fields, or a state is not a tensor of an allowed type.
    """
    if not isinstance(accumulator, Accumulator):
        hint = f": write {accumulator.__name__}()" if isinstance(accumulator, type) else ""
        raise TypeError(f"Expected argument `needs` to hold accumulators, but got {given(accumulator)}{hint}.")
    name = type(accumulator).__name__
    parameters = vars(type(accumulator)).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise TypeError(
            f"Expected accumulator {name} to be a frozen dataclass: decorate it with @dataclass(frozen=True)."
        )
    for argument in dataclasses.fields(accumulator):  # type: ignore[arg-type]
        value = getattr(accumulator, argument.name)
        if isinstance(value, Tensor | list | dict | set):
            raise TypeError(
                f"Expected field {argument.name!r} of accumulator {name} to be immutable, such as a number or a tuple,"
                f" but got {given(value)}."
            )
    states = accumulator.empty()
    for state, value in states.items():
        check_state(name, state, value)
    return states


def check_states(accumulator: Accumulator, states: States, method: str) -> None:
    """Check the states after a method of an accumulator.

    Raises:
        TypeError: If a state is not a tensor of an allowed type.
        ValueError: If names or numbers of dimensions are not those of the empty states.
    """
    name, empty = type(accumulator).__name__, accumulator.empty()
    if missing := empty.keys() - states.keys():
        verb = "return" if method == "merge" else "keep"
        raise ValueError(
            f"Expected {name}.{method} to {verb} the states {[*empty]}, but {sorted(missing)} are missing."
        )
    for state, value in empty.items():
        check_state(name, state, states[state])
        if states[state].ndim != value.ndim:
            raise ValueError(
                f"Expected state {state!r} of {name} to keep its {value.ndim} dimensions, but got a tensor of shape"
                f" {tuple(states[state].shape)}: give `empty` a state with as many."
            )


def check_state(accumulator: str, name: str, value: Any) -> None:
    """Raise where a state could not be sent between processes."""
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"Expected state {name!r} of {accumulator} to be a tensor of one of {DTYPES}, but got {got}.")
