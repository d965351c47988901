"""Records exchanged between accumulators and an evaluation that computes standard errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from lightning_invariance.accumulators.rows import Rows, States


class Group(NamedTuple):
    """The rows of a block that belong to one group of samples.

    Attributes:
        number: index of the group.
        size: number of samples in the group.
        rows: number of its rows in the block.
    """

    number: int
    size: int
    rows: int


class GroupShare(NamedTuple):
    """The contribution of a group of samples to the sums.

    Attributes:
        shares: state → contribution, ``(1, *state shape)``.
        expected: the fraction of the sums that a group of this size contributes on average.
        groups: number of groups.
    """

    shares: States
    expected: float
    groups: int


class Influenced(NamedTuple):
    """A value computed from sums, and its dependence on them.

    Attributes:
        n_samples: number of rows in the sums.
        n_transformations: number of columns.
        derivative: state names → derivatives of the value of each unit, in the shapes of the states.
        finite: which units have a finite value, bool ``(units,)``.
        factors: ``(activations,)`` in float32, by which changes are multiplied in the response of the measure; None
            if they are not constant or the response is not needed.
        with_response: whether influences on the response are needed.
        is_quotient: whether the value divides by the squared deviations from the column means.
    """

    n_samples: int
    n_transformations: int
    derivative: Callable[[Sequence[str]], States]
    finite: Tensor
    factors: Tensor | None
    with_response: bool
    is_quotient: bool


class FoundInfluences(NamedTuple):
    r"""Influences of n rows, as returned by an :class:`InfluenceKernel`.

    Attributes:
        on_sum: :math:`\sum_u \psi_{iu}` over activations u, ``(n,)`` in float64.
        changes: :math:`\sum_u f_u (x_{iju} - x_{iru})^2` with the factors f, ``(n, m)`` in float64; empty without
            factors.
        spreads: squared deviations of each row from the column means, ``(n, k)`` in float32; empty without factors.
    """

    on_sum: Tensor
    changes: Tensor
    spreads: Tensor


class InfluenceKernel(Protocol):
    """Sums the influences of samples on the value of each unit."""

    def add(self, rows: Rows, squares: Tensor, fourths: Tensor) -> FoundInfluences | None:
        r"""Add :math:`\sum_i \psi_i^2` and :math:`\sum_i \psi_i^4` in place.

        Returns None, with both tensors unchanged, for rows that the kernel does not support.
        """
