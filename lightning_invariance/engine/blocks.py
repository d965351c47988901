"""Turn the outputs of a network into ST blocks of complete rows, and add them to the states of its layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_invariance.accumulators.layer_state import LayerState
from lightning_invariance.data.loader import STBlock
from lightning_invariance.engine.registry import INPUT, Registry, as_summed
from lightning_invariance.model.channels import channel_axis_in, usual_channel_axis
from lightning_invariance.model.sample_axis import RAGGED, Finding, Layout


class Blocks:
    """Adds the outputs of layers to their states, as blocks ``(rows, columns, *activation_shape)``.

    Args:
        registry: where they go.
        channel_axes: layer or glob pattern → axis of the activation that holds the channels, where the user says.
        within: whether the inputs are transformed within the network, at :meth:`enter`: what runs before in a forward
            pass is not measured.

    Attributes:
        findings: layer → where the samples stand in its output, or why it cannot be measured; None before a probe.
        unknown: the layers that no probe has reached, with their outputs for this block.
    """

    def __init__(self, registry: Registry, channel_axes: Mapping[str, int] | None, within: bool) -> None:
        self.findings: dict[str, Finding] | None = None
        self.unknown: list[tuple[str, Tensor, int | None]] = []
        self._registry = registry
        self._channel_axes = channel_axes or {}
        self._within = within
        self._block: STBlock | None = None
        self._open = False
        self._row = 0  # counts rows that have begun
        self._long_rows: dict[str, tuple[Tensor, int, int]] = {}  # layer → values, row, where its columns end

    def start_block(self, block: STBlock) -> None:
        """The outputs that follow belong to this block."""
        self._block, self._open = block, not self._within
        self._row += block.columns.start == 0
        self._registry.start_block(block)
        if not self._within:
            self._start_input(block.inputs, block)

    def end_block(self) -> None:
        """Outputs that follow do not count."""
        self._block, self._open = None, False

    def enter(self, x: Tensor) -> Tensor:
        """Transform what reaches the module of ``transform_at``: ``(rows · columns, ...)``, each row as often."""
        block = self._block
        if block is None or self._open:  # in a probe, or the second time that the module runs
            return x
        rows, columns = block.inputs.shape[:2]
        if len(x) != rows * columns:
            raise RuntimeError(
                f"Expected the module of argument `transform_at` to take a batch of {rows * columns}, but it got an"
                f" input of shape {tuple(x.shape)}."
            )
        samples = x.reshape(rows, columns, *x.shape[1:])[:, 0]
        inputs = self._registry.transformations[block.columns](samples)
        self._open = True
        self._start_input(inputs, block)
        return inputs.flatten(0, 1)

    def consume(self, layer: str, output: Tensor | str, channel_axis: int | None) -> None:
        """Add what a layer made of the block's inputs, if it can be measured.

        Args:
            layer: its name.
            output: what it returned, or why that cannot be measured.
            channel_axis: of the channels, counted from the end, where the module says it.
        """
        if not self._open or self._block is None or self.findings is None:
            return
        finding = output if isinstance(output, str) else self.findings.get(layer)
        if finding is None and isinstance(output, Tensor):
            self.unknown.append((layer, output.clone(), channel_axis))  # later modules may change it in place
        elif isinstance(finding, str):
            self._registry.leave_out(layer, finding)
        elif isinstance(finding, Layout) and isinstance(output, Tensor):
            self._consume(layer, finding, output, channel_axis, self._block)

    def consume_unknown(self, findings: Mapping[str, Finding]) -> None:
        """Add the outputs of layers that no earlier block reached, given what a probe of this block found."""
        waiting, self.unknown = self.unknown, []
        for layer, output, channel_axis in waiting:
            if self.findings is not None:
                self.findings.setdefault(layer, findings.get(layer, Layout()))
            self.consume(layer, output, channel_axis)

    def _start_input(self, inputs: Tensor, block: STBlock) -> None:
        """Use the transformed inputs ``(rows, columns, *input_shape)``, which are a layer for measures with a floor."""
        shape = tuple(inputs.shape[2:])
        self._registry.know_input(shape)
        if self._registry.has_floor:
            self._add(INPUT, inputs, usual_channel_axis(shape), block)
        if self._registry.input_layer and inputs.is_floating_point():
            self._add(self._registry.input_layer, inputs, usual_channel_axis(shape), block)

    def _consume(self, layer: str, layout: Layout, output: Tensor, channel_axis: int | None, block: STBlock) -> None:
        rows, columns = block.inputs.shape[:2]
        values = layout.batch_first(output, rows * columns)
        if values is None:
            fits = False
        else:
            known = self._registry.layers.get(layer)
            shape = tuple(values.shape[1:])
            axis = known.channel_axis if known else channel_axis_in(layer, shape, channel_axis, self._channel_axes)
            fits = self._add(layer, values.reshape(rows, columns, *shape), axis, block)
        if not fits and self.findings is not None:
            self.findings[layer] = self._registry.left_out.setdefault(layer, RAGGED)
            self._registry.leave_out(layer, self._registry.left_out[layer])

    def _add(self, name: str, st: Tensor, channel_axis: int, block: STBlock) -> bool:
        """Add complete rows, or a part of one, ``(rows, columns, *activation_shape)``; whether the shape is known."""
        st = as_summed(st)
        layer = self._registry.state_of(name, st, channel_axis)
        if layer is None:
            return False
        if self._registry.wants(name) and (whole := self._complete(name, layer, st, block.columns)) is not None:
            self._registry.add(name, layer, whole)
        return True

    def _complete(self, name: str, layer: LayerState, st: Tensor, columns: slice) -> Tensor | None:
        """Complete rows in the layer's order; None while columns of a row longer than a batch are missing.

        The memory of such a row is used again for the next one. A row counts where all its columns reach the layer.
        """
        st, m = layer.in_order(st), layer.n_transformations
        if st.shape[1] == m:
            return st
        joined, row, end = self._long_rows.get(name, (st.new_empty(0), self._row, 0))
        if columns.start and (row, end) != (self._row, columns.start):
            return None
        if not joined.numel():
            joined = st.new_empty(1, m, *st.shape[2:])
        joined[:, columns] = st
        self._long_rows[name] = joined, self._row, columns.stop
        return joined if columns.stop == m else None
