"""The accumulator: a family of sums over the rows of the ST matrix of one layer."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_invariance.accumulators.influences import Group, GroupShare, Influenced, InfluenceKernel
from lightning_invariance.accumulators.rows import Context, Rows, States
from lightning_invariance.distributed import DTYPES
from lightning_invariance.messages import given


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

    def why_not(self, activation_shape: tuple[int, ...], channel_axis: int) -> str:
        """Why activations to which it applies are left out nevertheless; empty if they are not."""
        return ""

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
