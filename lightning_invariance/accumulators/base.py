"""The accumulator: a family of sums over the rows of the ST matrix of one layer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_invariance.accumulators.influences import FoundInfluences as FoundInfluences
from lightning_invariance.accumulators.influences import Group
from lightning_invariance.accumulators.influences import GroupShare as GroupShare
from lightning_invariance.accumulators.influences import Influenced as Influenced
from lightning_invariance.accumulators.influences import InfluenceKernel as InfluenceKernel
from lightning_invariance.distributed import DTYPES
from lightning_invariance.messages import given
from lightning_invariance.transforms import TransformationSet

#: The sums of one accumulator by name.
States: TypeAlias = dict[str, Tensor]

#: Types of networks in half precision, whose values float32 represents exactly; and all types of rows.
HALF = {torch.float16, torch.bfloat16}
TYPES = {torch.float32, torch.float64, *HALF}

#: The state that counts rows; the package adds it to the states of every accumulator.
N_SAMPLES = "n_samples"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Context:
    """Properties of an evaluation that are known before the first row.

    Attributes:
        transformations: the columns of the ST matrix.
        input_shape: shape of a network input without the batch axis; ``()`` if it is not known yet.
        n_samples: number of samples of all processes together, whose ``indices`` are 0 to n − 1; None if unknown.
        run: largest number of consecutive ``indices``, in rising order, that a process adds before another process
            continues, see ``data/rank_shares.py``. The order of samples is then random and ``n_samples`` is known. 0 if samples come in any other order.
    """

    transformations: TransformationSet
    input_shape: tuple[int, ...] = ()
    n_samples: int | None = None
    run: int = 0


@dataclass(slots=True)
class Rows:
    """Rows of the ST matrix of every activation of one layer.

    Attributes:
        values: complete rows ``(samples, transformations, *activation_shape)`` in float32 or float64; also in float16
            or bfloat16 for an accumulator with :attr:`~Accumulator.takes_half`.
        indices: ``(samples,)`` in int64, on the CPU: the number of each sample; None for rows without numbers.
        labels: ``(samples,)``, the class of each sample; None for data without labels.
        before: number of rows added earlier.
        memo: results for these rows that the accumulators of this layer reuse; see :meth:`once`.
        block_memo: results for these samples that the accumulators of all layers reuse.
        channel_axis: axis of the activation that holds the channels.
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
        """Convert float16 and bfloat16 values to float32, for all later readers of these rows."""
        if self.values.dtype in HALF:
            self.values = self.values.float()

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Compute a result that several accumulators of a layer need, at the first request only."""
        if key not in self.memo:
            self.memo[key] = make()
        found: Value = self.memo[key]
        return found

    def some(self, samples: Tensor, before: int) -> Rows:
        """Select rows by their positions ``(count,)``, on the CPU; ``before`` counts the rows added earlier."""
        there = samples.to(self.values.device, non_blocking=True)
        indices = None if self.indices is None else self.indices[samples]
        labels = None if self.labels is None else self.labels[samples.to(self.labels.device)]
        return Rows(self.values[there], indices, labels, before, channel_axis=self.channel_axis)


class Accumulator(ABC):
    """One family of sums over the rows of the ST matrix of a layer.

    A subclass overrides :meth:`empty`, :meth:`add` and :meth:`merge`; everything else has a default. It is a frozen
    dataclass whose fields, immutable and hashable, are its arguments: a layer keeps one of several equal accumulators,
    for all measures that need it. States are plain dicts of tensors:

    - :meth:`empty` returns the states before the first row. Each state keeps its number of dimensions, and is float64,
      float32, int64, int32 or bool, so that processes can receive it without announcement.
    - :meth:`add` changes the dict in place. ``rows.before`` is the number of rows added earlier.
    - :meth:`merge` gets two dicts that both have rows, and returns every state. Any split and order of the rows must
      give one result. Both dicts also hold ``n_samples``, their number of rows; everything else that the method needs,
      such as the number of transformations, must be a state.
    """

    #: States that stay on the CPU because the accumulator reads their values, for which a GPU would synchronise.
    cpu_states: ClassVar[tuple[str, ...]] = ()

    #: Whether :meth:`add` accepts float16 and bfloat16 values; otherwise they are converted to float32.
    takes_half: ClassVar[bool] = False

    #: Whether states grow with the number of rows; otherwise they have their final size after the first row.
    grows: ClassVar[bool] = False

    #: Whether samples are divided into groups, which then replace samples as the units of standard errors.
    in_groups: ClassVar[bool] = False

    #: Whether sums have the channels first, whichever axis of the activation holds them.
    channels_first: ClassVar[bool] = False

    #: Whether sums are right for any ``rows.channel_axis``. Each class declares it for itself: subclasses do not
    #: inherit it.
    any_channel_axis: ClassVar[bool] = False

    @property
    def least_run(self) -> int:
        """Number of consecutive samples that it needs from one process; see :attr:`Context.run`."""
        return 1

    @abstractmethod
    def empty(self) -> States:
        """The states before the first row."""

    @abstractmethod
    def add(self, states: States, rows: Rows) -> None:
        """Add rows to the states: change the dict, or the tensors in it, in place."""

    @abstractmethod
    def merge(self, a: States, b: States) -> States:
        """Merge two states into the states of all their rows; neither is changed."""

    def prepared(self, context: Context) -> Accumulator:
        """Return the accumulator for an evaluation.

        Raises:
            ValueError: If it cannot work with the transformations.
        """
        return self

    def includes(self, other: Accumulator) -> bool:
        """Whether its states contain the states of another accumulator, which is then not needed."""
        return self == other

    def applies_to(self, activation_shape: tuple[int, ...]) -> bool:
        """Whether the sums are defined for activations of this shape; other layers are left out."""
        return True

    @property
    def has_shares(self) -> bool:
        """Whether :meth:`shares` is implemented, which standard errors need."""
        return type(self).shares is not Accumulator.shares

    def shares(self, rows: Rows, totals: States) -> States:
        """Compute the contribution of each sample to the sums: their derivative by the weight of the sample.

        Args:
            rows: rows of a second pass over all samples.
            totals: the states after the first pass.

        Returns:
            ``(samples, *state shape)`` in float64 for each state that enters a value. The last axis of the state
            counts activations or channels.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement `shares`.")

    def group_of(self, indices: Tensor) -> Tensor:
        """The group number of each sample, ``(samples,)``; required with :attr:`in_groups`."""
        raise NotImplementedError

    def groups(self, rows: Rows) -> list[Group]:
        """The groups of consecutive rows; required with :attr:`in_groups`."""
        raise NotImplementedError

    def share_of_group(self, states: States, totals: States) -> GroupShare | None:
        """Return the contribution of the group last added to ``states``, and reset its sums in ``states`` to 0.

        None until the group is complete. Required with :attr:`in_groups`.
        """
        raise NotImplementedError

    def influence_kernel(self, totals: States, about: Influenced) -> InfluenceKernel | None:
        """A fast way to sum the influences of samples on a value of these sums alone; None if there is none.

        Args:
            totals: the states after the first pass.
            about: the value.
        """
        return None

    def dead(self, states: States) -> Tensor | None:
        """Which activations or channels never changed, bool ``(activations,)`` or ``(channels,)``; None if unknown."""
        return None


def add_to(states: States, **added: Tensor) -> None:
    """Add tensors to the states of these names, which are empty before the first row."""
    for name, value in added.items():
        states[name] = states[name] + value if states[name].numel() else value


def declares(thing: Any, attribute: str) -> bool:
    """Whether the class of an accumulator or measure sets an attribute to true itself, instead of inheriting it."""
    return bool(vars(type(thing)).get(attribute, False))


def started(accumulator: Accumulator, device: torch.device) -> States:
    """The states before the first row, on a device."""
    states, on_cpu = accumulator.empty(), accumulator.cpu_states
    return {name: state if name in on_cpu else state.to(device) for name, state in states.items()}


def check_declaration(accumulator: Accumulator) -> States:
    """Return the empty states of an accumulator.

    Raises:
        TypeError: If it is not a frozen dataclass with immutable fields, or a state is not a tensor of an allowed type.
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
    check_states(accumulator, states, "empty")
    return states


def check_states(accumulator: Accumulator, states: States, method: str) -> None:
    """Check the states after a method of an accumulator.

    Raises:
        TypeError: If a state is not a tensor of an allowed type.
        ValueError: If names or numbers of dimensions differ from the empty states.
    """
    name, empty = type(accumulator).__name__, accumulator.empty()
    if missing := empty.keys() - states.keys():
        verb = "return" if method == "merge" else "keep"
        raise ValueError(
            f"Expected {name}.{method} to {verb} the states {[*empty]}, but {sorted(missing)} are missing."
        )
    for state, before in empty.items():
        value: Any = states[state]
        if not isinstance(value, Tensor) or value.dtype not in DTYPES:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"Expected state {state!r} of {name} to be a tensor of one of {DTYPES}, but got {got}.")
        if value.ndim != before.ndim:
            raise ValueError(
                f"Expected state {state!r} of {name} to keep its {before.ndim} dimensions, but got a tensor of shape"
                f" {tuple(value.shape)}: give `empty` a state with as many."
            )
