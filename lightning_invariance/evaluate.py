"""One walk over the ST matrix that feeds every measure of every layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from lightning_invariance.activations import Layers, catch_activations, select_layers, transformed_input
from lightning_invariance.distributed import rank_and_world_size
from lightning_invariance.isolation import device_of, evaluation_mode, forced_eager, isolated_random_state, on_device
from lightning_invariance.loader import STBlock, STLoader
from lightning_invariance.measures import Measure, NormalizedVariance
from lightning_invariance.result import InvarianceResult
from lightning_invariance.transforms import TransformationSet
from lightning_invariance.walk import Walk

#: A progress bar appears when a walk takes longer than this, in seconds.
PROGRESS_DELAY = 3.0


def evaluate(
    model: nn.Module,
    data: Any,
    transformations: TransformationSet,
    measures: Sequence[Metric] | Mapping[str, Metric] | None = None,
    *,
    layers: Layers = None,
    batch_size: int = 64,
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
    input_fn: Callable[..., Tensor] | None = None,
    transform_at: str | None = None,
    convergence: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> InvarianceResult:
    """Measure how invariant every activation of a model is to a set of input transformations.

    The model runs in eval mode and without gradients over every sample under every transformation, once (twice where a
    measure such as :class:`~lightning_invariance.measures.Goodfellow` needs it). Afterwards its modes, its parameters
    and buffers, and every random generator are what they were before.

    Args:
        model: any module; called as ``model(x)`` unless ``forward`` is given.
        data: ``Dataset``, ``DataLoader`` or tensor. Samples are ``x``, ``(x, y)`` or dicts; see :class:`STLoader`.
        transformations: the columns of the ST matrix, at least two, such as ``rotations(16)``.
        measures: metrics that are updated with ST blocks ``(samples, transformations, *activation_shape)``; those of
            ``lightning_invariance.measures`` or your own. The result names them by class, or by key for a dict. By
            default :class:`~lightning_invariance.measures.NormalizedVariance`.
        layers: which layers to measure; by default every leaf module. Names, glob patterns, module types, a predicate,
            or a dict that renames: see :func:`layer_names`.
        batch_size: largest number of transformed inputs in one forward pass.
        max_samples: how many samples to use, a random choice that is the same every time; by default all.
        device: where to run; by default where the model's parameters are. The model is moved there and back.
        forward: ``forward(model, x)`` runs the model where it is not simply called as ``model(x)``.
        input_fn: picks x from a collated batch, where :class:`STLoader` does not find it.
        transform_at: name of a module whose input is transformed instead of the network's (paper, figure 1 b and d):
            its first argument, a tensor with the batch first. Only what runs from there on is measured.
        convergence: also report the value of each layer after 1/8, 1/4 and 1/2 of the samples, as
            ``result.convergence``; of measures of this package that need one pass, in a single process.
        seed: of the choice of samples and of random transformations.
        progress: show a bar when the walk takes longer than a few seconds.

    Returns:
        The values of every measure for every activation.

    Raises:
        ValueError: Before anything runs: for fewer than two samples or transformations, unknown or no layers, two
            measures of one name, data without inputs, or ``convergence`` without a known number of samples.
        TypeError: If a measure is no ``Metric`` or the transformations are no :class:`TransformationSet`.
        RuntimeError: If a layer that was asked for by name never runs (the message lists those that did).

    Warns:
        UserWarning: If values are NaN, since activations are NaN or infinite or a measure is undefined for them; the
            layers and how many activations are named. They are left out of all means.

    Example:
        >>> import torch
        >>> from lightning_invariance import evaluate, quarter_turns
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> result = evaluate(model, torch.rand(8, 3, 6, 6), quarter_turns())
        >>> result["NormalizedVariance"]["1"] < 1e-9  # the mean of an image does not change when it is turned
        tensor([True, True, True])
    """
    named = named_measures(measures)
    selection = select_layers(model, layers)
    entry = None if transform_at is None else next(iter(select_layers(model, [transform_at]).modules.values()))
    where = torch.device(device) if device is not None else device_of(model)
    rank, world_size = rank_and_world_size()
    loader = STLoader(
        data,
        transformations,
        batch_size,
        max_samples=max_samples,
        input_fn=input_fn,
        device=where,
        seed=seed,
        rank=rank,
        world_size=world_size,
        transform=entry is None,
    )
    _check_numbers(loader)
    for measure in named.values():
        if isinstance(measure, Measure):
            deepcopy(measure).prepare(transformations, ())  # raises where it cannot work with them
    walk = Walk(named, transformations, _milestones(loader, world_size) if convergence else ())
    run = forward or _call
    with ExitStack() as stack:
        stack.enter_context(on_device(model, where))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(forced_eager())
        if entry is not None:
            stack.enter_context(transformed_input(entry, walk.enter))
        catcher = stack.enter_context(catch_activations(selection, walk.consume))
        for _ in range(walk.passes):
            error: BaseException | None = None
            try:
                with isolated_random_state(seed):  # every pass sees the same random transformations
                    for block in _with_progress(loader, progress and rank == 0):
                        catcher.start_pass()
                        walk.start_block(block, entered=entry is None)
                        run(model, block.inputs.flatten(0, 1))
            except Exception as raised:  # the other processes shall hear of it instead of waiting for ever
                error = raised
            walk.end_pass(where, error)
    _check_number(walk.n_samples)
    selection.check_fired(walk.layers)
    result = walk.result()
    if rank == 0:
        _warn_of_nan(result)
    return result


def _milestones(loader: STLoader, world_size: int) -> list[int]:
    """The numbers of samples after which values are reported."""
    if loader.n_samples is None or world_size > 1:
        raise ValueError(
            "Expected argument `convergence` to be used in a single process with data of known length, but got"
            f" {world_size} processes and {'unknown' if loader.n_samples is None else loader.n_samples} samples."
        )
    return sorted({max(2, loader.n_samples // part) for part in (8, 4, 2)} - {loader.n_samples})


def named_measures(measures: Sequence[Metric] | Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Name → metric, checked."""
    if measures is None:
        measures = [NormalizedVariance()]
    if isinstance(measures, Metric):
        measures = [measures]
    pairs = list(measures.items()) if isinstance(measures, Mapping) else [(type(m).__name__, m) for m in measures]
    named: dict[str, Metric] = {}
    for name, measure in pairs:
        if not isinstance(measure, Metric):
            raise TypeError(f"Expected argument `measures` to hold torchmetrics.Metric objects, but got {measure!r}.")
        if name in named:
            raise ValueError(
                f"Expected argument `measures` to hold measures of different names, but got two of {name!r}; give them"
                f' names with a dict: {{"{name}": ..., "other": ...}}.'
            )
        named[name] = measure
    if not named:
        raise ValueError("Expected argument `measures` to hold at least one measure, but got none.")
    return named


def _check_numbers(loader: STLoader) -> None:
    if len(loader.transformations) < 2:
        raise ValueError(
            "Expected argument `transformations` to hold at least two transformations,"
            f" but got {loader.transformations!r}."
        )
    if loader.n_samples is not None:
        _check_number(loader.n_samples)


def _check_number(n_samples: int) -> None:
    if n_samples < 2:
        raise ValueError(f"Expected at least two samples, but got {n_samples}: a variance needs two.")


def _warn_of_nan(result: InvarianceResult) -> None:
    found = []
    for measure in result:
        layers = ", ".join(f"{row.layer} ({row.nan})" for row in result.table(measure) if row.nan)
        found += [f"{measure} of {layers}"] if layers else []
    if found:
        warnings.warn(
            "NaN, and left out of all means, because activations are NaN or infinite or the measure is undefined there:"
            f" {'; '.join(found)}.",
            UserWarning,
            stacklevel=3,
        )


def _call(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def _with_progress(loader: STLoader, show: bool) -> Iterator[STBlock]:
    total = None if loader.n_samples is None else len(loader)
    bar = tqdm(loader, "Measuring invariance", total, leave=False, delay=PROGRESS_DELAY, unit="batch", disable=not show)
    yield from bar
