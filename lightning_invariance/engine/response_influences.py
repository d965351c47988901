r"""Influence of each sample on the response, the change that each transformation makes to a layer.

A response :math:`r_j = \sum_c W_c H_{jc}` is linear in the changes H of channels c under transformation j, with weights
W that are constant, or, for a normalised variance, inverse to the squared deviations :math:`C_c` of the channel. With
the contributions :math:`h_{ijc}` and :math:`c_{ic}` of sample i to both, its influence is

.. math:: \psi_{ij} = n \sum_c W_c h_{ijc} - r_j \quad\text{or}\quad
    \psi_{ij} = n \sum_c W_c \left(h_{ijc} - H_{jc} \frac{c_{ic}}{C_c}\right).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_invariance.accumulators import States
from lightning_invariance.accumulators.influences import FoundInfluences
from lightning_invariance.accumulators.sums import Sums
from lightning_invariance.measures import Measure


class ResponseInfluence:
    """The influences of samples on the response of one measure of one layer, in a second pass.

    Args:
        measure: with a response that has intervals.
        sums: what they came to in the first pass.
    """

    def __init__(self, measure: Measure, sums: Sums) -> None:
        changes = sums["changes"]
        self._sums, self._weights = sums, sums.n_samples * response_weights(measure, sums)
        self._response = (self._weights * changes).sum(1) / sums.n_samples
        self._of_spreads: Tensor | None = None
        if measure.is_ratio:
            spreads = self._of_channels(sums["column_spread"])[0]
            self._of_spreads = (self._weights * changes / spreads).nan_to_num(0, 0, 0)

    def of(self, shares: States) -> Tensor:
        """ψ of some samples, ``(samples, m)``, given ``changes`` ``(samples, m, channels)`` and ``column_spread``."""
        changes = torch.where(self._weights != 0, shares["changes"] * self._weights, 0.0).sum(2)
        if self._of_spreads is None:
            return changes - self._response
        spreads = self._of_channels(shares["column_spread"].sum(1))
        return changes - torch.where(self._of_spreads.any(0), spreads, 0.0) @ self._of_spreads.mT

    def of_found(self, found: FoundInfluences) -> Tensor:
        """As :meth:`of`, given the finite sums that a kernel has found of some samples."""
        if self._of_spreads is None:
            return found.changes - self._response
        return found.changes - self._of_channels(found.spreads).double() @ self._of_spreads.mT

    def constant_factors(self) -> Tensor | None:
        """By what changes are multiplied in the response, ``(activations,)``; None if it depends on the column."""
        sums = self._sums
        if not bool((self._weights == self._weights[0]).all()):
            return None
        shape, axis = sums.activation_shape, sums.channel_axis
        ends = [1] * len(shape)
        if shape:
            ends[axis] = -1
        return self._weights[0].view(ends or (1,)).expand(shape or (1,)).reshape(-1).float()

    def _of_channels(self, values: Tensor) -> Tensor:
        """``(rows, activations)`` → ``(rows, channels)``, summed over positions."""
        sums = self._sums
        shaped = values.view(-1, *(sums.activation_shape or (1,)))
        return shaped.movedim(1 + sums.channel_axis, 1).flatten(2).sum(2) if shaped.ndim > 2 else shaped


def has_intervals(measure: Measure, sums: Sums) -> bool:
    """Whether this layer has a response, and it is linear in the changes as the measure says: a subclass may not be."""
    response = measure.response_of(sums) if measure.has_response_intervals else None
    if response is None:
        return False
    linear = (response_weights(measure, sums) * sums["changes"]).nansum(1)
    return bool(((linear - response).abs() <= 1e-4 * response.abs()).logical_or(response.isnan()).all())


def response_weights(measure: Measure, sums: Sums) -> Tensor:
    """How the response changes with ``changes``, ``(m, channels)``; 0 where it is not defined."""
    changes = sums["changes"].detach().clone().requires_grad_()
    with torch.enable_grad():
        response = measure.response_of(replace(sums, states={**sums.states, "changes": changes}))
        [weights] = torch.autograd.grad(response.nansum(), [changes])  # type: ignore[union-attr]
    return weights.nan_to_num(0, 0, 0)
