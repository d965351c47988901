"""Assertions for tests of models: is a network as invariant as it should be?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_invariance.evaluate import evaluate
from lightning_invariance.measures import Measure, NormalizedVariance, VarianceSameEquivariance
from lightning_invariance.messages import level_of_user, number_of, some
from lightning_invariance.model.selection import Layers
from lightning_invariance.results.intervals import NOTABLE, Interval, check_confidence
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.transforms import TransformationSet

#: So many layers are named in a message.
NAMED = 5


def assert_invariant(
    model: nn.Module,
    data: Any,
    transformations: TransformationSet,
    *,
    within: float,
    layers: Layers = None,
    confidence: float = 0.95,
    measure: Measure | None = None,
    **options: Any,
) -> InvarianceResult:
    """Fail where a layer is not known to be invariant: where its upper bound is not below ``within``.

    The bound is the upper end of the confidence interval of the mean of the layer, so that too few samples fail rather
    than pass. A layer fails, too, without a finite value, or where more than 1 % of its values are infinite (units that
    change with the transformation, but not with the sample) or NaN (not those of same-equivariances, which dead feature
    maps and the mask are).

    Args:
        model: any module.
        data: samples; see :func:`~lightning_invariance.evaluate`.
        transformations: the set.
        within: the largest value that is accepted, in units of the measure; of the normalised variance 1 is as much as
            samples differ, and 0 exact invariance.
        layers: which layers; by default every leaf.
        confidence: of the intervals.
        measure: by default ``NormalizedVariance(response=True)``; lower must be more invariant.
        options: other arguments of :func:`~lightning_invariance.evaluate`, such as ``max_samples``.

    Returns:
        The result, for those who want to see more.

    Raises:
        AssertionError: If it is not; with the first layers that fail, their intervals, and the transformation that
            changes them most.
        ValueError: If an argument is out of its range, or the measure has no intervals or higher is more invariant.

    Example:
        >>> import torch
        >>> from lightning_invariance import quarter_turns
        >>> from lightning_invariance.testing import assert_invariant
        >>> pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))
        >>> _ = assert_invariant(pool, torch.rand(16, 3, 6, 6), quarter_turns(), within=0.01)
    """
    chosen = NormalizedVariance(response=True) if measure is None else measure
    return _assert_below(model, data, transformations, within, layers, confidence, chosen, "invariant", options)


def assert_equivariant(
    model: nn.Module,
    data: Any,
    transformations: TransformationSet,
    *,
    within: float,
    layers: Layers = None,
    confidence: float = 0.95,
    measure: Measure | None = None,
    **options: Any,
) -> InvarianceResult:
    """Fail where feature maps are not known to move as the input does: where the upper bound is not below ``within``.

    As :func:`assert_invariant`, by default with ``VarianceSameEquivariance(mask=True)``, which leaves out pixels that
    leave the frame. Layers without feature maps are left out. Where transformations interpolate, even the identity is
    above 0: ``result.floor`` says how much.

    Args:
        model: any module.
        data: samples.
        transformations: the set, with inverses.
        within: the largest value that is accepted.
        layers: which layers; by default every leaf.
        confidence: of the intervals.
        measure: of same-equivariance.
        options: other arguments of :func:`~lightning_invariance.evaluate`.

    Returns:
        The result.

    Raises:
        AssertionError: If it is not; see :func:`assert_invariant`.
        ValueError: If an argument is out of its range, or the transformations have no inverses.

    Example:
        >>> import torch
        >>> from lightning_invariance import quarter_turns
        >>> from lightning_invariance.testing import assert_equivariant
        >>> relu = torch.nn.Sequential(torch.nn.ReLU())
        >>> _ = assert_equivariant(relu, torch.randn(16, 3, 6, 6), quarter_turns(), within=1e-9)
    """
    chosen = VarianceSameEquivariance(mask=True) if measure is None else measure
    return _assert_below(model, data, transformations, within, layers, confidence, chosen, "equivariant", options)


def _assert_below(
    model: nn.Module,
    data: Any,
    transformations: TransformationSet,
    within: float,
    layers: Layers,
    confidence: float,
    measure: Measure,
    what: str,
    options: dict[str, Any],
) -> InvarianceResult:
    check_confidence(confidence)
    if not within >= 0:
        raise ValueError(f"Expected argument `within` to be at least 0, but got {within}.")
    if not measure.has_intervals or measure.higher_is_better is not False:
        raise ValueError(
            "Expected argument `measure` to be one with intervals of which lower is more invariant, such as"
            f" NormalizedVariance(), but got {measure!r}."
        )
    name = type(measure).__name__
    result = evaluate(model, data, transformations, {name: measure}, layers=layers, confidence=confidence, **options)
    if not (values := result[name]):
        raise AssertionError(f"Expected a layer for which {name} is defined, but there is none.")
    intervals = result.interval(name) if name in result.influences else {}
    left_out = {
        row.layer: row.share_infinite if measure.has_floor else row.share_left_out for row in result.table(name)
    }
    silent = [layer for layer in values if layer in result.dead and bool(result.dead[layer].all())]
    if silent:
        warnings.warn(
            f"{number_of(len(silent), 'layer')} never changed, which says nothing of invariance: {some(silent)}.",
            UserWarning,
            stacklevel=level_of_user(),
        )
    failed = {
        layer: intervals.get(layer)
        for layer in values
        if left_out[layer] > NOTABLE or not _is_below(intervals.get(layer), within)
    }
    if failed:
        responses, identity = result.response.get(name, {}), transformations.identity
        shown = [
            _told(result, layer, interval, responses.get(layer, []), identity)
            for layer, interval in list(failed.items())[:NAMED]
        ]
        more = [f"  and {len(failed) - NAMED} more layers"] if len(failed) > NAMED else []
        are = "is" if len(failed) == 1 else "are"
        raise AssertionError(
            f"Expected layers to be {what}: {name} below {within:g} with {confidence:.0%} confidence,"
            f" but of {number_of(len(values), 'layer')} {len(failed)} {are} not:\n" + "\n".join([*shown, *more])
        )
    return result


def _is_below(interval: Interval | None, within: float) -> bool:
    return interval is not None and (interval.high < within or interval.high == within == 0)


def _told(
    result: InvarianceResult, layer: str, interval: Interval | None, response: Sequence[float], identity: int | None
) -> str:
    """A line about a layer: its interval, and which transformation but the identity changes it most."""
    about = f"  {layer}: {'no finite value' if interval is None else interval}"
    changes = {j: value for j, value in enumerate(response) if j != identity and math.isfinite(value)}
    if changes:
        worst = max(changes, key=changes.__getitem__)
        about += f"; most by {result.transformations[worst]} ({changes[worst]:.4g})"
    return about
