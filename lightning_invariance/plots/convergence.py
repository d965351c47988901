"""How many samples and transformations a measure needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lightning_invariance.plots.bars import key_of_layers, room_of_key
from lightning_invariance.plots.common import NUMBERS, axes_at, depth_colours, first_measure, new_figure
from lightning_invariance.plots.labels import in_legend
from lightning_invariance.results.result import InvarianceResult


def convergence(results: InvarianceResult | Sequence[InvarianceResult], measure: str | None = None) -> Figure:
    """How many samples, or transformations, are enough? The mean of each layer against their number.

    On the left the values, on the right their error relative to the value of the largest number; the dashed line is
    the mean error of all layers. The paper found 5,000 to 10,000 samples to be enough (section 3).

    Args:
        results: one evaluation with ``convergence=True``, or several with different numbers of transformations (or of
            samples).
        measure: its name; by default the first.

    Raises:
        ValueError: If there are fewer than two numbers to compare.
    """
    if isinstance(results, InvarianceResult):
        measure = measure or first_measure([results])
        found = results.convergence.get(measure, {})
        what, lines = "samples", {layer: dict(sorted(values.items())) for layer, values in found.items()}
    else:
        measure = measure or first_measure(results)
        what = "transformations" if len({len(r.transformations) for r in results}) > 1 else "samples"
        numbers = [len(r.transformations) if what == "transformations" else r.n_samples for r in results]
        ordered = sorted(zip(numbers, results, strict=True), key=lambda pair: pair[0])
        lines = {layer: {n: r.per_layer(measure)[layer] for n, r in ordered} for layer in results[0][measure]}
    if not lines or len(next(iter(lines.values()))) < 2:
        raise ValueError(
            "Expected a result of `evaluate(..., convergence=True)`, or several results of different numbers of"
            f" transformations or samples, but there is one value of {measure} at most."
        )
    x = np.array([*next(iter(lines.values()))])
    values = np.array([[*line.values()] for line in lines.values()])
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.abs(values[:, :-1] / values[:, -1:] - 1)
    figure = new_figure(10, 4.2, layout=None)
    width = (10 - room_of_key([*lines])) / 2 - NUMBERS - 0.05
    left, right = (axes_at(figure, NUMBERS + i * (width + NUMBERS + 0.1), 0.5, width, 3.6) for i in range(2))
    for row, error, colour, layer in zip(values, errors, depth_colours(len(lines)), lines, strict=True):
        left.plot(x, row, "o-", color=colour, ms=3, linewidth=1.2, label=in_legend(layer))
        right.plot(x[:-1], error, "o-", color=colour, ms=3, linewidth=1.2)
    known = np.isfinite(errors).all(1)
    if known.any():
        right.plot(x[:-1], errors[known].mean(0), "ko--", ms=4, linewidth=2, label="mean of all layers")
        right.legend(fontsize="small")
    for axes, label in ((left, f"{measure}, mean of the layer"), (right, f"error relative to {x[-1]} {what}")):
        axes.set_xscale("log", base=2)
        ticks = x if axes is left else x[:-1]
        axes.set_xticks(ticks, map(str, ticks.tolist()))
        axes.minorticks_off()
        axes.set_xlabel(f"number of {what}")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if (errors[known] > 0).any():
        right.set_yscale("log")
    key_of_layers([left, right], [*lines])
    return figure
