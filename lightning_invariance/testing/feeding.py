"""Showing an ST tensor to measures: in blocks, in parts that are merged, and as processes do."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_invariance.accumulators import States
from lightning_invariance.distributed import pack, unpack
from lightning_invariance.measures import Measure

#: Number of samples of the cube, and their classes.
SAMPLES = 13
LABELS = torch.arange(SAMPLES) % 3

ALL = slice(0, SAMPLES)


def update(metric: Measure, st: Tensor, rows: slice = ALL) -> None:
    """Show some rows of an ST tensor to a measure."""
    metric.update(st[rows], **metric._filter_kwargs(labels=LABELS[rows]))


def parts(shares: Sequence[int]) -> list[list[slice]]:
    """Rows one after the other, so many for each of some processes."""
    ends = list(itertools.accumulate(shares))
    return [[slice(end - share, end)] if share else [] for share, end in zip(shares, ends, strict=True)]


def merge(metrics: Sequence[Measure]) -> None:
    """Give every measure the states of all."""
    copies = [metric.clone() for metric in metrics]
    for i, metric in enumerate(metrics):
        for copy in copies[:i] + copies[i + 1 :]:
            metric.merge_state(copy)


def exchange(metrics: Sequence[Measure]) -> None:
    """As :func:`merge`, but by the messages that processes send to each other."""
    states = metrics[0].states()
    for metric in metrics[1:]:
        states = metric.merged_states(_sent(states, metric.states()), metric.states())
    for metric in metrics:
        metric.set_states(_sent(states, metric.states()))
        metric._update_count = max(1, metric._update_count)  # else compute would warn of a missing update


def _sent(states: States, like: States) -> States:
    """What a process with states ``like`` receives."""
    header, message = pack([states], torch.device("cpu"))
    return unpack([like], header, lambda length: message[:length])[0]


def feed(metrics: Sequence[Measure], st: Tensor, shares: Sequence[Sequence[slice]], join: Any = merge) -> Tensor:
    """Show each measure its share of the rows as often as needed, and compute the first after they are joined."""
    while True:
        for metric, share in zip(metrics, shares, strict=True):
            for rows in share:
                update(metric, st, rows)
        if len(metrics) > 1:
            join(metrics)
        if metrics[0].complete:
            value: Tensor = metrics[0].compute()
            return value
        for metric in metrics:
            metric.end_pass()


def assert_close(value: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Equal within tolerances; NaN equal each other."""
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol, equal_nan=True)


def assert_raises(error: type[Exception], call: Any, words: str = "") -> None:
    """The call raises an error whose message holds some words."""
    try:
        call()
    except error as raised:
        assert words in str(raised), f"Expected {words!r} in the message, but got: {raised}"
        return
    raise AssertionError(f"Expected {error.__name__}, but nothing was raised.")


def assert_nan_with_warning(call: Any) -> None:
    """The call returns NaN and warns of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = call()
    assert value.isnan().all(), f"Expected NaN, but got {value}."
    assert any("NaN" in str(warning.message) for warning in caught), "Expected a warning that the value is NaN."
