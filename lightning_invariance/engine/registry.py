"""States of all layers of a network during the passes over the ST matrix."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.accumulators.constant import with_dead
from lightning_invariance.accumulators.layer_state import LayerState, memory_order
from lightning_invariance.accumulators.rows import TYPES, Context, Rows
from lightning_invariance.data.loader import STBlock
from lightning_invariance.distributed import gather_objects, merge_over_ranks, rank_and_world_size
from lightning_invariance.engine.sample_influences import Influence, has_influences
from lightning_invariance.measures import Measure
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.model.sample_axis import RAGGED, ragged
from lightning_invariance.precision import summed_on
from lightning_invariance.transforms import TransformationSet

#: The layer of a network that returns its input, for :attr:`InvarianceResult.floor`.
INPUT = ""

#: Shape of an activation, and its channel axis.
Shape: TypeAlias = tuple[tuple[int, ...], int]


class Registry:
    """The state of every layer, and why layers were left out.

    Args:
        measures: name → metric. Of a :class:`Measure` the accumulators are updated; of any other metric every layer
            gets a clone, which is updated with the block.
        transformations: the columns of the ST matrix.
        expected, run: how many samples there will be, if known, and how many in a row a process shows.
        confidence: of intervals, which take a second pass; None for none.
        input_layer: name of the layer that is the transformed input; empty if it is not measured.
        vectors: layer or glob pattern → axes of its activation along which vectors stand.

    Attributes:
        layers: name → state, in the order in which the layers ran.
        left_out: layer → why it was not measured.
        metrics: layer → name → clone of a metric that is no :class:`Measure`.
        influences: layer → measure → influences of samples, in the second pass.
        n_samples, n_skipped: number of complete rows, and of missing samples.
        in_first_pass, finished: whether rows are shown for the first time, and whether the measures need no more.
        input_shape: of the transformed input; None before it is known.
        sample_keys: number of a sample → its key, where blocks carry them.
        has_floor: whether a measure wants its value for the network that returns its input.
    """

    def __init__(
        self,
        measures: Mapping[str, Metric],
        transformations: TransformationSet,
        expected: int | None = None,
        run: int = 0,
        confidence: float | None = None,
        input_layer: str = "",
        vectors: Mapping[str, int | Sequence[int]] | None = None,
    ) -> None:
        self.input_layer, self._vectors = input_layer, vectors or {}
        self.measures = {key: deepcopy(measure) for key, measure in measures.items()}
        self.transformations, self.confidence, self.expected, self._run = transformations, confidence, expected, run
        self.layers: dict[str, LayerState] = {}
        self.left_out: dict[str, str] = {}
        self.metrics: dict[str, dict[str, Metric]] = {}
        self.influences: dict[str, dict[str, Influence]] = {}
        self.n_samples, self.n_skipped, self.in_first_pass, self.finished = 0, 0, True, False
        self.input_shape: tuple[int, ...] | None = None
        self.sample_keys: dict[int, int] = {}
        self.has_floor = any(names_accumulators(m) and m.has_floor for m in self.measures.values())
        self._memo: dict[Hashable, Any] = {}  # of the block, for all layers
        self._block: STBlock | None = None
        self.know_input(())
        takes = (names_accumulators(measure) and measure.takes_any_channel_axis for measure in self.measures.values())
        # Several processes must agree on the order of values.
        self._keeps_memory_order = all(takes) and rank_and_world_size()[1] == 1

    def applicable(self, layer: str, shape: tuple[int, ...], channel_axis: int) -> dict[str, Metric]:
        """The measures that are defined for a layer with activations of this shape."""
        refused = self.refused(shape, channel_axis)
        return {
            key: measure
            for key, measure in self.measures.items()
            if (names_accumulators(measure) and measure.applies_to(shape) and (layer != INPUT or measure.has_floor))
            or (not names_accumulators(measure) and layer != INPUT)
            if key not in refused
        }

    def refused(self, shape: tuple[int, ...], channel_axis: int) -> dict[str, str]:
        """Measure → why it leaves out a layer, to whose activations it applies."""
        asked = {key: m for key, m in self.measures.items() if names_accumulators(m) and m.applies_to(shape)}
        reasons = {key: measure.why_not(shape, channel_axis) for key, measure in asked.items()}
        return {key: reason for key, reason in reasons.items() if reason}

    def start_block(self, block: STBlock) -> None:
        """The outputs that follow belong to this block."""
        self._block, self._memo = block, {}
        if self.in_first_pass and block.columns.stop == len(self.transformations):
            self.n_samples += len(block.inputs)
            if block.keys is not None:
                self.sample_keys.update(zip(block.indices.tolist(), block.keys.tolist(), strict=True))

    def know_input(self, input_shape: tuple[int, ...]) -> None:
        """Tell measures what is known of the evaluation and, once, of the transformed input.

        Raises:
            ValueError: If a measure cannot work with the transformations.
        """
        if self.input_shape:
            return
        self.input_shape = input_shape or None
        context = Context(self.transformations, input_shape, self.expected, self._run)
        for measure in self.measures.values():
            if names_accumulators(measure):
                measure.prepare_for(context)

    def leave_out(self, layer: str, reason: str) -> None:
        """Forget a layer."""
        if layer != INPUT:
            self.left_out[layer] = reason
        self.layers.pop(layer, None)
        self.metrics.pop(layer, None)
        self.influences.pop(layer, None)

    def state_of(self, name: str, st: Tensor, channel_axis: int) -> LayerState | None:
        """The state of a layer, which is new at its first block; None, and left out, if its shape has changed.

        Args:
            name: of the layer.
            st: ``(rows, columns, *activation_shape)`` of the layer.
            channel_axis: which axis of the activation holds the channels.
        """
        layer, shape = self.layers.get(name), tuple(st.shape[2:])
        if layer is None and self.in_first_pass:
            order = memory_order(st[0, 0], channel_axis) if self._keeps_memory_order else ()
            layer = self._new_layer(name, shape, channel_axis, summed_on(st.device), order)
        if layer is None or shape != layer.shape:
            self.leave_out(name, RAGGED if layer is None else ragged(layer.shape, shape))
            return None
        return layer

    def add(self, name: str, layer: LayerState, st: Tensor) -> None:
        """Add complete rows of the block to a layer.

        Args:
            name: of the layer.
            layer: its state.
            st: ``(rows, columns, *activation_shape)`` with the axes of the activation in the layer's order.
        """
        block = self._block
        assert block is not None  # noqa: S101 - see `start_block`
        vectors = self._vector_axes(name, layer)
        rows = Rows(st, block.indices, block.labels, 0, {}, self._memo, layer.ordered_channel_axis, vectors)
        layer.add(rows)
        if not self.in_first_pass:
            for influence in self.influences.get(name, {}).values():
                influence.add(rows)
            return
        for metric in self.metrics[name].values():
            rows.widen()
            kept = rows.values.clone()  # which the metric may keep, while later modules change it in place
            known = {key: v for key in ("indices", "labels") if (v := getattr(block, key)) is not None}
            metric.update(kept, **metric._filter_kwargs(**known))

    def _vector_axes(self, name: str, layer: LayerState) -> tuple[int, ...]:
        """The axes of an activation, in the layer's order, along which vectors stand."""
        if name in (INPUT, self.input_layer):
            axes = self.transformations.input_vectors
        else:
            fitting = [axes for pattern, axes in self._vectors.items() if name == pattern or fnmatchcase(name, pattern)]
            axes = () if not fitting else (fitting[-1],) if isinstance(fitting[-1], int) else tuple(fitting[-1])
        count = len(layer.shape)
        if wrong := [axis for axis in axes if not -count <= axis < count]:
            raise ValueError(
                f"Expected argument `vectors` to name axes of the activation of layer {name!r}, whose shape is"
                f" {layer.shape}, but got {wrong[0]}."
            )
        own = [axis % count for axis in axes]
        return tuple(layer.order.index(axis) for axis in own) if layer.order else tuple(own)

    def wants(self, name: str) -> bool:
        """Whether anything is done with rows of a layer in the pass at hand."""
        return self.in_first_pass or self.layers[name].active or bool(self.influences.get(name))

    def end_pass(self, device: torch.device, n_skipped: int) -> None:
        """Join what the processes have seen, and missed, in one pass, and begin a second one if a measure needs it."""
        shapes = {name: (layer.shape, layer.channel_axis) for name, layer in self.layers.items()}
        gathered = gather_objects(
            (shapes, self.n_samples, self.input_shape, n_skipped, self.left_out, self.sample_keys)
        )
        all_shapes, numbers, input_shapes, skipped, *_ = zip(*gathered, strict=True)
        for of_process, *_, left_out, keys in reversed(gathered):  # the first process has the last word on reasons
            for layer, (shape, _) in of_process.items():
                if layer in self.layers and self.layers[layer].shape != shape:
                    self.leave_out(layer, ragged(self.layers[layer].shape, shape))
            for layer, reason in left_out.items():
                self.leave_out(layer, reason)
            self.sample_keys.update(keys)
        home = summed_on(device)
        if len(gathered) > 1:
            self._add_unseen(all_shapes, next((shape for shape in input_shapes if shape is not None), ()), home)
            of_layers = (self.influences.get(name, {}) for name in self.layers)
            merge([*self.layers.values()], [each for found in of_layers for each in found.values()], device)
        if not self.in_first_pass:
            self.finished = True
            return
        self.n_samples, self.n_skipped = sum(numbers), sum(skipped)
        self.in_first_pass = False
        for name in self.layers:
            self._begin_second_pass(name, home)
        self.finished = not any(map(self.wants, self.layers))

    def _new_layer(
        self, name: str, shape: tuple[int, ...], channel_axis: int, device: torch.device, order: tuple[int, ...] = ()
    ) -> LayerState:
        applicable = self.applicable(name, shape, channel_axis)
        needs = [a for measure in applicable.values() if names_accumulators(measure) for a in measure.needs]
        needs = needs if name == INPUT else with_dead(needs)
        layer = LayerState(needs, shape, channel_axis, order, len(self.transformations), device)
        self.layers[name], self.metrics[name] = layer, {}
        for key, measure in applicable.items():
            if not names_accumulators(measure):
                self.metrics[name][key] = _clone(measure, device)
        return layer

    def _begin_second_pass(self, name: str, device: torch.device) -> None:
        """Prepare what a layer needs of a second pass, given the sums of the first one."""
        layer, begun = self.layers[name], []
        influences: dict[str, Influence] = {}
        for key, measure in self.applicable(name, layer.shape, layer.channel_axis).items():
            if not names_accumulators(measure):
                continue
            sums = layer.sums(measure.needs)
            if measure.needs_again and sums.n_samples and measure.needs_second_pass(sums):
                states = measure.second_pass(sums)
                begun += [(accumulator, states) for accumulator in measure.needs_again]
            wanted = name != INPUT and wants_intervals(measure, self.confidence)
            if wanted and has_influences(measure, sums, self.n_samples):
                influences[key] = Influence(measure, sums)
        layer.begin_second_pass(begun, device)
        self.influences[name] = influences

    def _add_unseen(
        self, of_processes: Sequence[dict[str, Shape]], input_shape: tuple[int, ...], device: torch.device
    ) -> None:
        """Add the layers that only other processes have seen, in one order everywhere."""
        self.know_input(input_shape)
        order: dict[str, Shape] = {}
        for shapes in of_processes:
            for name, about in shapes.items():
                if name not in self.left_out:
                    order.setdefault(name, about)
        for name, about in order.items():
            if name not in self.layers:
                self._new_layer(name, *about, device)
        self.layers = {name: self.layers[name] for name in order}


def _clone(metric: Metric, device: torch.device) -> Metric:
    found = deepcopy(metric)
    found.reset()
    return found.to(device)


def wants_intervals(measure: Measure, confidence: float | None) -> bool:
    """Whether the influences of samples on a measure are wanted and can be found."""
    wanted = confidence is not None and measure.has_intervals
    return wanted and all(accumulator.has_shares or accumulator.in_groups for accumulator in measure.needs)


def merge(layers: Sequence[LayerState], influences: Sequence[Influence], device: torch.device) -> None:
    """Give the sums of a pass the merged states of all processes."""
    own = [layer.states() for layer in layers] + [influence.states for influence in influences]
    merges = [layer.merged for layer in layers] + [influence.merged for influence in influences]
    merged = merge_over_ranks(own, merges, device)
    for layer, states in zip(layers, merged, strict=False):
        layer.load(states)
    for influence, states in zip(influences, merged[len(layers) :], strict=True):
        influence.states = states


def as_summed(st: Tensor) -> Tensor:
    """Activations where they are summed, in a type that accumulators take."""
    if not st.is_cpu:
        st = st.to(summed_on(st.device))
    return st if st.dtype in TYPES else st.float()
