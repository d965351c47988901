"""From the hooks of a network to its registry: outputs become ST blocks, by what a probe has found."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_invariance.data.loader import STBlock
from lightning_invariance.engine.registry import Registry
from lightning_invariance.model.channels import channel_axis_in
from lightning_invariance.model.layout import RAGGED, Finding, Layout


class Intake:
    """Gives the outputs of layers to a registry as blocks ``(rows, columns, *activation_shape)``.

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

    def start_block(self, block: STBlock) -> None:
        """The outputs that follow belong to this block."""
        self._block, self._open = block, not self._within
        self._registry.start_block(block)
        if not self._within:
            self._registry.start_input(block.inputs)

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
        self._registry.start_input(inputs)
        return inputs.flatten(0, 1)

    def consume(self, layer: str, output: Tensor, channel_axis: int | None) -> None:
        """Add what a layer made of the block's inputs, if it can be measured.

        Args:
            layer: its name.
            output: what it returned.
            channel_axis: of the channels, counted from the end, where the module says it.
        """
        if not self._open or self._block is None or self.findings is None:
            return
        finding = self.findings.get(layer)
        if finding is None:
            self.unknown.append((layer, output.clone(), channel_axis))  # later modules may change it in place
        elif isinstance(finding, str):
            self._registry.leave_out(layer, finding)
        else:
            self._add(layer, finding, output, channel_axis, self._block)

    def consume_unknown(self, findings: Mapping[str, Finding]) -> None:
        """Add the outputs of layers that no earlier block reached, given what a probe of this block found."""
        waiting, self.unknown = self.unknown, []
        for layer, output, channel_axis in waiting:
            if self.findings is not None:
                self.findings.setdefault(layer, findings.get(layer, Layout()))
            self.consume(layer, output, channel_axis)

    def _add(self, layer: str, layout: Layout, output: Tensor, channel_axis: int | None, block: STBlock) -> None:
        rows, columns = block.inputs.shape[:2]
        values = layout.batch_first(output, rows * columns)
        if values is None:
            fits = False
        else:
            st = values.reshape(rows, columns, *values.shape[1:])
            known = self._registry.layers.get(layer)
            if known:
                axis = known.channel_axis
            else:
                axis = channel_axis_in(layer, tuple(values.shape[1:]), channel_axis, self._channel_axes)
            fits = self._registry.add(layer, st, axis)
        if not fits and self.findings is not None:
            self.findings[layer] = RAGGED
            self._registry.leave_out(layer, RAGGED)
