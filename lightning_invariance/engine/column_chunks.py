"""Variances of transformation sets whose column means do not fit into memory: ordinary walks over parts of the matrix.

The ST matrix is cut into chunks of columns, which give the sample variance, and its transpose into chunks of samples:
there samples take the place of transformations, and the sample variance of the transpose is the transformation
variance. Each chunk is one ordinary walk, so that memory does not grow with the number of transformations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_invariance.data.batches import select_samples, takes_batch
from lightning_invariance.data.loader import STBlock, STLoader
from lightning_invariance.distributed import errors_shared, rank_and_world_size
from lightning_invariance.engine.budget import OverBudgetError
from lightning_invariance.engine.collect import collect, make_result
from lightning_invariance.engine.walk import Walk
from lightning_invariance.measures import SampleVariance
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.measures.variance import MeasureOfVariances
from lightning_invariance.model.hooks import transformed_input
from lightning_invariance.random_state import isolated_random_state
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.transforms import TransformationSet

#: Bytes of an activation beside its column means, and of a column: a mean in float64 and the new one that takes its
#: place; for standard deviations also the squared deviations of a column.
VECTORS, MEAN, SPREAD = 64, 16, 8

NOT_ALL = "ragged: not every sample reaches it"


def in_column_chunks(
    walk: Walk, measures: Mapping[str, Metric], loader: STLoader, over: OverBudgetError
) -> InvarianceResult:
    """Compute variance measures within a budget of memory, with twice as many forward passes as one walk.

    Args:
        walk: the model and its data.
        measures: name → TransformationVariance, SampleVariance or NormalizedVariance.
        loader: the blocks of all transformations.
        over: what one walk would take.

    Raises:
        ValueError: If there is another measure, the budget is too small for one transformation at a time, the
            evaluation has intervals or outputs, or several processes hold other samples each.
    """
    of_variances = _checked(walk, measures, loader, over)
    kinds = {measure.squared for measure in of_variances.values()}
    each = sum(MEAN + (0 if squared else SPREAD) for squared in kinds)
    columns = (over.budget // max(1, over.activations) - VECTORS * len(kinds)) // each
    if columns < 1:
        raise ValueError(
            f"Expected argument `state_budget` to be larger, but got {over.budget} bytes: {over.activations}"
            f" activations take at least {over.activations * (VECTORS * len(kinds) + each)}."
        )
    columns = min(columns, walk.batch_size)
    options = replace(walk.options, state_budget=None, batch_size=walk.batch_size, include_input=False)
    by_kind = {str(squared): SampleVariance(squared) for squared in kinds}
    by_columns = _over_columns(Walk(walk.model, walk.data, options), by_kind, loader.transformations, columns)
    sv, about = _mean(by_columns)
    tv, about_rows = _mean(_over_samples(walk, by_kind, loader.transformations, columns))
    some = next(iter(by_kind))
    layers = [layer for layer in sv[some] if layer in tv[some]]
    axes = {layer: about.channel_axis[layer] for layer in layers}
    values: dict[str, dict[str, Tensor]] = {}
    for name, measure in of_variances.items():
        rows, cols = tv[str(measure.squared)], sv[str(measure.squared)]
        values[name] = {layer: measure.aggregated(rows[layer], cols[layer], axes[layer]) for layer in layers}
    return make_result(
        measures,
        loader.transformations,
        values,
        dead={layer: (tv[some][layer] == 0) & (sv[some][layer] == 0) for layer in layers},
        n_samples=about.n_samples,
        n_skipped=about.n_skipped,
        left_out={**about_rows.left_out, **about.left_out},
        channel_axis=axes,
    )


def _checked(
    walk: Walk, measures: Mapping[str, Metric], loader: STLoader, over: OverBudgetError
) -> dict[str, MeasureOfVariances]:
    """The measures, if all of them can do with less memory."""
    for name in ("confidence", "outputs"):
        if getattr(walk.options, name):
            raise ValueError(
                f"`{name}=` needs {over.needed} bytes of memory for the sums of all layers, but `state_budget` is"
                f" {over.budget}: raise it, or measure fewer layers or transformations."
            )
    if loader.n_samples is None and rank_and_world_size()[1] > 1:
        raise ValueError("Expected data with a length for several processes within `state_budget`, but got a stream.")
    found: dict[str, MeasureOfVariances] = {}
    for name, measure in measures.items():
        if not names_accumulators(measure) or not isinstance(measure, MeasureOfVariances):
            raise ValueError(
                f"Expected argument `state_budget` to be larger, but got {over.budget} bytes: the states of {name} for"
                f" {len(loader.transformations)} transformations do not fit ({over.parts}), and only"
                " TransformationVariance, SampleVariance and NormalizedVariance can do with less."
            )
        found[name] = measure
    return found


def _over_columns(
    walk: Walk, measures: Mapping[str, Metric], transformations: TransformationSet, columns: int
) -> Iterator[tuple[int, InvarianceResult]]:
    """Sample variances of some transformations at a time, and how many these are."""
    for start in range(0, len(transformations), columns):
        some = transformations[start : start + columns]
        about = f"Measuring invariance: transformations {start + 1}–{start + len(some)}"
        yield len(some), collect(walk.run(measures, walk.loader(some), about))


def _over_samples(
    walk: Walk, measures: Mapping[str, Metric], transformations: TransformationSet, count: int
) -> Iterator[tuple[int, InvarianceResult]]:
    """Sample variances of the transpose of some rows at a time, and how many these are."""
    options, done = walk.options, 0
    samples = STLoader(
        walk.data,
        transformations[:1],
        count,
        max_samples=options.max_samples,
        input_fn=options.input_fn,
        device=walk.device,
        seed=options.seed,
        transform=False,
        with_batch=takes_batch(options.forward),
    )
    rows = _Rows(transformations, options.forward, walk.transformed_module)
    inner = replace(
        options,
        forward=rows,
        batch_size=walk.batch_size,
        input_fn=None,
        transform_at=None,
        max_samples=None,
        state_budget=None,
        include_input=False,
    )
    transpose = Walk(walk.model, torch.arange(len(transformations))[:, None], inner)
    for block in _iterated(samples, options.seed):
        rows.samples, rows.batch = block.inputs[:, 0], block.batch
        number = len(rows.samples)
        about = f"Measuring invariance: samples {done + 1}–{done + number}"
        yield number, collect(transpose.run(measures, transpose.loader(_SamplesAsColumns(number)), about))
        done += number


def _iterated(loader: STLoader, seed: int) -> Iterator[STBlock]:
    """The blocks of a loader, until one process fails: then all of them do."""
    with isolated_random_state(seed):
        blocks = iter(loader)
        while True:
            with errors_shared():
                block = next(blocks, None)
            if block is None:
                return
            yield block


def _mean(found: Iterator[tuple[int, InvarianceResult]]) -> tuple[dict[str, dict[str, Tensor]], InvarianceResult]:
    """The mean of the values of results, each with its weight; and the last result, with all layers left out.

    A layer that is missing in one of them, or that some rows do not reach, is left out.
    """
    total = 0
    left_out: dict[str, str] = {}
    sums: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, int] = {}
    for weight, result in found:
        total += weight
        left_out |= {**dict.fromkeys(result.reached, NOT_ALL), **result.left_out}
        for layer in result.layers:
            weights[layer] = weights.get(layer, 0) + weight
        for key, layers in result.items():
            of_key = sums.setdefault(key, {})
            for layer, value in layers.items():
                of_key[layer] = of_key[layer] + weight * value if layer in of_key else weight * value
    left_out |= {layer: NOT_ALL for layer, weight in weights.items() if weight < total and layer not in left_out}
    result.left_out = left_out
    whole = {key: {n: v / total for n, v in layers.items() if n not in left_out} for key, layers in sums.items()}
    return whole, result


class _SamplesAsColumns(TransformationSet):
    """Samples in the place of transformations: t of the transpose makes of row j the number j · count + i, of sample i.

    Args:
        count: how many samples there are.
    """

    invertible = False

    def __init__(self, count: int) -> None:
        super().__init__([f"sample {i}" for i in range(count)])

    def _apply(self, x: Tensor, input_size: tuple[int, ...] | None) -> Tensor:
        return x[:, None] * len(self) + torch.arange(len(self), device=x.device)[:, None]

    def _select(self, columns: list[int]) -> TransformationSet:
        raise ValueError("Expected all samples of the chunk.")


class _Rows:
    """The ``forward`` of the transpose: makes inputs of the numbers j · count + i, and calls the model.

    Args:
        transformations: the columns of the ST matrix.
        forward: the user's.
        module: the module of ``transform_at``, if any.

    Attributes:
        samples: the chunk of samples at hand, ``(count, *input_shape)``.
        batch: all entries of their batch.
    """

    def __init__(
        self, transformations: TransformationSet, forward: Callable[..., Any] | None, module: nn.Module | None
    ) -> None:
        self.samples, self.batch = torch.zeros(0), None
        self._transformations, self._forward, self._module = transformations, forward, module

    def __call__(self, model: nn.Module, numbers: Tensor) -> Any:
        """Run the model on transformed samples."""
        count = len(self.samples)
        which, sample = numbers[:, 0] // count, numbers[:, 0] % count
        if self._module is None:
            return self._called(model, self._transformed(which, sample), sample)
        with transformed_input(self._module, _once(lambda x: self._each_transformed(x, which))):
            return self._called(model, self.samples[sample], sample)

    def _called(self, model: nn.Module, x: Tensor, sample: Tensor) -> Any:
        if self._forward is None:
            return model(x)
        if not takes_batch(self._forward):
            return self._forward(model, x)
        return self._forward(model, x, select_samples(self.batch, len(self.samples), sample.cpu()))

    def _transformed(self, which: Tensor, sample: Tensor) -> Tensor:
        """Transformation ``which[k]`` of ``sample[k]``, for all k: of every sample and transformation among these."""
        rows, columns = torch.unique(which), torch.unique(sample)
        st = self._transformations.select(rows.tolist())(self.samples[columns])
        return st[torch.searchsorted(columns, sample), torch.searchsorted(rows, which)]

    def _each_transformed(self, x: Tensor, which: Tensor) -> Tensor:
        """Transformation ``which[k]`` of ``x[k]``, for all k."""
        rows = torch.unique(which)
        parts = torch.cat([self._transformations[j](x[which == j]) for j in rows.tolist()])
        return parts[torch.cat([(which == j).nonzero()[:, 0] for j in rows]).argsort()]


def _once(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply a function to the input of a module the first time that the module runs."""
    functions = iter([function])
    return lambda x: next(functions, _unchanged)(x)


def _unchanged(x: Tensor) -> Tensor:
    return x
