"""Assertions that a model is invariant or same-equivariant."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lightning_invariance.evaluate import evaluate
from lightning_invariance.measures import ChannelEquivariance, Measure, NormalizedVariance, VarianceSameEquivariance
from lightning_invariance.messages import level_of_user, number_of, some
from lightning_invariance.model.selection import Layers
from lightning_invariance.results.intervals import MAX_LEFT_OUT, Interval, check_confidence
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.results.table import LayerStatistics, Worst
from lightning_invariance.transforms import TransformationSet

#: Maximal number of layers listed in an error.
MAX_LISTED = 5


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
    """Assert that the upper confidence bound of every layer is below ``within``.

    The bound is the upper end of the confidence interval of the mean of the layer, so that too few samples fail rather
    than pass. Layers without a finite value also fail, and layers where more than 1 % of the values are infinite
    (activations that change with the transformation alone) or NaN (except for same-equivariance, where dead feature
    maps and masked pixels are NaN).

    Args:
        model: any module.
        data: samples; see :func:`~lightning_invariance.evaluate`.
        transformations: the transformation set.
        within: bound of the measure, in its unit; for the normalised variance 0 is exact invariance, and at 1
            transformations matter as much as samples do.
        layers: which layers; by default every leaf module.
        confidence: confidence level of the intervals.
        measure: a measure with intervals; by default ``NormalizedVariance(response=True)``. Where higher is more
            invariant, at most 1, the bound is of 1 − value.
        options: other arguments of :func:`~lightning_invariance.evaluate`, such as ``max_samples``.

    Returns:
        The result of the evaluation.

    Raises:
        AssertionError: If a layer fails; lists the first such layers with their intervals and the transformation that
            changes each most.
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_invariance import quarter_turns
        >>> from lightning_invariance.testing import assert_invariant
        >>> pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))
        >>> _ = assert_invariant(pool, torch.rand(16, 3, 6, 6), quarter_turns(), within=0.01)
    """
    chosen = NormalizedVariance(response=True) if measure is None else measure
    options |= {"model": model, "data": data, "layers": layers}
    return _assert_below("invariant", chosen, within, confidence, transformations, options)


def assert_equivariant(
    model: nn.Module,
    data: Any,
    transformations: TransformationSet,
    *,
    within: float,
    layers: Layers = None,
    confidence: float = 0.95,
    measure: Measure | None = None,
    channels: str | None = None,
    **options: Any,
) -> InvarianceResult:
    """Assert that the upper confidence bound of the same-equivariance of every layer is below ``within``.

    Arguments, result and errors are as for :func:`assert_invariant`. The default measure is
    ``VarianceSameEquivariance(mask=True)``, which excludes pixels that leave the frame; it needs transformations with
    inverses, and excludes layers without feature maps. Where transformations interpolate, even the identity network is
    above 0; its value is ``result.floor``. With ``channels="permutation"`` (or ``"identity"``) the measure is
    :class:`~lightning_invariance.measures.ChannelEquivariance`: what may remain unexplained, 1 − R², is below
    ``within``. Give ``vectors={"layer": axis}`` for layers with vectors that turn.

    Example:
        >>> import torch
        >>> from lightning_invariance import quarter_turns
        >>> from lightning_invariance.testing import assert_equivariant
        >>> relu = torch.nn.Sequential(torch.nn.ReLU())
        >>> _ = assert_equivariant(relu, torch.randn(16, 3, 6, 6), quarter_turns(), within=1e-9)
    """
    if channels is not None and measure is not None:
        raise ValueError(
            f"Expected one of the arguments `measure` and `channels`, but got {measure!r} and {channels!r}."
        )
    default = VarianceSameEquivariance(mask=True) if channels is None else ChannelEquivariance(channels=channels)
    chosen = default if measure is None else measure
    options |= {"model": model, "data": data, "layers": layers}
    return _assert_below("equivariant", chosen, within, confidence, transformations, options)


def _assert_below(
    what: str,
    measure: Measure,
    within: float,
    confidence: float,
    transformations: TransformationSet,
    options: dict[str, Any],
) -> InvarianceResult:
    check_confidence(confidence)
    if not within >= 0:
        raise ValueError(f"Expected argument `within` to be at least 0, but got {within}.")
    if not measure.has_intervals or measure.higher_is_better is None:
        raise ValueError(
            "Expected argument `measure` to be one with intervals and a direction, such as NormalizedVariance(), but"
            f" got {measure!r}."
        )
    name = type(measure).__name__
    result = evaluate(transformations=transformations, measures={name: measure}, confidence=confidence, **options)
    if not (values := [layer for layer in result[name] if layer != result.input_layer]):
        raise AssertionError(f"Expected a layer for which {name} is defined, but got none.")
    intervals = result.interval(name) if name in result.influences else {}
    left_out = {
        row.layer: row.share_infinite if measure.has_floor else row.share_left_out for row in result.table(name)
    }
    constant = [layer for layer in values if layer in result.dead and bool(result.dead[layer].all())]
    if constant:
        warnings.warn(
            f"{number_of(len(constant), 'layer')} never changed, which says nothing of invariance: {some(constant)}.",
            UserWarning,
            stacklevel=level_of_user(),
        )
    failed = {
        layer: intervals.get(layer)
        for layer in values
        if left_out[layer] > MAX_LEFT_OUT or not _is_within(intervals.get(layer), within, measure)
    }
    if failed:
        rows = {row.layer: row for row in result.table(name)}
        worst = {each.layer: each for each in result.worst(name)} if name in result.response else {}
        listed = list(failed.items())[:MAX_LISTED]
        lines = [_line(rows[layer], interval, worst.get(layer)) for layer, interval in listed]
        if len(failed) > MAX_LISTED:
            lines.append(f"  and {len(failed) - MAX_LISTED} more layers")
        are = "is" if len(failed) == 1 else "are"
        bound = f"above {1 - within:g}" if measure.higher_is_better else f"below {within:g}"
        raise AssertionError(
            f"Expected layers to be {what}: {name} {bound} with {confidence:.0%} confidence,"
            f" but of {number_of(len(values), 'layer')} {len(failed)} {are} not:\n" + "\n".join(lines)
        )
    return result


def _is_within(interval: Interval | None, within: float, measure: Measure) -> bool:
    """Whether the bound of an interval is within a distance of the best value, 0 or 1."""
    if interval is None:
        return False
    distance = 1 - interval.low if measure.higher_is_better else interval.high
    return distance < within or distance == within == 0


def _line(row: LayerStatistics, interval: Interval | None, worst: Worst | None) -> str:
    """Describe a layer by its interval, the mean of its live units, and the transformation that changes it most."""
    line = f"  {row.layer}: {'no finite value' if interval is None else interval}"
    if row.share_dead > MAX_LEFT_OUT:
        line += f"; without the {row.share_dead:.0%} dead units {row.live_mean:.4g}"
    return line if worst is None else f"{line}; most by {worst.label} ({worst.value:.4g})"
