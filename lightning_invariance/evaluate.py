"""One walk over the ST matrix that feeds every measure of every layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from lightning_invariance.activations import Layers, catch_activations, select_layers
from lightning_invariance.isolation import device_of, evaluation_mode, forced_eager, isolated_random_state, on_device
from lightning_invariance.loader import STBlock, STLoader
from lightning_invariance.measures import Measure, NormalizedVariance
from lightning_invariance.measures.variance import VarianceMeasure
from lightning_invariance.result import InvarianceResult
from lightning_invariance.transforms import TransformationSet

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
    seed: int = 0,
    progress: bool = True,
) -> InvarianceResult:
    """Measure how invariant every activation of a model is to a set of input transformations.

    The model runs in eval mode and without gradients over every sample under every transformation, once. Afterwards
    its modes, its parameters and buffers, and every random generator are what they were before.

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
        seed: of the choice of samples and of random transformations.
        progress: show a bar when the walk takes longer than a few seconds.

    Returns:
        The values of every measure for every activation.

    Raises:
        ValueError: Before anything runs: for fewer than two samples or transformations, unknown or no layers, two
            measures of one name, or data without inputs.
        TypeError: If a measure is no ``Metric`` or the transformations are no :class:`TransformationSet`.
        RuntimeError: If a layer that was asked for by name never runs (the message lists those that did).

    Warns:
        UserWarning: If activations are NaN or infinite; the layers and how many activations are named. Their values are
            NaN and left out of all means.

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
    where = torch.device(device) if device is not None else device_of(model)
    rank, world_size = _ranks()
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
    )
    _check_numbers(loader)
    walk = _Walk(named, loader)
    run = forward or _call
    with ExitStack() as stack:
        stack.enter_context(isolated_random_state(seed))
        stack.enter_context(on_device(model, where))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(forced_eager())
        catcher = stack.enter_context(catch_activations(selection, walk.consume))
        for block in _with_progress(loader, progress and rank == 0):
            catcher.start_pass()
            walk.start_block(block)
            run(model, block.inputs.flatten(0, 1))
    selection.check_fired(walk.layers)
    result = walk.result(loader.n_samples)
    _check_number(result.n_samples)
    _warn_of_nan(result)
    return result


class _Walk:
    """The measures of every layer, while blocks come in."""

    def __init__(self, measures: Mapping[str, Metric], loader: STLoader) -> None:
        #: layer → groups of measures that share their states: name → metric
        self.layers: dict[str, list[dict[str, Metric]]] = {}
        self._measures = measures
        self._groups = _compute_groups(measures)
        self._transformations = loader.transformations
        self._block: STBlock | None = None
        self._parts: dict[str, list[Tensor]] = {}
        self._batch_axes: dict[str, int] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._rows = 0

    def start_block(self, block: STBlock) -> None:
        """The outputs that follow belong to this block."""
        self._block = block
        if block.columns.stop == len(self._transformations):
            self._rows += len(block.inputs)

    def consume(self, layer: str, module: nn.Module, output: Tensor) -> None:
        """Update the measures of a layer with what it made of the block's inputs."""
        if self._block is None:
            raise RuntimeError("Expected a block before its activations.")
        rows, columns = self._block.inputs.shape[:2]
        output = self._batch_first(layer, module, output, rows * columns)
        st = output.reshape(rows, columns, *output.shape[1:])
        if columns < len(self._transformations):
            # A row longer than a batch: wait for the rest of it.
            parts = self._parts.setdefault(layer, [])
            parts.append(st.clone())
            if self._block.columns.stop < len(self._transformations):
                return
            st = torch.cat(self._parts.pop(layer), dim=1)
        if layer not in self.layers:
            self.layers[layer] = [self._new_group(names, st.device) for names in self._groups]
            self._shapes[layer] = st.shape[2:]
        for group in self.layers[layer]:
            # One update serves the group: its members have the same states.
            leader = next(iter(group.values()))
            labels = {} if self._block.labels is None else leader._filter_kwargs(labels=self._block.labels)
            leader.update(st, **labels)

    def _batch_first(self, layer: str, module: nn.Module, output: Tensor, batch: int) -> Tensor:
        """Move the batch axis to the front; it is elsewhere in the states and time-first outputs of recurrent nets."""
        if layer not in self._batch_axes:
            if isinstance(module, nn.RNNBase):
                hidden = layer.count("[") > 1 or not layer.endswith("[0]")  # (output, hidden) or (output, (h, c))
                axis = 1 if hidden or not module.batch_first else 0
            else:
                axis = next((a for a, size in enumerate(output.shape) if size == batch), 0)
            self._batch_axes[layer] = axis
        axis = self._batch_axes[layer]
        if output.ndim <= axis or output.shape[axis] != batch:
            raise RuntimeError(
                f"Expected layer {layer!r} to return a value for each of the {batch} inputs of a batch, but it returned"
                f" a tensor of shape {tuple(output.shape)}. Leave it out with `layers`."
            )
        return output.movedim(axis, 0)

    def _new_group(self, names: Iterable[str], device: torch.device) -> dict[str, Metric]:
        group: dict[str, Metric] = {}
        for name in names:
            clone = self._measures[name].clone()
            clone.reset()
            if device.type == "mps":  # which has no float64
                clone.set_dtype(torch.float32)
            group[name] = clone.to(device)
        return group

    def result(self, n_samples: int | None) -> InvarianceResult:
        """Compute every measure of every layer."""
        values: dict[str, dict[str, Tensor]] = {name: {} for name in self._measures}
        dead: dict[str, Tensor] = {}
        for layer, groups in self.layers.items():
            for group in groups:
                leader = next(iter(group.values()))
                with leader.sync_context(dist_sync_fn=leader.dist_sync_fn, should_sync=leader._to_sync):
                    for name, metric in group.items():
                        value, shape = self._computed(metric, leader), self._shapes[layer]
                        # torchmetrics turns a value of shape (1,) into a scalar.
                        values[name][layer] = value.reshape(shape) if value.numel() == shape.numel() else value
                    if isinstance(leader, VarianceMeasure):
                        dead[layer] = leader.dead().cpu()
        return InvarianceResult(
            values,
            dead=dead,
            n_samples=self._rows if n_samples is None else n_samples,
            transformations=self._transformations.labels,
            parameters=self._transformations.parameters,
        )

    @staticmethod
    def _computed(metric: Metric, leader: Metric) -> Tensor:
        """What a metric makes of the (synchronised) states of the leader of its group."""
        for state in metric._defaults if metric is not leader else ():
            setattr(metric, state, getattr(leader, state))
        metric._update_count = max(1, leader._update_count)
        metric._to_sync = False
        value: Tensor = metric.compute()
        return value.detach().to("cpu", torch.float64)


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


def _compute_groups(measures: Mapping[str, Metric]) -> list[list[str]]:
    """The names of measures that share their states, so that one update serves each group."""
    groups: dict[Hashable, list[str]] = {}
    for name, measure in measures.items():
        rule = measure.update_rule if isinstance(measure, Measure) else id(measure)
        groups.setdefault(rule, []).append(name)
    return list(groups.values())


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
    found = {row.layer: row.nan for measure in result for row in result.table(measure) if row.nan}
    if found:
        layers = ", ".join(f"{layer} ({count})" for layer, count in found.items())
        warnings.warn(
            f"NaN or infinite activations: the values of these are NaN and left out of all means: {layers}.",
            UserWarning,
            stacklevel=3,
        )


def _ranks() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _call(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def _with_progress(loader: STLoader, show: bool) -> Iterator[STBlock]:
    total = None if loader.n_samples is None else len(loader)
    bar = tqdm(loader, "Measuring invariance", total, leave=False, delay=PROGRESS_DELAY, unit="batch", disable=not show)
    yield from bar
