"""One walk over the ST matrix that feeds every measure of every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_invariance.data.loader import STLoader
from lightning_invariance.distributed import gather_or_raise, rank_and_world_size
from lightning_invariance.engine.arguments import (
    check_model,
    check_number,
    check_transformations,
    named_measures,
    named_metrics,
)
from lightning_invariance.engine.budget import needed_bytes
from lightning_invariance.engine.collect import Convergence, collect
from lightning_invariance.engine.column_chunks import in_two_walks
from lightning_invariance.engine.memory_format import ChannelsLastError, never_with_channels_last
from lightning_invariance.engine.options import Options
from lightning_invariance.engine.registry import Registry
from lightning_invariance.engine.walk import Session
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.model.preserved import ONE_AT_A_TIME
from lightning_invariance.model.selection import Layers, unwrapped
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.results.warnings import warn_of
from lightning_invariance.transforms import TransformationSet

#: The states of rows longer than a batch may take so many bytes where the user does not say.
DEFAULT_BUDGET = 2**31


#: Model → the batch size that ``"auto"`` came to, where the memory did not suffice for the first one.
_FITTING: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def evaluate(
    model: nn.Module,
    data: Any,
    transformations: TransformationSet,
    measures: Sequence[Metric] | Mapping[str, Metric] | None = None,
    *,
    layers: Layers = None,
    batch_size: int | Literal["auto"] = "auto",
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    forward: Callable[..., Any] | None = None,
    input_fn: Callable[..., Tensor] | None = None,
    transform_at: str | None = None,
    operations: bool = False,
    convergence: bool = False,
    state_budget: int | None = None,
    confidence: float | None = None,
    outputs: Metric | Sequence[Metric] | Mapping[str, Metric] | None = None,
    channel_axis: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> InvarianceResult:
    """Measure how invariant every activation of a model is to a set of input transformations.

    The model runs in eval mode and without gradients over every sample under every transformation, once (twice where a
    measure such as :class:`~lightning_invariance.measures.Goodfellow` needs it). Afterwards its modes, its parameters
    and buffers, and every random generator are what they were before.

    Args:
        model: any module; called as ``model(x)`` unless ``forward`` is given. A compiled model runs uncompiled, since a
            compiled graph skips hooks; its graphs stay as they are.
        data: ``Dataset``, ``DataLoader`` or tensor. Samples are ``x``, ``(x, y)`` or dicts; see :class:`STLoader`.
        transformations: the columns of the ST matrix, at least two, such as ``rotations(16)``.
        measures: metrics that are updated with ST blocks ``(samples, transformations, *activation_shape)``; those of
            ``lightning_invariance.measures`` or your own. The result names them by class, or by key for a dict. By
            default :class:`~lightning_invariance.measures.NormalizedVariance`.
        layers: which layers to measure; by default every leaf module. Names, glob patterns, module types, a predicate,
            or a dict that renames: see :func:`layer_names`.
        batch_size: largest number of transformed inputs in one forward pass. ``"auto"`` begins with 128, and goes on
            with up to 512 while activations take at most 10 MiB on average and less than 32 each; on an accelerator
            with as many inputs as make half a gigabyte (at most 16,384). It halves where the memory does not suffice,
            which it remembers for the next evaluation of the model; values do not depend on it. On the CPU it also
            lets convolutional networks run with channels last in memory if that is faster, which is timed once for a
            model, in six more passes. A number keeps the format of the images, and with it the last digits of every
            run; so does ``torch.use_deterministic_algorithms``.
        max_samples: how many samples to use, a random choice that is the same every time; by default all.
        device: where to run; by default where the model's parameters are. The model is moved there and back.
        forward: ``forward(model, x)`` runs the model where it is not simply called as ``model(x)``. One of three
            arguments is called as ``forward(model, x, batch)``: every entry of the batch for the same samples, repeated
            for each transformation, so that ``lambda model, x, batch: model(**{**batch, "pixel_values": x})`` works.
            Dicts, lists, tuples and dataclasses may be nested; the batch holds the input as it was before.
        input_fn: picks x from a collated batch, where :class:`STLoader` does not find it.
        transform_at: name of a module whose input is transformed instead of the network's (paper, figure 1 b and d):
            its first argument, a tensor with the batch first. Only what runs from there on is measured.
        operations: also measure what functions and operators compute in forward: ``layer1.0/add`` is the sum in the
            forward of ``layer1.0``, ``features/relu#1`` the second ``relu`` in that of ``features``. Views, and what
            a measured module returns, are left out. Some of them are chosen with patterns in ``layers``.
        convergence: also report the value of each layer after 1/8, 1/4 and 1/2 of the samples in whole blocks, as
            ``result.convergence``; of measures of this package that need one pass, in a single process.
        state_budget: bytes that the states of all layers may take. Where the means of the columns of a large set do not
            fit, the variances are computed in two walks instead, samples first and then some transformations at a
            time: the same values from twice as many forward passes, and more passes over the data. By default 2 GiB
            for rows longer than a batch, and else what is free.
        confidence: of intervals over samples, such as 0.95: the standard error of every unit, and how much each sample
            moves the mean of each layer, of the variances, distances and same-equivariances. Means over samples, such
            as TransformationVariance, have them from one pass, quotients from a second one. See
            :meth:`InvarianceResult.interval` and :func:`compare`. By default there are none.
        outputs: metrics of predictions and targets, such as an accuracy: what the network's output (its logits, or the
            first tensor) is worth under each transformation, as ``result.outputs``. They need targets in the data.
        channel_axis: where the units stand in the activations of some layers, ``{"blocks.*": -1}``: names or glob
            patterns → axis of the activation (without the batch). By default the first for convolutions and batch
            norms, the last for ``Linear``, ``LayerNorm`` and ``Embedding``, that of the input for modules that keep its
            shape, and else the first of (C, H, W) and the last of (tokens, C). ``result.channel_axis`` says it.
        seed: of the choice of samples and of random transformations.
        progress: show a bar when the walk takes longer than a few seconds.

    Returns:
        The values of every measure for every activation.

    Raises:
        ValueError: Before anything runs: for fewer than two samples or transformations, unknown or no layers, two
            measures of one name, data without inputs, ``convergence`` without a known number of samples, or measures
            whose states exceed ``state_budget`` and that cannot do with less.
        MemoryError: After a look at a few inputs, if the states take more memory than is free.
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
    options = Options(
        layers=layers,
        batch_size=batch_size,
        max_samples=max_samples,
        device=device,
        forward=forward,
        input_fn=input_fn,
        transform_at=transform_at,
        operations=operations,
        convergence=convergence,
        state_budget=state_budget,
        confidence=confidence,
        outputs=named_metrics(outputs),
        channel_axis=channel_axis,
        seed=seed,
        progress=progress,
    )
    return evaluate_with(options, model, data, transformations, named_measures(measures))


def evaluate_with(
    options: Options,
    model: nn.Module,
    data: Any,
    transformations: TransformationSet,
    measures: Mapping[str, Metric],
) -> InvarianceResult:
    """:func:`evaluate` with its options in one object."""
    check_model(model)
    model = unwrapped(model)
    session = Session(model, data, options)
    if options.batch_size == "auto" and model in _FITTING:
        session = session.with_batch_size(_FITTING[model])
    while True:
        try:
            # Results are plain tensors, also where the caller is in inference mode.
            with ONE_AT_A_TIME, torch.inference_mode(False):
                return _measured(session, transformations, measures)
        except ChannelsLastError:
            never_with_channels_last(model)
            session = Session(model, data, options)
            continue
        except torch.OutOfMemoryError:
            if options.batch_size != "auto" or session.batch_size == 1:
                raise
        _FITTING[model] = session.batch_size // 2
        session = session.with_batch_size(_FITTING[model])


def _measured(session: Session, transformations: TransformationSet, measures: Mapping[str, Metric]) -> InvarianceResult:
    """Walk over the ST matrix, in two directions where the states of one walk would be too large."""
    check_transformations(transformations)
    loader, options = session.loader(transformations, _run_of(measures)), session.options
    if loader.n_samples is not None:
        check_number(loader.n_samples)
    milestones = _milestones(loader) if options.convergence else []
    convergence, result = Convergence(measures), None
    if options.state_budget is not None or len(transformations) > session.batch_size:
        budget = DEFAULT_BUDGET if options.state_budget is None else options.state_budget
        needed, activations = _needed(session, loader, measures)
        if needed > budget:
            for name in ("convergence", "confidence", "outputs"):
                if getattr(options, name):
                    raise ValueError(
                        f"Expected `{name}` with states within `state_budget`, but {budget} bytes are less than the"
                        f" {needed} that they take."
                    )
            result = in_two_walks(session, measures, loader, activations, budget)
    if result is None:
        result = collect(session.walk(measures, loader, milestones, convergence.note))
        if milestones:
            result.convergence = convergence.of(result)
    result.outputs = session.outputs()
    check_number(result.n_samples)
    ran = [*result.layers, *(layer for layers in result.skipped.values() for layer in layers)]
    session.selection.check_measured(ran, result.left_out)
    if rank_and_world_size()[0] == 0:
        warn_of(result, options.channel_axis or ())
    return result


def _needed(session: Session, loader: STLoader, measures: Mapping[str, Metric]) -> tuple[int, int]:
    """Bytes of the sums of one walk, and the number of activations of all layers: the most of any process."""
    error: BaseException | None = None
    own = 0, 0
    try:
        activations = session.activations(loader)
        confidence = session.options.confidence
        registry = Registry(measures, loader.transformations, loader.n_samples, loader.source.run, confidence)
        number = sum(math.prod(shape) for shape, *_ in activations.values())
        own = needed_bytes(registry, activations, session.batch_size, session.device)[1], number
    except Exception as raised:  # the other processes must be told, or they would wait for ever
        error = raised
    bytes_of, numbers = zip(*gather_or_raise(own, error), strict=True)
    return max(bytes_of), max(numbers)


def _run_of(measures: Mapping[str, Metric]) -> int:
    """How many samples in a row the measures need from one process."""
    needs = [a for measure in measures.values() if names_accumulators(measure) for a in measure.needs]
    return max((accumulator.least_run for accumulator in needs), default=1)


def _milestones(loader: STLoader) -> list[int]:
    """The numbers of samples after which values are reported."""
    _, world_size = rank_and_world_size()
    if loader.n_samples is None or world_size > 1:
        raise ValueError(
            "Expected argument `convergence` to be used in a single process with data of known length, but got"
            f" {world_size} processes and {'unknown' if loader.n_samples is None else loader.n_samples} samples."
        )
    return sorted({max(2, loader.n_samples // part) for part in (8, 4, 2)} - {loader.n_samples})
