"""``evaluate`` and ``layer_names``: their arguments, checks, and results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_invariance.distributed import rank_and_world_size
from lightning_invariance.engine.budget import OverBudgetError
from lightning_invariance.engine.collect import collect
from lightning_invariance.engine.column_chunks import in_column_chunks
from lightning_invariance.engine.options import Options
from lightning_invariance.engine.walk import Walk
from lightning_invariance.measures import NormalizedVariance
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.messages import PACKAGE, given, level_of_user
from lightning_invariance.model.evaluation_mode import ONE_AT_A_TIME
from lightning_invariance.model.selection import Layers, select_layers, unwrapped
from lightning_invariance.results.result import InvarianceResult
from lightning_invariance.results.warnings import warn_of
from lightning_invariance.transforms import TransformationSet


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
    include_input: bool = False,
    state_budget: int | None = None,
    confidence: float | None = None,
    outputs: Metric | Sequence[Metric] | Mapping[str, Metric] | None = None,
    outputs_move: bool = False,
    channel_axis: Mapping[str, int] | None = None,
    vectors: Mapping[str, int | Sequence[int]] | None = None,
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
        data: ``Dataset``, ``DataLoader``, tensor, or anything that gives batches. Samples are ``x``, ``(x, y)`` or
            dicts; see :class:`STLoader`.
        transformations: the columns of the ST matrix, at least two, such as ``rotations(16)``.
        measures: metrics that are updated with ST blocks ``(samples, transformations, *activation_shape)``, from
            ``lightning_invariance.measures`` or your own. The result names them by class, or by key for a dict. By
            default :class:`~lightning_invariance.measures.NormalizedVariance` with ``response=True``.
        layers: which layers to measure; by default every leaf module. Names, glob patterns, module types, a predicate,
            or a dict that renames: see :func:`layer_names`.
        batch_size: largest number of transformed inputs in one forward pass. ``"auto"`` is 128 on the CPU, and on an
            accelerator as many as make half a gigabyte of inputs (at most 16,384). It halves, with a warning, where
            memory does not suffice, also for later evaluations of the model. Values depend on it by rounding alone.
        max_samples: how many samples to use, a random choice that does not change between calls; by default all.
        device: where to run; by default where the model's parameters are. The model is moved there and back.
        forward: ``forward(model, x)`` runs the model where it is not simply called as ``model(x)``. One of three
            arguments is called as ``forward(model, x, batch)``: every entry of the batch for these samples, repeated
            for each transformation, so that ``lambda model, x, batch: model(**{**batch, "pixel_values": x})`` works.
            Dicts, lists, tuples and dataclasses may be nested; the batch holds the input as it was before.
        input_fn: picks x from a collated batch, where :class:`STLoader` does not find it.
        transform_at: name of a module whose input is transformed instead of the network's (paper, figure 1 b and d):
            its first argument, a tensor with the batch first. Only what runs from there on is measured.
        operations: also measure what functions and operators compute in forward: ``layer1.0-add`` is the sum in the
            forward of ``layer1.0``, ``features-relu#1`` the second ``relu`` in that of ``features``. Views, and what
            a measured module returns, are left out. Some of them are chosen with patterns in ``layers``.
        include_input: also measure the transformed input itself, as the first row, ``"input"``: the value to compare
            the layers with. It counts in no mean over layers, and is missing where inputs are integers or, within
            ``state_budget``, chunks are measured.
        state_budget: bytes that the states of all layers may take. Where the means of the columns of a large set do not
            fit, variances are computed from chunks of the ST matrix instead, some transformations or some samples at
            a time: the same values, without responses, from twice as many forward passes. By default
            2 GiB for rows longer than a batch, and else the memory that is free.
        confidence: of intervals over samples, such as 0.95: the standard error of every unit, and how much each sample
            moves the mean of each layer, of the variances, distances and same-equivariances, from a second pass. See
            :meth:`InvarianceResult.interval` and :func:`compare`. By default there are none.
        outputs: metrics of predictions and targets, such as an accuracy: what the network's output (its logits, or the
            first tensor) is worth under each transformation, as ``result.outputs``. They need targets in the data.
        outputs_move: whether predictions are maps that move as the images do, such as masks: they are mapped back by
            the inverse transformation before ``outputs`` compare them with the targets, which stay as they are. Pixels
            that left the frame do not count: targets are the metric's ``ignore_index`` there or, for metrics without
            one, the other pixels are compared as one axis. For boxes and keypoints see ``TransformationSet.points``.
        channel_axis: which axis of the activation (without the batch) holds the channels of some layers, as a dict of
            names or glob patterns, ``{"blocks.*": -1}``. By default the first axis of convolutions and batch norms, the
            last of ``Linear``, ``LayerNorm`` and ``Embedding``, the axis of the input for modules that keep its shape,
            and else the first of (C, H, W) and the last of (tokens, C). ``result.channel_axis`` says it.
        vectors: which axis (or axes) of the activation of some layers holds vectors that turn with the input, as a dict
            of names or glob patterns, ``{"coordinates": -1}``: measures of equivariance turn them back. They have as
            many entries as the input has axes of positions: 3 for :func:`volume_rotations`.
        seed: of the choice of samples and of random transformations.
        progress: show a bar when the walk takes longer than a few seconds.

    Returns:
        The values of every measure for every activation.

    Raises:
        ValueError: Before anything runs: for fewer than two samples or transformations, unknown or no layers, two
            measures of one name, or data without inputs. After a look at a few inputs: if the states of measures
            exceed ``state_budget`` and they cannot do with less.
        MemoryError: After a look at a few inputs, if the states take more memory than is free.
        TypeError: If a measure is no ``Metric`` or the transformations are no :class:`TransformationSet`.
        RuntimeError: If a layer that was asked for by name never runs (the message lists those that did).

    Warns:
        UserWarning: If values are NaN, since activations are NaN or infinite or a measure is undefined for them; the
            layers and how many activations are named. They are left out of all means.

    Example:
        >>> import torch
        >>> from lightning_invariance import evaluate, quarter_turns
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))
        >>> result = evaluate(model, torch.rand(8, 3, 6, 6), quarter_turns())
        >>> result.per_layer()["0"] < 1e-9  # the mean of an image does not change when it is turned
        True
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
        include_input=include_input,
        state_budget=state_budget,
        confidence=confidence,
        outputs=named_metrics(outputs),
        outputs_move=outputs_move,
        channel_axis=channel_axis,
        vectors=vectors,
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
    check_transformations(transformations)
    model = unwrapped(model)
    walk = Walk(model, data, options)
    while True:
        try:
            # Results are plain tensors, also where the caller is in inference mode.
            with ONE_AT_A_TIME, torch.inference_mode(False):
                return _measured(walk, transformations, measures)
        except torch.OutOfMemoryError:
            if options.batch_size != "auto" or walk.batch_size == 1:
                raise
        half = walk.batch_size // 2
        warnings.warn(
            f"Memory did not suffice for batches of {walk.batch_size} inputs: this evaluation takes {half}. Write"
            f" `batch_size={half}` to begin with them.",
            UserWarning,
            stacklevel=level_of_user(),
        )
        walk = walk.with_batch_size(half)


def _measured(walk: Walk, transformations: TransformationSet, measures: Mapping[str, Metric]) -> InvarianceResult:
    """Walk over the ST matrix, or over chunks of it where the sums of one walk would take too much memory."""
    loader = walk.loader(transformations, _run_of(measures))
    try:
        result = collect(walk.run(measures, loader))
    except OverBudgetError as over:
        result = in_column_chunks(walk, measures, loader, over)
    result.outputs = walk.outputs()
    ran = [*result.layers, *(layer for layers in result.skipped.values() for layer in layers)]
    ran = [layer for layer in ran if layer != result.input_layer]
    walk.selection.check_measured(ran, result.left_out)
    result.set_layer_types(walk.selection.types_of(ran))
    if rank_and_world_size()[0] == 0:
        warn_of(result, {"channel_axis": walk.options.channel_axis or (), "vectors": walk.options.vectors or ()})
    return result


def _run_of(measures: Mapping[str, Metric]) -> int:
    """How many samples in a row the measures need from one process."""
    needs = [a for measure in measures.values() if names_accumulators(measure) for a in measure.needs]
    return max((accumulator.least_run for accumulator in needs), default=1)


def layer_names(
    model: nn.Module,
    layers: Layers = None,
    example: Tensor | None = None,
    *,
    operations: bool = False,
    forward: Callable[[nn.Module, Tensor], Any] | None = None,
) -> list[str]:
    """Names of a model's layers: in the order in which the model holds them, or with an example in which they run.

    Args:
        model: any module.
        layers: what to select, as in :func:`evaluate`:

            - ``None``: every leaf module: one without children, or within which no other module runs, such as an
              ``nn.MultiheadAttention``.
            - names of modules, leaf or not, such as ``["conv1", "layer1"]``; the output of ``"layer1"`` is what the
              whole block returns.
            - glob patterns over the leaf modules, such as ``"layer1.*"`` or ``"*conv?"``; ``*`` also matches dots.
            - module types, such as ``nn.Conv2d`` or your own block class.
            - a predicate ``(name, module) -> bool``, asked for every module but the model itself.
            - a dict from module name to the name for results, curves and pictures.
            - patterns of operations, ``"layer1.0-add"`` or ``"layer*-add"``: what functions and operators compute in
              the forward of a module, see ``operations`` of :func:`evaluate`.
        example: inputs, at least two different ones; the model runs on them twice. A result has these
            names: without layers that do not run or cannot be measured, with operations, and with the further layers
            of modules that run k times in one forward pass (``name``, ``name#1``, …, ``name#{k-1}``) or return a tuple,
            list or dict (``name[0]``, ``name[key]``, …). Without an example only modules without children are known.
        operations: with an example, whether to name what functions and operators compute, too.
        forward: with an example, ``forward(model, x)`` runs the model where it is not called as ``model(x)``.

    Returns:
        The names.

    Raises:
        ValueError: If a name or pattern is not in the model (the message lists near names), nothing is selected, or
            ``operations`` comes without an ``example`` of two inputs.
        TypeError: If ``layers`` is of another kind.

    Example:
        >>> import torch
        >>> class Net(nn.Sequential):
        ...     def forward(self, x):
        ...         return super().forward(x.relu()) + 1
        >>> model = Net(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
        >>> layer_names(model)
        ['0', '1', '2']
        >>> layer_names(model, example=torch.randn(2, 1, 5, 5), operations=True)
        ['Net-relu', '0', '1', 'Net-add']
    """
    if example is None:
        if operations:
            raise ValueError("Expected argument `example` with `operations=True`: they have names only when they run.")
        return list(select_layers(model, layers).modules)
    if not isinstance(example, Tensor) or example.ndim < 2 or len(example) < 2:
        shape = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"Expected argument `example` to be a tensor of at least two inputs, but got {shape}.")
    walk = Walk(unwrapped(model), example, Options(layers, forward=forward, operations=operations))
    with ONE_AT_A_TIME:
        return walk.names(example)


def named_measures(measures: Sequence[Metric] | Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Name → measure, checked; by default the normalised variance."""
    return named_metrics([NormalizedVariance(response=True)] if measures is None else measures, "measures")


def named_metrics(
    measures: Metric | Sequence[Metric] | Mapping[str, Metric] | None, argument: str = "outputs"
) -> dict[str, Metric]:
    """Name → metric, checked."""
    if measures is None:
        return {}
    if isinstance(measures, Metric | type):
        measures = [measures]
    if isinstance(measures, MetricCollection):
        measures = dict(measures.items())
    if not isinstance(measures, Sequence | Mapping) or isinstance(measures, str):
        raise TypeError(
            f"Expected argument `{argument}` to be a metric, or a list or dict of metrics, but got {given(measures)}."
        )
    pairs = list(measures.items()) if isinstance(measures, Mapping) else [(type(m).__name__, m) for m in measures]
    named: dict[str, Metric] = {}
    for name, measure in pairs:
        if not isinstance(measure, Metric):
            hint = f": call it, as in `{measure.__name__}()`" if isinstance(measure, type) else ""
            raise TypeError(
                f"Expected argument `{argument}` to hold torchmetrics.Metric objects, but got {given(measure)}{hint}."
            )
        if name in named:
            raise ValueError(
                f"Expected argument `{argument}` to hold measures of different names, but got two of {name!r}; give"
                f' them names with a dict: {{"{name}": ..., "other": ...}}.'
            )
        named[name] = measure
    if not named:
        raise ValueError(f"Expected argument `{argument}` to hold at least one measure, but got none.")
    return named


def check_model(model: Any) -> None:
    """Raise for what is no module with values."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected argument `model` to be a torch.nn.Module, but got {type(model).__name__}: call"
            " `evaluate(model, data, transformations)`, in this order."
        )
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())  # accelerate loads them in time
    if not offloaded and any(tensor.is_meta for tensors in (model.parameters(), model.buffers()) for tensor in tensors):
        raise ValueError(
            "Expected argument `model` to hold values, but some of its parameters are on the meta device: load weights"
            " first, such as with `model.load_state_dict(weights, assign=True)`."
        )


def check_transformations(transformations: TransformationSet) -> None:
    """Raise for what is no set of at least two transformations."""
    if not isinstance(transformations, TransformationSet):
        hint = (
            f"call it, as in `{transformations.__name__}(16)`"
            if callable(transformations) and str(getattr(transformations, "__module__", "")).startswith(PACKAGE)
            else "write `rotations(16)`, or make one of functions with `TransformationSet.from_callables`"
        )
        raise TypeError(
            f"Expected argument `transformations` to be a TransformationSet, but got {given(transformations)}: {hint}."
        )
    if len(transformations) < 2:
        raise ValueError(
            f"Expected argument `transformations` to hold at least two transformations, but got {transformations!r}."
        )
