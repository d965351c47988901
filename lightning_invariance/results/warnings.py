"""What a user is told of a result without asking: what is missing in it, and where a mean leaves much out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

from lightning_invariance.messages import FEW, instead_of, level_of_user, number_of, some
from lightning_invariance.model.selection import summary_of
from lightning_invariance.results.intervals import NOTABLE
from lightning_invariance.results.result import InvarianceResult


def warn_of(result: InvarianceResult, channel_axes: Iterable[str] = ()) -> None:
    """Warn of layers that are left out or that some samples did not reach, and of NaN and infinite values.

    Args:
        result: of an evaluation.
        channel_axes: the layers, or patterns, that the user named axes of.
    """
    _warn_of_unused(result, channel_axes)
    for warn in (_warn_of_left_out, _warn_of_reached, _warn_of_nan, _warn_of_infinite):
        warn(result)


def _warn_of_unused(result: InvarianceResult, channel_axes: Iterable[str]) -> None:
    known = [*result.channel_axis, *result.left_out]
    for pattern in channel_axes:
        if not any(pattern == layer or fnmatchcase(layer, pattern) for layer in known):
            warnings.warn(
                f"Expected argument `channel_axis` to name layers that ran, but none fits {pattern!r}."
                f" {instead_of(pattern, known)}",
                UserWarning,
                stacklevel=level_of_user(),
            )


def _warn_of_left_out(result: InvarianceResult) -> None:
    if result.left_out:
        warnings.warn(
            f"{_layers(len(result.left_out))} left out: {summary_of(result.left_out)}. `result.left_out` says why.",
            UserWarning,
            stacklevel=level_of_user(),
        )


def _warn_of_reached(result: InvarianceResult) -> None:
    if result.reached:
        counts = [f"{layer} ({n} of {result.n_samples})" for layer, n in result.reached.items()]
        warnings.warn(
            f"{_layers(len(counts))} reached by some of the samples only: {some(counts)}.",
            UserWarning,
            stacklevel=level_of_user(),
        )


def _layers(count: int) -> str:
    return f"{number_of(count, 'layer')} {'is' if count == 1 else 'are'}"


def _warn_of_infinite(result: InvarianceResult) -> None:
    """Tell where a mean leaves out so much that a layer may look more invariant than it is."""
    for measure in result:
        rows = [row for row in result.table(measure) if row.share_infinite > NOTABLE]
        if rows:
            counts = some(f"{row.layer} ({row.infinite} of {math.prod(row.shape)})" for row in rows)
            warnings.warn(
                f"{measure} is infinite, and left out of the mean of the layer, for many units of {counts}: they change"
                " with the transformation, but not with the sample.",
                UserWarning,
                stacklevel=level_of_user(),
            )


def _warn_of_nan(result: InvarianceResult) -> None:
    found = []
    for measure in result:
        numbers = {layer: int(values.isnan().sum()) for layer, values in result[measure].items()}
        layers = [f"{layer} ({number})" for layer, number in numbers.items() if number]
        more = f" and {len(layers) - FEW} more layers" if len(layers) > FEW else ""
        found += [f"{measure} of {', '.join(layers[:FEW])}{more}"] if layers else []
    if found:
        warnings.warn(
            "NaN, and left out of all means, because activations are NaN or infinite or the measure is undefined there:"
            f" {'; '.join(found)}.",
            UserWarning,
            stacklevel=level_of_user(),
        )
