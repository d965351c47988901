"""Warnings issued after an evaluation: left-out layers, NaN and infinite values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from lightning_invariance.messages import FEW, instead_of, level_of_user, number_of, some
from lightning_invariance.model.sample_axis import REPEATED
from lightning_invariance.model.selection import summary_of
from lightning_invariance.results.intervals import MAX_LEFT_OUT
from lightning_invariance.results.result import InvarianceResult


def warn_of(result: InvarianceResult, patterns: Mapping[str, Iterable[str]]) -> None:
    """Warn of layers that were left out or that some samples bypass, and of NaN and infinite values.

    Args:
        result: of the evaluation.
        patterns: argument of the evaluation → names and patterns of layers in it; unused ones are warned of, too.
    """
    for message in (*_about_layers(result, patterns), *_about_nan(result), *_about_infinite(result)):
        warnings.warn(message, UserWarning, stacklevel=level_of_user())


def _about_layers(result: InvarianceResult, patterns: Mapping[str, Iterable[str]]) -> Iterator[str]:
    known = [*result.channel_axis, *result.left_out]
    for argument, pattern in ((argument, pattern) for argument, each in patterns.items() for pattern in each):
        if not any(pattern == layer or fnmatchcase(layer, pattern) for layer in known):
            yield (
                f"Expected argument `{argument}` to name layers that ran, but none fits {pattern!r}."
                f" {instead_of(pattern, known)}"
            )
    if result.n_skipped:
        yield f"{number_of(result.n_skipped, 'sample')} of the data are missing (None) and do not count."
    if left_out := {layer: why for layer, why in result.left_out.items() if not why.startswith(REPEATED)}:
        yield f"{_layers(len(left_out))} left out: {summary_of(left_out)}. `result.left_out` says why."
    if result.reached:
        counts = [f"{layer} ({n} of {result.n_samples})" for layer, n in result.reached.items()]
        yield f"{_layers(len(counts))} reached by some of the samples only: {some(counts)}."


def _layers(count: int) -> str:
    return f"{number_of(count, 'layer')} {'is' if count == 1 else 'are'}"


def _about_nan(result: InvarianceResult) -> Iterator[str]:
    found = []
    for measure in result:
        numbers = {layer: int(values.isnan().sum()) for layer, values in result[measure].items()}
        layers = [f"{layer} ({number})" for layer, number in numbers.items() if number]
        more = f" and {len(layers) - FEW} more layers" if len(layers) > FEW else ""
        found += [f"{measure} of {', '.join(layers[:FEW])}{more}"] if layers else []
    if found:
        yield (
            "NaN, and left out of all means, because activations are NaN or infinite or the measure is undefined there:"
            f" {'; '.join(found)}."
        )


def _about_infinite(result: InvarianceResult) -> Iterator[str]:
    """Name the layers that may look more invariant than they are, since their means leave out many units."""
    for measure in result:
        rows = [row for row in result.table(measure) if row.share_infinite > MAX_LEFT_OUT]
        if rows:
            counts = some(f"{row.layer} ({row.infinite} of {math.prod(row.shape)})" for row in rows)
            yield (
                f"{measure} is infinite, and left out of the mean of the layer, for many units of {counts}: they change"
                " with the transformation, but not with the sample."
            )
