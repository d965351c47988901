"""Convergence of a measure with the number of samples or transformations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_invariance.plots.common import depth_colours, first_measure, key_of_layers, new_figure, only_one
from lightning_invariance.plots.labels import in_legend, wrap
from lightning_invariance.results.result import InvarianceResult


def convergence(results: Sequence[InvarianceResult], measure: str | None = None) -> Figure:
    """How many samples, or transformations, are enough? The mean of each layer against their number.

    On the left the values, on the right their error relative to the value of the largest number; the dashed line is
    the mean error of all layers. The paper found 5,000 to 10,000 samples to be enough (section 3).

    Args:
        results: evaluations of one network with different numbers of samples, such as ``max_samples=1000`` and 10000,
            or of transformations.
        measure: its name; by default the first.

    Raises:
        TypeError: If it is one result.
        ValueError: If there are fewer than two numbers to compare.
    """
    if isinstance(results, InvarianceResult):
        raise TypeError(
            "Expected argument `results` to be a sequence of results, but got one: evaluate with several `max_samples`,"
            " or numbers of transformations."
        )
    results = [only_one(result) for result in results]
    what = "transformations" if len({len(result.transformations) for result in results}) > 1 else "samples"
    by_number = {len(r.transformations) if what == "transformations" else r.n_samples: r for r in results}
    if len(by_number) < 2:
        raise ValueError(
            "Expected argument `results` to hold evaluations with different numbers of samples or transformations, but"
            f" there {'is one number' if by_number else 'are none'}."
        )
    measure = measure or first_measure(results)
    x = np.array(sorted(by_number))
    means = [by_number[number].per_layer(measure) for number in x.tolist()]
    layers = [layer for layer in means[0] if all(layer in each for each in means)]
    values = np.array([[each[layer] for each in means] for layer in layers]).reshape(len(layers), len(x))
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.abs(values[:, :-1] / values[:, -1:] - 1)
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    for row, error, colour, layer in zip(values, errors, depth_colours(len(layers)), layers, strict=True):
        left.plot(x, row, "o-", color=colour, ms=3, linewidth=1.2, label=in_legend(layer))
        right.plot(x[:-1], error, "o-", color=colour, ms=3, linewidth=1.2)
    known = np.isfinite(errors).all(1)
    if known.any():
        right.plot(x[:-1], errors[known].mean(0), "ko--", ms=4, linewidth=2, label="mean of all layers")
        right.legend(fontsize="small")
    for axes, ticks, label in (
        (left, x, f"{measure}, mean of the layer"),
        (right, x[:-1], f"error relative to {x[-1]} {what}"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, map(str, ticks.tolist()))
        axes.minorticks_off()
        axes.set_xlabel(f"number of {what}")
        axes.set_ylabel(wrap(label, 3.5))
        axes.grid(alpha=0.3)
    if (errors[known] > 0).any():
        right.set_yscale("log")
    key_of_layers(figure, [left, right], layers)
    return figure
