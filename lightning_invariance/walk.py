"""The measures of every layer while a walk over the ST matrix feeds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_invariance.distributed import gather_or_raise, merge_over_ranks
from lightning_invariance.groups import INPUT, Group, applies, computed, groups_of, leader_of, lend, passes_of
from lightning_invariance.loader import STBlock
from lightning_invariance.measures import Measure
from lightning_invariance.measures.longrows import LongRows
from lightning_invariance.result import InvarianceResult
from lightning_invariance.transforms import TransformationSet


class Walk:
    """Feeds blocks of activations to the measures of every layer, and makes the result.

    Args:
        measures: name → metric; every layer gets a clone of each that is updated.
        transformations: the columns of the ST matrix.
        milestones: numbers of samples after which the values so far are noted, in rising order.
        expected: how many samples there will be, if known.

    Attributes:
        finished: whether the measures have seen every row as often as they need to.
        n_samples: how many complete rows there were.
    """

    def __init__(
        self,
        measures: Mapping[str, Metric],
        transformations: TransformationSet,
        milestones: Sequence[int] = (),
        expected: int | None = None,
    ) -> None:
        self.finished = False
        self.n_samples = 0
        self._pass = 1
        self._expected = None if milestones else expected  # of a part of them the choices are others
        self._again: list[Measure] = []  # those that this pass is for, if it is not the first
        self._measures = measures
        self._groups = groups_of(measures)
        self._followers: dict[str, Metric] = {}
        self._layers: dict[str, list[Group]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._transformations = transformations
        self._n_transformations = len(transformations)
        self._has_floor = any(isinstance(metric, Measure) and metric.has_floor for metric in measures.values())
        self._block: STBlock | None = None
        self._choices: dict[Any, Any] = {}
        self._taken: dict[type[Metric], tuple[str, ...]] = {}
        self._fed: dict[str, list[tuple[Callable[..., None], tuple[str, ...]]]] = {}  # by layer: update, what it takes
        self._parts: dict[str, list[Tensor]] = {}
        self._batch_axes: dict[str, int] = {}
        self._entered = True
        self._in_parts = all(isinstance(metric, LongRows) for metric in measures.values())
        self._milestones = list(milestones)
        self._noted: list[InvarianceResult] = []

    @property
    def layers(self) -> list[str]:
        """The layers that ran."""
        return [layer for layer in self._layers if layer != INPUT]

    def start_block(self, block: STBlock, entered: bool = True) -> None:
        """The outputs that follow belong to this block.

        Args:
            block: the inputs.
            entered: if false, the inputs are not transformed yet, and nothing counts before :meth:`enter` does that.
        """
        if self._pass == 1 and self._milestones and self.n_samples >= self._milestones[0]:
            self._note()
        self._block, self._entered, self._choices = block, entered, {}
        if self._pass == 1 and block.columns.stop == len(self._transformations):
            self.n_samples += len(block.inputs)
        if entered:
            self._start(block, block.inputs)

    def enter(self, x: Tensor) -> Tensor:
        """Transform what reaches a module: ``(rows · columns, ...)``, each row so many times the same."""
        block = self._block
        if block is None:
            raise RuntimeError("Expected a block before its activations.")
        if self._entered:  # the module runs a second time
            return x
        rows, columns = block.inputs.shape[:2]
        if len(x) != rows * columns:
            raise RuntimeError(
                f"Expected the module of argument `transform_at` to take a batch of {rows * columns}, but it got an"
                f" input of shape {tuple(x.shape)}."
            )
        inputs = self._transformations[block.columns](x.reshape(rows, columns, *x.shape[1:])[:, 0])
        self._entered = True
        self._start(block, inputs)
        return inputs.flatten(0, 1)

    def _start(self, block: STBlock, inputs: Tensor) -> None:
        self._shapes[INPUT] = tuple(inputs.shape[2:])
        if self._has_floor:
            self._add(INPUT, block, inputs)

    def _note(self) -> None:
        """Compute what there is so far; a copy of a metric at a time, since computing may not disturb the walk."""
        self._milestones = [n for n in self._milestones if n > self.n_samples]
        noted = Walk({name: m for name, m in self._measures.items() if passes_of(m) == 1}, self._transformations)
        noted.n_samples, noted._shapes = self.n_samples, self._shapes
        for layer, groups in self._layers.items():
            copies = [deepcopy(group) for group in groups]
            for group in copies:
                for metric in group.values():
                    lend(metric, leader_of(group))
            noted._layers[layer] = [
                {name: metric} for group in copies for name, metric in group.items() if passes_of(metric) == 1
            ]
        self._noted.append(noted.result())

    def consume(self, layer: str, module: nn.Module, output: Tensor) -> None:
        """Update the measures of a layer with what it made of the block's inputs."""
        if self._block is None:
            raise RuntimeError("Expected a block before its activations.")
        if not self._entered:
            return
        rows, columns = self._block.inputs.shape[:2]
        output = self._batch_first(layer, module, output, rows * columns)
        self._add(layer, self._block, output.reshape(rows, columns, *output.shape[1:]))

    def _add(self, layer: str, block: STBlock, st: Tensor) -> None:
        m = self._n_transformations
        if self._in_parts:
            if layer not in self._layers:
                self._shapes[layer] = tuple(st.shape[2:])
                self._layers[layer] = self._new_groups(layer, st.device)
            for group in self._layers[layer]:
                leader_of(group).update(st, last=block.columns.stop == m)
            return
        if st.shape[1] < m:
            # A row longer than a batch: wait for the rest of it.
            parts = self._parts.setdefault(layer, [])
            parts.append(st.clone())
            if block.columns.stop < m:
                return
            st = torch.cat(self._parts.pop(layer), dim=1)
        if layer not in self._fed:
            self._fed[layer] = self._feeding(layer, st)
        shared: dict[Any, Any] = {}
        for update, names in self._fed[layer]:
            if not names:
                update(st)
                continue
            about = {"indices": block.indices, "labels": block.labels, "choices": self._choices, "shared": shared}
            update(st, **{name: about[name] for name in names if about[name] is not None})

    def _feeding(self, layer: str, st: Tensor) -> list[tuple[Callable[..., None], tuple[str, ...]]]:
        """What updates the measures of a layer in this pass, and what each takes besides the block."""
        if layer not in self._layers:
            self._shapes[layer] = tuple(st.shape[2:])
            self._layers[layer] = self._new_groups(layer, st.device)
        leaders = [leader_of(group) for group in self._layers[layer]]
        return [
            (leader.add if isinstance(leader, Measure) else leader.update, self._takes(leader))
            for leader in leaders
            if self._pass == 1 or any(leader is waiting for waiting in self._again)
        ]

    def _takes(self, metric: Metric) -> tuple[str, ...]:
        """What the update of a metric takes besides the block; looked up once for each class, since that takes time."""
        kind = type(metric)
        if kind not in self._taken:
            names = ("indices", "labels", "choices", "shared")
            self._taken[kind] = tuple(metric._filter_kwargs(**dict.fromkeys(names)))
        return self._taken[kind]

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
        return output.movedim(axis, 0) if axis else output

    def _new_groups(self, layer: str, device: torch.device) -> list[Group]:
        groups = [
            {leader: self._new_metric(leader, device), **{name: self._follower(name, device) for name in others}}
            for leader, *others in self._groups
        ]
        return [group for group in groups if applies(leader_of(group), layer, self._shapes[layer])]

    def _follower(self, name: str, device: torch.device) -> Metric:
        """A metric that has the states of its leader while it computes; one for all layers, since copies take time."""
        if name not in self._followers:
            self._followers[name] = self._new_metric(name, device)
        return self._followers[name]

    def _new_metric(self, name: str, device: torch.device) -> Metric:
        measure = self._measures[name]
        tensors = [*measure._defaults.values(), *(getattr(measure, state) for state in measure._defaults)]
        # Copying tensors takes the time: those that the measure resets to never change, and it has others after that.
        metric = deepcopy(measure, {id(tensor): tensor for tensor in tensors if isinstance(tensor, Tensor)})
        metric.reset()
        if device.type == "mps":  # which has no float64
            metric.set_dtype(torch.float32)
        if isinstance(metric, Measure):
            metric._to_sync = False  # the walk joins the processes, once for all measures
            metric.in_place = True
            metric.prepare(self._transformations, self._shapes[INPUT], self._expected)
        return metric.to(device)

    def end_pass(self, device: torch.device, error: BaseException | None = None) -> None:
        """Join what the processes have seen in one pass, and prepare the next.

        Raises:
            RuntimeError: If another process failed, with its error. The one that failed raises that itself.
        """
        told = gather_or_raise((self._shapes, self.n_samples), error)
        if len(told) > 1:
            self._add_unseen([shapes for shapes, _ in told], device)
            merge_over_ranks(self._again if self._pass > 1 else self._own_leaders(), device)
        if self._pass == 1:
            self.n_samples = sum(n for _, n in told)
        self._pass += 1
        self._again = [m for m in self._own_leaders() if self._pass <= m.passes and not m.complete]
        self._fed = {}
        for measure in self._again:
            measure.end_pass()
        self.finished = not self._again

    def _add_unseen(self, told: list[dict[str, tuple[int, ...]]], device: torch.device) -> None:
        """Make the measures of layers that only other processes have seen, in one order everywhere."""
        for shapes in told:
            for layer, shape in shapes.items():
                self._shapes.setdefault(layer, shape)
        order = {layer: None for shapes in told for layer in shapes if layer != INPUT or self._has_floor}
        for layer in order:
            if layer not in self._layers:
                self._layers[layer] = self._new_groups(layer, device)
        self._layers = {layer: self._layers[layer] for layer in order}

    def _own_leaders(self) -> list[Measure]:
        """The measures of this package that are updated."""
        leaders = (leader_of(group) for groups in self._layers.values() for group in groups)
        return [leader for leader in leaders if isinstance(leader, Measure)]

    def result(self) -> InvarianceResult:
        """Compute every measure of every layer, and forget the states."""
        values: dict[str, dict[str, Tensor]] = {name: {} for name in self._measures}
        dead: dict[str, Tensor] = {}
        response: dict[str, dict[str, list[float]]] = {}
        for layer, groups in self._layers.items():
            for group in groups:
                leader = leader_of(group)
                if isinstance(leader, Measure) and layer not in dead and (found := leader.dead()) is not None:
                    dead[layer] = found.cpu()
                for name, metric in group.items():
                    values[name][layer] = _of_shape(computed(metric, leader), self._shapes[layer])
                    if isinstance(metric, Measure) and (parts := metric.response()) is not None:
                        response.setdefault(name, {})[layer] = parts.tolist()
                leader.reset()  # its states would wait for the garbage collector: a metric refers to itself
        for follower in self._followers.values():
            follower.reset()
        floor = {name: layers.pop(INPUT) for name, layers in values.items() if INPUT in layers}
        dead.pop(INPUT, None)
        result = InvarianceResult(
            values,
            dead=dead,
            n_samples=self.n_samples,
            transformations=self._transformations.labels,
            parameters=self._transformations.parameters,
            floor=floor,
            response=response,
            skipped={name: [layer for layer in self.layers if layer not in values[name]] for name in values},
            higher_is_better={name: measure.higher_is_better for name, measure in self._measures.items()},
        )
        if self._noted:
            result.convergence = _convergence([*self._noted, result])
        return result


def _convergence(results: list[InvarianceResult]) -> dict[str, dict[str, dict[int, float]]]:
    """Measure → layer → number of samples → mean of the layer."""
    return {
        measure: {
            layer: {result.n_samples: result.per_layer(measure)[layer] for result in results}
            for layer in results[0][measure]
        }
        for measure in results[0]
    }


def _of_shape(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The value of a layer; torchmetrics has turned one of shape (1,) into a scalar."""
    if value.numel() == torch.Size(shape).numel():
        return value.reshape(shape)
    return value.reshape(1) if value.ndim == 0 and shape else value
