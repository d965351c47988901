"""The layers of a network and their accumulators, while the rows of the ST matrix go by."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_invariance.accumulators.base import (
    N_SAMPLES,
    TYPES,
    Context,
    Rows,
    check_states,
    merged,
)
from lightning_invariance.data.loader import STBlock
from lightning_invariance.distributed import gather_or_raise, merge_over_ranks, rank_and_world_size
from lightning_invariance.engine.assembly import Assembly
from lightning_invariance.engine.layer_state import Layer, Tally, memory_order
from lightning_invariance.engine.needed import INPUT, Needed
from lightning_invariance.measures.base import names_accumulators
from lightning_invariance.model.channels import usual_channel_axis
from lightning_invariance.model.layout import RAGGED
from lightning_invariance.precision import summed_on
from lightning_invariance.transforms import TransformationSet


class Registry:
    """Adds blocks of activations to the accumulators of every layer, each of which exists once.

    Args:
        measures: name → metric. Of a :class:`Measure` the accumulators are updated; of any other metric every layer
            gets a clone, which is updated with the block.
        transformations: the columns of the ST matrix.
        expected: how many samples there will be, if known.
        run: how many samples in a row a process shows.
        confidence: of intervals: how much each sample moves each value is then found, in a second pass where one does
            not do; None for none.

    Attributes:
        layers: name → layer, in the order in which they ran.
        n_samples: number of complete rows.
        in_first_pass: whether this is the first time that the rows are shown.
        finished: whether every row was seen as often as the measures need.
        input_shape: of the transformed input.
        left_out: layer → why it was not measured.
        sample_keys: number of a sample → its key, where blocks carry them.
        expected: how many samples there will be, if known.
        needs: what the measures need.
        with_any_channel_axis: whether activations keep the channels where they are in memory: if all measures take
            that. Not with several processes, which must agree.
    """

    def __init__(
        self,
        measures: Mapping[str, Metric],
        transformations: TransformationSet,
        expected: int | None = None,
        run: int = 0,
        confidence: float | None = None,
    ) -> None:
        self.measures = measures
        self.transformations = transformations
        self.layers: dict[str, Layer] = {}
        self.n_samples = 0
        self.finished = False
        self.input_shape: tuple[int, ...] | None = None
        self.left_out: dict[str, str] = {}
        self.expected, self._run, self.confidence = expected, run, confidence
        self.sample_keys: dict[int, int] = {}
        self.in_first_pass = True
        # Raises where a measure cannot work with the transformations.
        self.needs = self._needed(())
        takes = (names_accumulators(measure) and measure.takes_any_channel_axis for measure in measures.values())
        self.with_any_channel_axis = all(takes) and rank_and_world_size()[1] == 1
        self._in_parts = any(a.takes_parts for needs in self.needs.first.values() for a in needs)
        self._m = len(transformations)
        self._assembly = Assembly(self._m)
        self._row = 0  # counts those that have begun
        self._block: STBlock | None = None
        self._memo: dict[Hashable, Any] = {}  # of this block, for all layers
        self._about: dict[str, dict[str, Any]] = {}  # by metric that is no Measure: what its update takes

    def start_block(self, block: STBlock) -> None:
        """The outputs that follow belong to this block."""
        self._block, self._memo, self._about = block, {}, {}
        self._row += block.columns.start == 0
        if self.in_first_pass and block.columns.stop == len(self.transformations):
            self.n_samples += len(block.inputs)
            if block.keys is not None:
                self.sample_keys.update(zip(block.indices.tolist(), block.keys.tolist(), strict=True))

    def start_input(self, inputs: Tensor) -> None:
        """These are the transformed inputs ``(rows, columns, *input_shape)`` of the block."""
        if self.input_shape is None:
            self.input_shape = tuple(inputs.shape[2:])
            self.needs = self._needed(self.input_shape)
        if any(names_accumulators(measure) and measure.has_floor for measure in self.measures.values()):
            self.add(INPUT, inputs, usual_channel_axis(self.input_shape))

    def leave_out(self, layer: str, reason: str) -> None:
        """Forget a layer that cannot be measured."""
        self.left_out[layer] = reason
        self.layers.pop(layer, None)

    def add(self, name: str, st: Tensor, channel_axis: int = 0) -> bool:
        """Add what a layer made of the block's inputs: complete rows, or a part of one row.

        Args:
            name: of the layer.
            st: ``(rows, columns, *activation_shape)``.
            channel_axis: which axis of the activation holds the channels.

        Returns:
            False if its activation had another shape before, or rows that are added in parts reached it in part;
            nothing is added then.
        """
        if (block := self._block) is None:
            raise RuntimeError("Expected a block before its activations.")
        st = _as_summed(st)
        layer = self.layers.get(name)
        if layer is None:
            order = memory_order(st[0, 0], channel_axis) if self.with_any_channel_axis else ()
            layer = self.layers[name] = self.needs.new_layer(name, tuple(st.shape[2:]), channel_axis, st.device, order)
        if st.shape[2:] != layer.shape:
            return False
        st, channel_axis = layer.in_order(st), layer.ordered_channel_axis
        last = block.columns.stop == self._m
        active = layer.first if self.in_first_pass else layer.second
        goes_on = st.shape[1] == self._m or self._assembly.goes_on(name, block.columns, self._row)
        if self._in_parts:
            if name in self._assembly.partial:
                return False
            rows = self._rows(block, st, last, channel_axis)
            rows.widen()
            st = rows.values
            self._update([tally for tally in active if tally.accumulator.takes_parts], rows)
            active = [tally for tally in active if not tally.accumulator.takes_parts]
        waiting = layer.waiting
        wanted = goes_on and (active or layer.metrics or waiting)
        whole = self._assembly.complete(name, st, block.columns) if wanted else None
        if whole is not None:
            rows = self._rows(block, whole, True, channel_axis)
            rows.keep_shares = bool(waiting) and self.in_first_pass
            self._update(active, rows)
            for influence in waiting:
                influence.add(rows)
            for key, metric in layer.metrics.items() if self.in_first_pass else ():
                rows.widen()
                kept = rows.values.clone()  # it may be kept, while later modules change activations in place
                metric.update(kept, **self._arguments(key, metric, block))
        return True

    def _rows(self, block: STBlock, st: Tensor, last: bool, channel_axis: int) -> Rows:
        """What a layer made of the block's inputs, as accumulators take it."""
        return Rows(st, block.indices, block.labels, 0, last, {}, self._memo, channel_axis)

    def _update(self, tallies: Iterable[Tally], rows: Rows) -> None:
        """Add rows, or a part of one, to accumulators, each of which counts its own."""
        for tally in tallies:
            rows.before = tally.n_samples
            if not tally.accumulator.takes_half:
                rows.widen()
            tally.accumulator.add_(tally.states, rows)
            if not tally.n_samples:
                check_states(tally.accumulator, tally.states, "add")
            if rows.last:
                tally.n_samples += rows.values.shape[0]

    def _arguments(self, key: str, metric: Metric, block: STBlock) -> dict[str, Any]:
        """What the update of a metric takes beside the activations."""
        if key not in self._about:
            known = {name: v for name in ("indices", "labels") if (v := getattr(block, name)) is not None}
            self._about[key] = metric._filter_kwargs(**known)
        return self._about[key]

    def _needed(self, input_shape: tuple[int, ...]) -> Needed:
        """What the measures need, for what is known now."""
        context = Context(self.transformations, input_shape, self.expected, self._run)
        return Needed(self.measures, context, self.confidence)

    def end_pass(self, device: torch.device, error: BaseException | None = None) -> None:
        """Join what the processes have seen in one pass, and begin a second one if a measure needs it.

        Raises:
            RuntimeError: If another process failed, with its error. The one that failed raises that itself.
        """
        for name in self._assembly.end() if self._in_parts else ():
            self.leave_out(name, RAGGED)
        shapes = {name: (layer.shape, layer.channel_axis) for name, layer in self.layers.items()}
        told = gather_or_raise((shapes, self.n_samples, self.input_shape, self.left_out, self.sample_keys), error)
        for *_, left_out, keys in reversed(told):  # the reason that the first process found
            self.left_out.update(left_out)
            self.sample_keys.update(keys)
        home = summed_on(device)
        if len(told) > 1:
            self._add_unseen(told, home)
            self._merge(device)
        if not self.in_first_pass:
            self.finished = True
            return
        self.n_samples = sum(n for _, n, *_ in told)
        self.in_first_pass = False
        for name, layer in self.layers.items():
            self.needs.begin_second_pass(name, layer, self.n_samples, home)
        self.finished = not any(layer.second or layer.waiting for layer in self.layers.values())

    def _add_unseen(
        self, told: Sequence[tuple[dict[str, tuple[tuple[int, ...], int]], int, Any, Any, Any]], device: torch.device
    ) -> None:
        """Make the layers that only other processes have seen, in one order everywhere."""
        if self.input_shape is None:
            self.input_shape = next((shape for _, _, shape, *_ in told if shape is not None), None)
            self.needs = self._needed(self.input_shape or ())
        order: dict[str, tuple[tuple[int, ...], int]] = {}
        for shapes, *_ in told:
            for name, about in shapes.items():
                if name not in self.left_out:
                    order.setdefault(name, about)
        self.layers = {
            name: self.layers.get(name) or self.needs.new_layer(name, *about, device) for name, about in order.items()
        }

    def _merge(self, device: torch.device) -> None:
        """Give the accumulators of this pass the merged states of all processes."""
        layers = self.layers.values()
        tallies = [tally for layer in layers for tally in (layer.first if self.in_first_pass else layer.second)]
        influences = [influence for layer in layers for influence in layer.waiting]
        own = [tally.counted() for tally in tallies] + [influence.states for influence in influences]
        merges = [partial(merged, tally.accumulator) for tally in tallies] + [i.merged for i in influences]
        found = merge_over_ranks(own, merges, device)
        for influence, states in zip(influences, found[len(tallies) :], strict=True):
            influence.states = states
        for tally, states in zip(tallies, found, strict=False):
            tally.n_samples = int(states.pop(N_SAMPLES))
            tally.states = states


def _as_summed(st: Tensor) -> Tensor:
    """Activations where they are summed, in a type that accumulators take."""
    if not st.is_cpu:
        st = st.to(summed_on(st.device))
    return st if st.dtype in TYPES else st.float()
