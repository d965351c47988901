"""Measures of a layer that share their states, so that one update serves all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.measures import Measure

#: Measures that share their states: name → metric. The first is updated for all of them.
Group = dict[str, Metric]

#: The layer of a network that gives back its input, for :attr:`InvarianceResult.floor`.
INPUT = ""


def groups_of(measures: Mapping[str, Metric]) -> list[list[str]]:
    """The names of measures that share their states: the update of the first of each group serves all of it."""
    rules: dict[str, frozenset[Hashable]] = {
        name: measure.update_rule if isinstance(measure, Measure) else frozenset([id(measure)])
        for name, measure in measures.items()
    }
    groups: list[list[str]] = []
    for name in sorted(rules, key=lambda name: -len(rules[name])):
        group = next((group for group in groups if rules[name] <= rules[group[0]]), None)
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return groups


def leader_of(group: Group) -> Metric:
    """The metric that is updated for all."""
    return next(iter(group.values()))


def passes_of(metric: Metric) -> int:
    """How often a metric may need to see every row."""
    return metric.passes if isinstance(metric, Measure) else 1


def applies(metric: Metric, layer: str, shape: Iterable[int]) -> bool:
    """Whether a metric is defined for a layer with activations of this shape."""
    if not isinstance(metric, Measure):
        return layer != INPUT
    return (layer != INPUT or metric.has_floor) and metric.applies_to(tuple(shape))


def lend(metric: Metric, leader: Metric) -> None:
    """Give a metric the states of the leader of its group."""
    for state in metric._defaults if metric is not leader else ():
        setattr(metric, state, getattr(leader, state))
    metric._computed = None
    metric._update_count = max(1, leader._update_count)


def computed(metric: Metric, leader: Metric) -> Tensor:
    """What a metric makes of the states of the leader of its group."""
    lend(metric, leader)
    value: Any = metric.compute()
    return torch.as_tensor(value).detach().to("cpu", torch.float64)
