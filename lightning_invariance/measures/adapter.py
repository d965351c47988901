"""Base class of measures: a ``torchmetrics.Metric`` that updates, merges and synchronises accumulators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_invariance.accumulators.base import Accumulator, check_declaration
from lightning_invariance.accumulators.configuration import configuration_of
from lightning_invariance.accumulators.layer_state import LayerState
from lightning_invariance.accumulators.rows import N_SAMPLES, TYPES, Context, Rows, States
from lightning_invariance.distributed import merge_over_ranks
from lightning_invariance.precision import has_float64, summed_on
from lightning_invariance.transforms import TransformationSet


def keeping_shape(metric: Any, compute: Callable[..., Any]) -> Callable[..., Any]:
    """A ``compute`` whose value of one number has the shape that the metric notes as ``_value_shape``."""

    @wraps(compute)
    def shaped(*args: Any, **kwargs: Any) -> Any:
        value = compute(*args, **kwargs)
        return value.view(metric._value_shape) if isinstance(value, Tensor) and value.numel() == 1 else value

    return shaped


class AccumulatingMetric(Metric):
    """A metric whose states are the sums of accumulators; :class:`Measure` computes a value from them.

    Further states are ``n_samples``, ``columns`` (the number of transformations) and ``activation_shape``, which a
    process without samples gets from the others, and ``configuration``, a fingerprint of the accumulators, so that
    states of measures with different arguments cannot be merged.

    Args: see :class:`Measure`.
    """

    is_differentiable = False
    full_state_update = False

    #: The accumulators of the first pass.
    needs: tuple[Accumulator, ...] = ()

    #: The accumulators of a second pass over the same rows; empty for measures of one pass.
    needs_again: tuple[Accumulator, ...] = ()

    n_samples: Tensor
    columns: Tensor
    activation_shape: Tensor
    configuration: Tensor

    def __init__(
        self,
        needs: Sequence[Accumulator] | None = None,
        needs_again: Sequence[Accumulator] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        passes = (self.needs if needs is None else needs, self.needs_again if needs_again is None else needs_again)
        self.needs, self.needs_again = ((p,) if isinstance(p, Accumulator) else tuple(p) for p in passes)
        if not self.needs:
            raise ValueError(f"Expected {type(self).__name__} to name accumulators in `needs`, but it names none.")
        none = torch.zeros(0, dtype=torch.long)
        states = {N_SAMPLES: torch.tensor(0), "columns": torch.tensor(0)}
        states |= {"activation_shape": none, "configuration": none}
        on_cpu = [*states]
        for accumulator in (*self.needs, *self.needs_again):
            declared = check_declaration(accumulator)
            if taken := [name for name in declared if name in states or hasattr(self, name)]:
                raise ValueError(
                    "Expected states whose names differ from other states and from a metric's attributes, but"
                    f" {taken} of {type(accumulator).__name__} are taken: rename them."
                )
            states.update(declared)
            on_cpu += accumulator.cpu_states
        for name, empty in states.items():
            self.add_state(name, empty, dist_reduce_fx=None)
        #: States that stay on the CPU wherever the metric is, since reading them from a GPU would synchronise.
        self.read_states: tuple[str, ...] = tuple(on_cpu)

    @property
    def n_transformations(self) -> int:
        """Number of transformations m of the blocks; 0 before the first block."""
        return int(self.columns)

    @property
    def in_second_pass(self) -> bool:
        """Whether a second pass over the same rows has begun."""
        return any(getattr(self, name).numel() for accumulator in self.needs_again for name in accumulator.empty())

    def prepare(
        self, transformations: TransformationSet, input_shape: Sequence[int] = (), n_samples: int | None = None
    ) -> None:
        """Describe the data to the accumulators before the first update.

        Args:
            transformations: the columns of the ST matrix.
            input_shape: of a network input, if known.
            n_samples: number of samples in all processes together, if known; their ``indices`` are then 0 to n − 1.

        Raises:
            ValueError: If an accumulator cannot work with these transformations.
        """
        self.prepare_for(Context(transformations, tuple(input_shape), n_samples))

    def prepare_for(self, context: Context) -> None:
        """:meth:`prepare` with everything that an evaluation knows."""
        self.needs = tuple(accumulator.prepared(context) for accumulator in self.needs)
        self.needs_again = tuple(accumulator.prepared(context) for accumulator in self.needs_again)

    def set_dtype(self, dst_type: str | torch.dtype) -> AccumulatingMetric:
        """Return the metric unchanged: states keep the types that exact sums need, and values are float64."""
        return self

    def update(self, st_block: Tensor, indices: Tensor | None = None, labels: Tensor | None = None) -> None:
        """Add complete rows of the ST matrix.

        Args:
            st_block: floating-point tensor ``(samples, transformations, *activation_shape)``.
            indices: ``(samples,)``, integers that identify the samples, for measures that keep some of them; without
                indices they identify samples by their activations.
            labels: ``(samples,)``, the class of each sample, for measures of classes.

        Raises:
            ValueError: If the block has fewer than two dimensions, or its number of transformations or activation
                shape differs from earlier blocks.
            TypeError: If the block is not a real floating-point tensor.
        """
        self._add_rows(st_block, indices, labels)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the states of another metric of the same class, or a dictionary of states, into this one.

        Raises:
            ValueError: If a state is missing, or the states have other shapes or come from other arguments.
        """
        super().merge_state(incoming_state)
        # Without these, compute would return a cached value, or warn of a missing update.
        self._computed = None
        self._update_count += getattr(incoming_state, "_update_count", 1)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Let a value keep its shape: torchmetrics makes ``()`` of ``(1,)``."""
        return keeping_shape(self, super()._wrap_compute(compute))

    def _add_rows(self, st_block: Tensor, indices: Tensor | None, labels: Tensor | None) -> None:
        values = checked_block(st_block)
        if not self.configuration.numel():
            self.configuration = configuration_of((*self.needs, *self.needs_again))
        n, m, *shape = values.shape
        if n == 0 or m == 0:
            return
        if self.n_transformations == 0:
            self.activation_shape, self.columns = torch.tensor(shape, dtype=torch.long), torch.tensor(m)
        known_m, known_shape = self.n_transformations, self.activation_shape.tolist()
        if m != known_m:
            raise ValueError(f"Expected ST blocks with {known_m} transformations, but got {m}.")
        if shape != known_shape:
            raise ValueError(
                f"Expected ST blocks of activations of shape {tuple(known_shape)}, but got {tuple(shape)}."
            )
        layer = self._layer_state({name: state.clone() for name, state in self.states().items()})
        with torch.no_grad():
            layer.add(Rows(values, None if indices is None else indices.cpu(), labels))
        layer.check()
        self.set_states({**self.states(), **layer.states(numbered=False)})

    def _layer_state(self, states: States) -> LayerState:
        """The accumulators of the current pass, with these states."""
        active = self.needs_again if self.in_second_pass else self.needs
        shape, m = tuple(states["activation_shape"].tolist()), int(states["columns"])
        layer = LayerState(active, shape, n_transformations=m)
        layer.load(states, numbered=False)
        return layer

    def states(self) -> States:
        """The states by name."""
        return {name: getattr(self, name) for name in self._defaults}

    def set_states(self, states: States) -> None:
        """Replace the states."""
        for name in self._defaults:
            setattr(self, name, states[name])

    def _reduce_states(self, incoming_state: States) -> None:
        """Merge other states into this metric: a hook of ``forward`` and ``merge_state`` of the base class."""
        for name in self._defaults:
            if name not in incoming_state:
                raise ValueError(f"Expected a state {name!r} in the states to merge, but got {list(incoming_state)}.")
        self.set_states(self.merged_states(incoming_state, self.states()))

    def merged_states(self, a: States, b: States) -> States:
        """The states after the rows of both; one may be empty."""
        made_by = [states["configuration"] for states in (a, b) if states["configuration"].numel()]
        if len(made_by) == 2 and not torch.equal(*made_by):
            raise ValueError(
                f"Expected states of a {type(self).__name__} with the same arguments, but got states of other"
                " arguments."
            )
        if not int(a[N_SAMPLES]) or not int(b[N_SAMPLES]):
            full = a if int(a[N_SAMPLES]) else b
            return {name: full[name].clone() for name in self._defaults}
        shapes = [(int(states["columns"]), *states["activation_shape"].tolist()) for states in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "Expected states of one shape (transformations, *activation_shape),"
                f" but got {shapes[0]} and {shapes[1]}."
            )
        return {**{name: a[name] for name in self._defaults}, **self._layer_state(a).merged(a, b, numbered=False)}

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Replace the states by the merged states of all processes: a hook of ``sync`` of the base class."""
        group = process_group or self.process_group
        (states,) = merge_over_ranks([self.states()], [self.merged_states], self.device, group)
        self.set_states(states)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> Module:
        """Move the states, but keep on the CPU what is read there, and all states for a device without float64."""
        before, after = (has_float64(each.device) for each in (self, fn(torch.zeros(1, device=self.device))))
        if not (before and after):
            self._computed = self._forward_cache = None  # a value on the other device has another type
        return super()._apply(fn, (*exclude_state, *(self.read_states if after else self._defaults)))


def checked_block(st_block: Any) -> Tensor:
    """Detach an ST block, convert it to one of :data:`TYPES` and move it to a device with float64.

    Raises:
        ValueError: If it has fewer than two dimensions, or no activations.
        TypeError: If it is not a real floating-point tensor.
    """
    if not isinstance(st_block, Tensor) or not st_block.is_floating_point():
        kind = st_block.dtype if isinstance(st_block, Tensor) else type(st_block).__name__
        raise TypeError(f"Expected argument `st_block` to be a real floating-point tensor, but got {kind}.")
    if st_block.ndim < 2 or 0 in st_block.shape[2:]:
        raise ValueError(
            "Expected non-empty argument `st_block` of shape (samples, transformations, *activation_shape),"
            f" but got {tuple(st_block.shape)}."
        )
    values = st_block.detach().to(summed_on(st_block.device))
    return values if values.dtype in TYPES else values.float()
