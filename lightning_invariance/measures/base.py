"""What every measure has in common: ST blocks in, one value for each activation out, states that merge."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_invariance.distributed import merge_over_ranks
from lightning_invariance.functional.variance import aggregate_maps
from lightning_invariance.plots.bars import draw_bars
from lightning_invariance.transforms import TransformationSet

States = dict[str, Tensor]


#: Attributes that every update sets, and which are neither states, parameters nor modules.
PLAIN_ATTRIBUTES = frozenset(["_computed", "_update_count"])


class Measure(Metric):
    """Base of all measures: a ``torchmetrics.Metric`` of ST blocks whose states merge exactly.

    An ST block is a tensor ``(samples, transformations, *activation_shape)``: complete rows of the ST matrix of every
    activation of one layer. The states of a measure have a fixed number of dimensions, are empty before the first
    update, and :meth:`_merge` joins two of them, so that batches, processes and runs add up in any order.

    A subclass registers its states with :meth:`_add_states`, and gives :meth:`_add`, :meth:`_merge` and
    ``compute``.
    """

    is_differentiable = False
    higher_is_better: bool | None = False  # lower is more invariant
    full_state_update = False

    n_samples: Tensor
    columns: Tensor
    activation_shape: Tensor

    #: States that stay on the CPU wherever the measure is: to read them from another device would be to wait for it.
    read_states: tuple[str, ...] = ("n_samples", "columns", "activation_shape")

    #: Rows are taken in groups with about this many values of each activation, which bounds the rounding of one step.
    values_at_once: ClassVar[int] = 256

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # These are states like the rest, since a process that saw no sample learns them from the others.
        self._add_states(n_samples=torch.tensor(0), columns=torch.tensor(0))
        self._add_states(activation_shape=torch.zeros(0, dtype=torch.long))

    def __setattr__(self, name: str, value: Any) -> None:
        # A module looks whether a value is a parameter or a module: for each layer and batch that is felt.
        if name in self.__dict__.get("_defaults", ()) or name in PLAIN_ATTRIBUTES:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _add_states(self, **empty: Tensor) -> None:
        """Register states by their empty values."""
        for name, default in empty.items():
            self.add_state(name, default, dist_reduce_fx=None)

    #: How often a walk may have to show the measure every row; :meth:`end_pass` is called before each further pass.
    passes: ClassVar[int] = 1

    #: Whether updates may change the states in place, as in a walk, where nobody else holds them.
    in_place = False

    #: Whether results shall tell what the measure gives for a network that returns its input.
    has_floor: ClassVar[bool] = False

    @property
    def complete(self) -> bool:
        """Whether the passes so far are enough to compute the value."""
        return True

    def end_pass(self) -> None:
        """Prepare for the next pass over the same rows; the states are those of all processes."""

    def prepare(
        self, transformations: TransformationSet, input_shape: Sequence[int], n_samples: int | None = None
    ) -> None:
        """Learn, before the first update, what will come.

        Args:
            transformations: what the columns are.
            input_shape: of a network input.
            n_samples: how many samples all processes together will show, named by the ``indices`` 0 to n − 1, if known.

        Raises:
            ValueError: If the measure cannot work with these transformations.
        """

    def applies_to(self, activation_shape: Sequence[int]) -> bool:
        """Whether the measure is defined for activations of this shape; a walk leaves out the other layers."""
        return True

    def dead(self) -> Tensor | None:
        """Which activations never changed: bool of ``activation_shape``; None where the measure does not know."""
        return None

    def response(self) -> Tensor | None:
        """The part of each transformation in the value of the layer, ``(m,)``; None where it is not measured."""
        return None

    @property
    def update_rule(self) -> frozenset[Hashable]:
        """What an update adds up. A measure whose rule is part of another's is served by the update of that other.

        By default unique.
        """
        return frozenset([id(self)])

    def update(self, st_block: Tensor) -> None:
        """Add complete rows of the ST matrix.

        Args:
            st_block: floating-point tensor ``(samples, transformations, *activation_shape)``.

        Raises:
            ValueError: If the block has fewer than two dimensions, or other transformations or another activation
                shape than the blocks before.
            TypeError: If the block is not of a real floating-point type.
        """
        self._update(st_block)

    def add(self, st_block: Tensor, **of_rows: Any) -> None:
        """What a walk calls instead of ``update``; a measure whose updates are many and short may keep them shorter."""
        self.update(st_block, **of_rows)

    def _update(self, st_block: Tensor, **of_rows: Tensor) -> None:
        """Check a block and add its rows, with what ``of_rows`` says of each."""
        if not isinstance(st_block, Tensor) or not st_block.is_floating_point():
            kind = st_block.dtype if isinstance(st_block, Tensor) else type(st_block).__name__
            raise TypeError(f"Expected argument `st_block` to be a real floating-point tensor, but got {kind}.")
        if st_block.ndim < 2 or 0 in st_block.shape[2:]:
            raise ValueError(
                "Expected non-empty argument `st_block` of shape (samples, transformations, *activation_shape),"
                f" but got {tuple(st_block.shape)}."
            )
        n, m, *shape = st_block.shape
        if n == 0 or m == 0:
            return
        self._check_shape(m, shape)
        with torch.no_grad():
            x = st_block.detach().reshape(n, m, -1)
            x = x if x.dtype == torch.float64 else x.float()
            step = max(1, self.values_at_once // m)
            for start in range(0, n, step):
                rows = slice(start, min(start + step, n))
                self._add(x[rows], **{name: values[rows] for name, values in of_rows.items()})
                self.n_samples = self.n_samples + (rows.stop - start)

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = ()) -> Module:
        return super()._apply(fn, (*exclude_state, *self.read_states))

    def _check_shape(self, m: int, shape: list[int]) -> None:
        if self.n_transformations == 0:
            self.activation_shape = torch.tensor(shape, dtype=torch.long)
            self.columns = torch.tensor(m)
        known_m, known_shape = self.n_transformations, self.activation_shape.tolist()
        if m != known_m:
            raise ValueError(f"Expected ST blocks with {known_m} transformations, but got {m}.")
        if shape != known_shape:
            raise ValueError(
                f"Expected ST blocks of activations of shape {tuple(known_shape)}, but got {tuple(shape)}."
            )

    @property
    def n_transformations(self) -> int:
        """Number of transformations m of the blocks so far; 0 before the first."""
        return int(self.columns)

    @abstractmethod
    def _add(self, x: Tensor, **of_rows: Tensor) -> None:
        """Add rows ``(samples, transformations, activations)`` in float32 or float64, not yet in ``n_samples``."""

    @abstractmethod
    def _merge(self, a: States, b: States) -> States:
        """The states after the rows of both; neither is empty, neither is changed."""

    def _shaped(self, values: Tensor) -> Tensor:
        """Give ``(activations,)`` the shape of the activation."""
        return values.view(self.activation_shape.tolist())

    def _enough(self, samples: int = 1, transformations: int = 2) -> bool:
        """Whether the measure is defined; warns where it is not."""
        n, m = int(self.n_samples), self.n_transformations
        if n >= samples and m >= transformations:
            return True
        rank_zero_warn(
            f"{type(self).__name__} needs at least {samples} samples and {transformations} transformations, but got {n}"
            f" and {m}: the value is NaN.",
            UserWarning,
        )
        return False

    def plot(self, val: Tensor | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw a bar for each channel: the mean over the spatial axes. Infinite values reach the top, NaN are grey.

        Args:
            val: what ``compute`` or ``forward`` returned; by default ``compute()`` is called.
            ax: axes to draw into; by default those of a new figure.

        Returns:
            The figure and the axes.
        """
        values = self.compute() if val is None else val
        if ax is None:
            ax = Figure(figsize=(6, 3), layout="constrained").add_subplot()
        draw_bars(ax, aggregate_maps(values, "mean").tolist(), type(self).__name__)
        return ax.figure, ax  # type: ignore[return-value]

    def _reduce_states(self, incoming_state: States) -> None:
        """Merge other states into the own ones (called by ``forward`` and ``merge_state``)."""
        own: States = {name: getattr(self, name) for name in self._defaults}
        for name in own:
            if name not in incoming_state:
                raise ValueError(f"Expected a state {name!r} in the states to merge, but got {list(incoming_state)}.")
        self._set_states(self._merged(incoming_state, own))

    def _merged(self, a: States, b: States) -> States:
        """Merge with the identity: empty states."""
        if b["n_samples"] == 0 or a["n_samples"] == 0:
            full = a if b["n_samples"] == 0 else b
            return {name: state.clone() for name, state in full.items() if name in self._defaults}
        shapes = [(int(states["columns"]), *states["activation_shape"].tolist()) for states in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "Expected states of one shape (transformations, *activation_shape),"
                f" but got {shapes[0]} and {shapes[1]}."
            )
        about = {"n_samples": a["n_samples"] + b["n_samples"]}
        return {**self._merge(a, b), **about, "columns": a["columns"], "activation_shape": a["activation_shape"]}

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the states of another measure of the same class, or a dictionary of states, into this one."""
        super().merge_state(incoming_state)
        # The base class forgets both: a cached value would stay, and compute would warn of a missing update.
        self._computed = None
        self._update_count += getattr(incoming_state, "_update_count", 1)

    def _sync_dist(
        self, dist_sync_fn: Callable[..., list[Tensor]] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Replace the own states by the merged states of all processes."""
        merge_over_ranks([self], self.device, process_group or self.process_group)

    def _set_states(self, states: States) -> None:
        for name in self._defaults:
            setattr(self, name, states[name])
