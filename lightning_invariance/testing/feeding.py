"""Helpers of MeasureTester: update measures in blocks, merge them, and compare their values."""

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

#: Number of samples of the ST tensor, and their classes.
SAMPLES = 13
LABELS = torch.arange(SAMPLES) % 3

ALL = slice(0, SAMPLES)


def update(metric: Measure, st: Tensor, rows: slice = ALL) -> None:
    """Update a measure with some rows of an ST tensor."""
    metric.update(st[rows], **metric._filter_kwargs(labels=LABELS[rows]))


def parts(sizes: Sequence[int]) -> list[list[slice]]:
    """Consecutive rows for several processes, with this number of rows each."""
    ends = itertools.accumulate(sizes)
    return [[slice(end - size, end)] if size else [] for size, end in zip(sizes, ends, strict=True)]


def merge(metrics: Sequence[Measure]) -> None:
    """Merge the states of all measures into each of them."""
    copies = [metric.clone() for metric in metrics]
    for i, metric in enumerate(metrics):
        for copy in copies[:i] + copies[i + 1 :]:
            metric.merge_state(copy)


def exchange(metrics: Sequence[Measure]) -> None:
    """Merge as processes do, with the messages that they send."""
    states = metrics[0].states()
    for metric in metrics[1:]:
        states = metric.merged_states(_sent(states, metric.states()), metric.states())
    for metric in metrics:
        metric.set_states(_sent(states, metric.states()))
        metric._update_count = max(1, metric._update_count)  # with 0, compute would warn of a missing update


def _sent(states: States, like: States) -> States:
    """The states that a process with states ``like`` receives."""
    header, message = pack([states], torch.device("cpu"))
    return unpack([like], header, lambda length: message[:length])[0]


def feed(metrics: Sequence[Measure], st: Tensor, shares: Sequence[Sequence[slice]], join: Any = merge) -> Tensor:
    """Update each measure with its rows in one or two passes, join them after each pass, and compute the first."""
    while True:
        for metric, own in zip(metrics, shares, strict=True):
            for rows in own:
                update(metric, st, rows)
        if len(metrics) > 1:
            join(metrics)
        if metrics[0].complete:
            value: Tensor = metrics[0].compute()
            return value
        for metric in metrics:
            metric.end_pass()


def assert_close(value: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Assert that values are equal within tolerances, NaN included."""
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol, equal_nan=True)


def assert_raises(error: type[Exception], call: Any, words: str = "") -> None:
    """Assert that a call raises an error whose message contains some words."""
    try:
        call()
    except error as raised:
        assert words in str(raised), f"Expected {words!r} in the message, but got: {raised}"
        return
    raise AssertionError(f"Expected {error.__name__}, but nothing was raised.")


def assert_nan_with_warning(call: Any) -> None:
    """Assert that a call returns NaN with a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = call()
    assert value.isnan().all(), f"Expected NaN, but got {value}."
    assert any("NaN" in str(warning.message) for warning in caught), "Expected a warning that the value is NaN."
