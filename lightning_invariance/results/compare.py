"""Test whether two evaluations differ by more than chance, layer by layer and for the network."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_invariance.messages import given, number_of, some
from lightning_invariance.results.comparison import Comparison, Difference
from lightning_invariance.results.intervals import (
    check_confidence,
    influences_of_all,
    interval_of,
    network_influences,
    one_sided,
    p_value,
    t_quantile,
)
from lightning_invariance.results.result import InvarianceResult

#: Smaller relative differences come from rounding alone, such as by another order of samples.
ROUNDING = 1e-6

#: A result, or the path of its file; or several, such as one for each seed.
Results: TypeAlias = InvarianceResult | str | os.PathLike[str] | Sequence[InvarianceResult | str | os.PathLike[str]]

#: A layer of the first result, and layers of the second with their weights.
_Pair: TypeAlias = tuple[str, dict[str, float]]


def compare(
    a: Results,
    b: Results,
    measure: str | None = None,
    *,
    confidence: float = 0.95,
    margin: float | None = None,
    align: str = "name",
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Compare two evaluations, such as two networks, two epochs or two files, layer by layer.

    Two results made with ``evaluate(..., confidence=...)`` are compared over samples: by a paired test where the
    samples are equal, which is much more sensitive, and otherwise by an unpaired test. Several results on each side,
    such as one for each seed, are compared over seeds by Welch's test: only this shows whether a training method makes
    a difference, not just whether two trained networks differ. It needs no influences.

    Args:
        a: a result, the path of its file, or several.
        b: a result, a path, or several, as for ``a``.
        measure: its name; by default the first of the first result.
        confidence: of the intervals, in (0, 1); 1 − confidence is the level of the tests.
        margin: the largest difference that does not matter, in units of the measure: also tests whether layers are
            equivalent, and whether a is not less invariant than b by so much (one-sided t-tests).
        align: ``"name"`` compares layers of one name; ``"depth"`` layers of one type at one relative depth, where for
            each layer of a the value of b is interpolated between its two nearest layers of this type.
        names: of the two, in tables, pictures and :attr:`Comparison.verdict`.

    Returns:
        Intervals and p-values for each layer and for the network; prints as a table, the result in one sentence first.
        The row of the network's input is left out.

    Raises:
        ValueError: If the results have no influences (and are not several), no common layers, or different
            transformations or measures, or if an argument is out of its range.

    Example:
        >>> import torch
        >>> from lightning_invariance import compare, evaluate, quarter_turns
        >>> x, network = torch.rand(16, 1, 6, 6), torch.nn.Conv2d(1, 2, 3)
        >>> results = [evaluate(torch.nn.Sequential(network), x, quarter_turns(), confidence=0.95) for _ in range(2)]
        >>> compare(*results)["0"].difference
        0.0
    """
    check_confidence(confidence)
    if margin is not None and not margin >= 0:
        raise ValueError(f"Expected argument `margin` to be at least 0, but got {margin}.")
    if align not in ("name", "depth"):
        raise ValueError(f'Expected argument `align` to be "name" or "depth", but got {align!r}.')
    first, second = _loaded(a), _loaded(b)
    if (len(first) == 1) != (len(second) == 1):
        raise ValueError(
            f"Expected one result of each, or several of each, but got {len(first)} and {len(second)}: seeds are"
            " compared with seeds."
        )
    measure = measure or first[0].measures[0]
    _check_alike([*first, *second], measure)
    pairs, unmatched = aligned_layers(first, second, measure, align)
    better = first[0].higher_is_better.get(measure)
    test = _Test(confidence, margin, better)
    if len(first) > 1:
        rows, network = _over_seeds(first, second, measure, pairs, test)
        unit, count = "seeds", (len(first), len(second))
    else:
        rows, network, unit = _over_samples(first[0], second[0], measure, pairs, test)
        count = len(first[0].sample_keys[measure]), len(second[0].sample_keys[measure])
    found = measure, rows, network, unit, count, confidence, margin, unmatched, better
    return Comparison(*found, (str(names[0]), str(names[1])), first[0].quality(measure))


@dataclass(frozen=True)
class _Test:
    confidence: float
    margin: float | None
    higher_is_better: bool | None

    def row(self, layer: str, a: float, b: float, error: float, freedom: float, doubt: str = "") -> Difference:
        """Test the difference of two values, given its standard error."""
        difference = b - a
        error = max(error, ROUNDING * max(abs(a), abs(b)))  # NaN stays NaN
        half = t_quantile(self.confidence, freedom) * error if math.isfinite(error) else math.nan
        p = p_value(difference, error, freedom)
        row = Difference(layer, a, b, difference, difference - half, difference + half, p, doubt=doubt)
        if self.margin is None:
            return row
        below = one_sided(self.margin - difference, error, freedom)  # of b − a ≥ margin
        above = one_sided(self.margin + difference, error, freedom)  # of b − a ≤ −margin
        not_worse = math.nan if self.higher_is_better is None else below if self.higher_is_better else above
        return replace(row, equivalent=max(below, above), not_worse=not_worse)


def _over_samples(
    a: InvarianceResult, b: InvarianceResult, measure: str, pairs: Sequence[_Pair], test: _Test
) -> tuple[list[Difference], Difference, str]:
    """Compare layers and networks over samples; also return the unit of the comparison."""
    intervals = a.interval(measure), b.interval(measure)
    order = _matching(a.sample_keys[measure], b.sample_keys[measure])
    of_a = {layer: _influences(a, measure, {layer: 1.0}) for layer, _ in pairs}
    of_b = {layer: _influences(b, measure, parts) for layer, parts in pairs}
    if order is not None:
        of_b = {layer: psi[order] for layer, psi in of_b.items()}
    means, other_means = a.per_layer(measure), b.per_layer(measure)
    if a.n_samples != b.n_samples:  # else both have the same bias
        means, other_means = (each.without_bias(measure) for each in (a, b))
    rows = []
    for layer, parts in pairs:
        error, freedom, doubt = _error(of_a[layer], of_b[layer], order is not None)
        doubts = [_other_shape(a, b, measure, layer) if parts == {layer: 1.0} else ""]
        for found, names in zip(intervals, ([layer], parts), strict=True):
            doubts += [found[name].doubt if name in found else "undefined" for name in names]
        value = sum(w * other_means[name] for name, w in parts.items())
        rows.append(test.row(layer, means[layer], value, error, freedom, next(filter(None, [*doubts, doubt]), "")))
    known = [row for row in rows if math.isfinite(row.low)]
    psi_a, psi_b = (network_influences(of[row.layer] for row in known) for of in (of_a, of_b))
    error, freedom, doubt = _error(psi_a, psi_b, order is not None)
    missing = f"without {number_of(len(rows) - len(known), 'layer')}" if len(known) < len(rows) else ""
    doubt = missing or doubt or intervals[0].network.doubt or intervals[1].network.doubt
    mean_a, mean_b = (sum(v) / len(v) if v else math.nan for v in ([r.a for r in known], [r.b for r in known]))
    network = test.row("network", mean_a, mean_b, error, freedom, doubt)
    return rows, network, _unpaired(a, b, measure) if order is None else "the same samples"


def _other_shape(a: InvarianceResult, b: InvarianceResult, measure: str, layer: str) -> str:
    """Doubt that layers of one name correspond, if their shapes differ."""
    one, other = (next(row.shape for row in each.table(measure) if row.layer == layer) for each in (a, b))
    return "" if one == other else f"shapes {one}, {other}"


def _influences(result: InvarianceResult, measure: str, parts: dict[str, float]) -> Tensor:
    """Sum the weighted influences of all samples on some layers; NaN if one of the layers has none."""
    none = torch.full((len(result.sample_keys[measure]),), torch.nan, dtype=torch.float64)
    found = result.influences[measure]
    return torch.stack([w * influences_of_all(found.get(name, none)) for name, w in parts.items()]).sum(0)


def _unpaired(a: InvarianceResult, b: InvarianceResult, measure: str) -> str:
    """Name the unit of results that cannot be paired. The key of a group is the sum of the keys of its samples."""
    keys = [result.sample_keys[measure] for result in (a, b)]
    grouped = any(len(each) < result.n_samples for each, result in zip(keys, (a, b), strict=True))
    same = a.n_samples == b.n_samples and int(keys[0].sum()) == int(keys[1].sum())
    return "other groups of the same samples" if grouped and same else "different samples"


def _error(a: Tensor, b: Tensor, paired: bool) -> tuple[float, float, str]:
    """Compute the standard error of a difference of means, its degrees of freedom, and a doubt."""
    if paired:
        found = interval_of(0.0, b - a, 0.5)
        return found.standard_error, found.freedom, found.doubt
    both = interval_of(0.0, a, 0.5), interval_of(0.0, b, 0.5)
    return (*_welch([(each.standard_error, each.freedom) for each in both]), both[0].doubt or both[1].doubt)


def _welch(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Compute the standard error of a difference, and its degrees of freedom by Welch and Satterthwaite."""
    squares = sum(error**2 for error, _ in parts)
    fourths = sum(error**4 / freedom for error, freedom in parts)
    return math.sqrt(squares), squares**2 / fourths if fourths > 0 else sum(freedom for _, freedom in parts)


def _over_seeds(
    first: Sequence[InvarianceResult],
    second: Sequence[InvarianceResult],
    measure: str,
    pairs: Sequence[_Pair],
    test: _Test,
) -> tuple[list[Difference], Difference]:
    """Compare layers and networks by Welch's test, with one mean for each result."""
    equal = len({result.n_samples for result in (*first, *second)}) == 1  # then all have the same bias
    means, other_means = (
        [result.per_layer(measure) if equal else result.without_bias(measure) for result in results]
        for results in (first, second)
    )
    values = {
        layer: (
            torch.tensor([of[layer] for of in means], dtype=torch.float64),
            torch.tensor([sum(w * of[n] for n, w in parts.items()) for of in other_means], dtype=torch.float64),
        )
        for layer, parts in pairs
    }
    rows = [_row_of_seeds(layer, a, b, test) for layer, (a, b) in values.items()]
    finite = [v for v in values.values() if bool(torch.cat(v).isfinite().all())]
    if not finite:
        return rows, test.row("network", math.nan, math.nan, math.nan, 1.0)
    of_a, of_b = (torch.stack([v[i] for v in finite]).mean(0) for i in (0, 1))
    return rows, _row_of_seeds("network", of_a, of_b, test)


def _row_of_seeds(layer: str, a: Tensor, b: Tensor, test: _Test) -> Difference:
    parts = [(float(each.std()) / math.sqrt(len(each)), len(each) - 1.0) for each in (a, b)]
    return test.row(layer, float(a.mean()), float(b.mean()), *_welch(parts))


def _matching(a: Tensor, b: Tensor) -> Tensor | None:
    """Return the position in b of each key of a, ``(samples,)``; None if their keys differ."""
    (sorted_a, from_a), (sorted_b, from_b) = a.sort(stable=True), b.sort(stable=True)
    if not torch.equal(sorted_a, sorted_b):
        return None
    order = torch.empty_like(from_a)
    order[from_a] = from_b
    return order


def _layers_of(results: Sequence[InvarianceResult], measure: str) -> list[str]:
    """Return the layers that all results have."""
    layers = [layer for layer in results[0][measure] if layer != results[0].input_layer]
    return [layer for layer in layers if all(layer in result[measure] for result in results)]


def aligned_layers(
    first: Sequence[InvarianceResult], second: Sequence[InvarianceResult], measure: str, align: str
) -> tuple[list[_Pair], list[str]]:
    """Pair the layers of two networks; also return the layers without a partner.

    Raises:
        ValueError: If no layer has a partner.
    """
    own, others = _layers_of(first, measure), _layers_of(second, measure)
    if align == "depth":
        types, other_types = first[0].layer_types, second[0].layer_types
        places, pairs = _depths(others), []
        for layer, depth in _depths(own).items():
            alike = {o: d for o, d in places.items() if other_types.get(o, "") == types.get(layer, "")}
            if parts := _nearest(alike, depth):
                pairs.append((layer, parts))
        paired = {name for layer, parts in pairs for name in (layer, *parts)}
    else:
        pairs = [(layer, {layer: 1.0}) for layer in own if layer in others]
        paired = {layer for layer, _ in pairs}
    if not pairs:
        common = "layers of one type" if align == "depth" else "layers in common"
        hint = "" if align == "depth" else ': write `align="depth"`'
        raise ValueError(f"Expected results with {common}, but they have none{hint}.")
    unmatched = [layer for layer in own if layer not in paired]
    return pairs, unmatched + [layer for layer in others if layer not in paired and align == "name"]


def _depths(layers: Sequence[str]) -> dict[str, float]:
    """Return the relative depth of each layer: 0 for the first, 1 for the last."""
    return {layer: i / (len(layers) - 1) if len(layers) > 1 else 1.0 for i, layer in enumerate(layers)}


def _nearest(places: dict[str, float], depth: float) -> dict[str, float]:
    """Return the layers around a depth, with the weights of a linear interpolation; none if there is no layer."""
    below = [layer for layer, place in places.items() if place <= depth]
    above = [layer for layer, place in places.items() if place > depth]
    if not below or not above:
        return dict.fromkeys([*below[-1:], *above[:1]], 1.0)
    start, end = places[below[-1]], places[above[0]]
    weight = (depth - start) / (end - start)
    return {below[-1]: 1 - weight, above[0]: weight} if weight > ROUNDING else {below[-1]: 1.0}


def _loaded(results: Results) -> list[InvarianceResult]:
    several: list[Any] = list(results) if isinstance(results, list | tuple) else [results]
    for each in several:
        if not isinstance(each, InvarianceResult | str | os.PathLike):
            raise TypeError(
                f"Expected results of `evaluate`, paths of their files, or lists of them, but got {given(each)}."
            )
    if not several:
        raise ValueError("Expected at least one result of each, but got none.")
    return [each if isinstance(each, InvarianceResult) else InvarianceResult.load(each) for each in several]


def _check_alike(results: Sequence[InvarianceResult], measure: str) -> None:
    for result in results:
        if measure not in result:
            raise ValueError(f"Expected results of {measure}, but one has {', '.join(result)} only.")
        if result.transformations != results[0].transformations:
            raise ValueError(
                f"Expected results of the same transformations, but got {some(results[0].transformations)} and"
                f" {some(result.transformations)}."
            )
        other = [name for name, values in result.parameters.items() if results[0].parameters.get(name) != values]
        if result.parameters.keys() != results[0].parameters.keys() or other:
            raise ValueError(
                "Expected results of the same transformations, but got other parameters:"
                f" {_parameters(results[0])} and {_parameters(result)}."
            )
        units = [each.units.get(measure, "") or "no unit" for each in (results[0], result)]
        if units[0] != units[1] and "distance" not in units:  # of a distance that is a function of the user
            raise ValueError(
                f"Expected results of {measure} with the same arguments, such as `squared`, but got values"
                f" in units of {units[0]} and of {units[1]}."
            )


def _parameters(result: InvarianceResult) -> str:
    return ", ".join(f"{name} {some(f'{value:g}' for value in values)}" for name, values in result.parameters.items())
