"""One evaluation of a model: passes over the blocks of the ST matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

from lightning_invariance.data.batches import select_samples, takes_batch
from lightning_invariance.data.fingerprints import Fingerprint, is_split
from lightning_invariance.data.loader import STBlock, STLoader
from lightning_invariance.distributed import any_process, errors_shared, gather_objects, rank_and_world_size
from lightning_invariance.engine.blocks import Blocks
from lightning_invariance.engine.budget import OverBudgetError, activations_of, check_memory
from lightning_invariance.engine.options import Options
from lightning_invariance.engine.output_metrics import OutputMetrics
from lightning_invariance.engine.registry import Registry
from lightning_invariance.model.evaluation_mode import device_of, evaluation_mode, on_device
from lightning_invariance.model.hooks import SCRIPTED, Catcher, Consumer, catch_activations, transformed_input
from lightning_invariance.model.probe import Output, probe_batch
from lightning_invariance.model.sample_axis import CONSTANT, Finding, Layout
from lightning_invariance.model.selection import module_of, select_layers
from lightning_invariance.precision import summed_on
from lightning_invariance.random_state import isolated_random_state
from lightning_invariance.results.record import INPUT_LAYERS, OutputValues
from lightning_invariance.transforms import TransformationSet

#: Inputs of a batch where ``batch_size="auto"``: a number on the CPU; on an accelerator, which needs many of a small
#: network to be busy, as many as have so many bytes in float32, at most ``MOST_INPUTS``; and from a stream, which is
#: not looked at before, ``INPUTS_OF_STREAM``.
INPUTS_ON_CPU, INPUT_BYTES, MOST_INPUTS, INPUTS_OF_STREAM = 128, 2**29, 2**14, 2**10

CPU = torch.device("cpu")

#: A progress bar appears when a walk takes longer than this, in seconds.
PROGRESS_DELAY = 3.0


class Walk:
    """A model and its data for the time of one evaluation.

    Args:
        model: the model, without wrappers.
        data: samples.
        options: how to run.

    Raises:
        ValueError: If the layers, or the module of ``transform_at``, are unknown.
    """

    def __init__(self, model: nn.Module, data: Any, options: Options) -> None:
        self.model = model
        self.data = data
        self.device = torch.device(options.device) if options.device is not None else device_of(model)
        automatic = INPUTS_ON_CPU if self.device.type == "cpu" else INPUTS_OF_STREAM
        self.batch_size = automatic if options.batch_size == "auto" else options.batch_size
        self.options = options
        self.selection = select_layers(model, options.layers, options.operations)
        at = options.transform_at
        self.transformed_module = None if at is None else module_of(model, at)
        self._findings: dict[str, Finding] | None = None  # of the first block
        self._outputs: dict[str, Output] = {}  # of all probes
        self._output_metrics: OutputMetrics | None = None  # of the last run

    def with_batch_size(self, batch_size: int) -> Walk:
        """A walk of this evaluation with another batch size."""
        return Walk(self.model, self.data, replace(self.options, batch_size=batch_size))

    def loader(self, transformations: TransformationSet, run: int = 1) -> STLoader:
        """The blocks that this process takes.

        Args:
            transformations: the columns.
            run: how many samples in a row a process takes.

        Raises:
            ValueError: If the processes hold different data.
        """
        rank, world_size = rank_and_world_size()
        with errors_shared():
            loader = STLoader(
                self.data,
                transformations,
                self.batch_size,
                max_samples=self.options.max_samples,
                input_fn=self.options.input_fn,
                device=self.device,
                seed=self.options.seed,
                rank=rank,
                world_size=world_size,
                transform=self.transformed_module is None,
                with_batch=takes_batch(self.options.forward) or bool(self.options.outputs),
                run=run,
            )
            by_bytes = self.options.batch_size == "auto" and self.device.type != "cpu"
            if by_bytes and (size := loader.source.bytes_of_input()) is not None:
                self.batch_size = max(1, min(MOST_INPUTS, INPUT_BYTES // size))
                loader.resize(self.batch_size)
            fingerprint = loader.source.fingerprint() if world_size > 1 else Fingerprint(None, None)
            if loader.n_samples is not None:
                check_number(loader.n_samples)
        if is_split(gather_objects(fingerprint)):
            loader.source.take_own_stream()
        return loader

    def run(self, measures: Mapping[str, Metric], loader: STLoader, about: str = "Measuring invariance") -> Registry:
        """Show every row to the measures of every layer, as often as they need it.

        Args:
            measures: name → metric.
            loader: the rows.
            about: text of the progress bar.

        Raises:
            OverBudgetError: If the sums of all layers take more than the budget.
            ValueError: If there are fewer than two samples.
        """
        confidence = self.options.confidence
        run, input_layer = loader.source.run, self._input_layer()
        about_layers = confidence, input_layer, self.options.vectors
        registry = Registry(measures, loader.transformations, loader.n_samples, run, *about_layers)
        blocks = Blocks(registry, self.options.channel_axis, within=self.transformed_module is not None)
        if self.options.outputs:
            how = self.device, confidence, self.options.outputs_move
            self._output_metrics = OutputMetrics(self.options.outputs, loader.transformations, *how)
        for name, module in self.selection.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                registry.leave_out(name, SCRIPTED)
        with self._catching(blocks.consume, blocks.enter) as catcher:
            while not registry.finished:
                loader.source.with_keys = confidence is not None and registry.in_first_pass
                self._pass(loader, about, blocks, catcher, registry)
                registry.end_pass(self.device, loader.source.own_skipped)
        check_number(registry.n_samples)
        return registry

    def _pass(self, loader: STLoader, about: str, blocks: Blocks, catcher: Catcher, registry: Registry) -> None:
        """Show every row once.

        All processes run the model equally often, since it may wait for the others: where there are no more blocks, the
        last one is shown again and does not count.
        """
        left, block, shown = with_progress(loader, about, self.options.progress), None, None
        # Random transformations are equal in every pass.
        with isolated_random_state(self.options.seed, loader.source.generators):
            while True:
                with errors_shared() as shared:
                    try:
                        if shown is not None:
                            self._measure(shown, blocks, catcher, registry, counts=block is not None)
                        block = next(left, None)
                        shared.value = block is not None
                    except OverBudgetError as error:  # a process without samples does not know of it
                        shared.value = error.args
                if over := [value for value in shared.values if isinstance(value, tuple)]:
                    raise OverBudgetError(*max(over))
                if not any(shared.values):
                    return
                if shown is None and not all(shared.values):
                    first = next(each for each in gather_objects(block and block.to(CPU)) if each is not None)
                    shown = first.to(self.device)
                shown = block or shown

    def _input_layer(self) -> str:
        """The name of the layer that is the transformed input, which no module has; empty without it."""
        if not self.options.include_input:
            return ""
        taken = {name.partition("[")[0] for name in (*self.selection.modules, *self.selection.containers)}
        return next(name for name in INPUT_LAYERS if name not in taken)

    def outputs(self) -> dict[str, OutputValues]:
        """The values of the metrics of predictions and targets in the last run; every process must ask."""
        return {} if self._output_metrics is None else self._output_metrics.values()

    def _measure(
        self, block: STBlock, blocks: Blocks, catcher: Catcher, registry: Registry, counts: bool = True
    ) -> None:
        """Run the model on a block, after a probe if there was none or the block reaches other layers."""
        if self._findings is None:
            self._findings = self._probed(block, catcher, any_process)
        if not counts:
            with catcher.forward_pass():
                self._call(block, block.inputs.flatten(0, 1))
            return
        first_of_run = blocks.findings is None
        blocks.findings = self._findings
        blocks.start_block(block)
        if first_of_run:
            activations = activations_of(self._outputs, self._findings, self.options.channel_axis or {})
            check_memory(registry, activations, self.batch_size, summed_on(self.device), self.options.state_budget)
        with catcher.forward_pass():
            output = self._call(block, block.inputs.flatten(0, 1))
        if registry.in_first_pass and self._output_metrics is not None:
            self._output_metrics.add(block, output)
        if blocks.unknown:
            blocks.consume_unknown(self._probed(block, catcher))
        blocks.end_block()

    def _probed(self, block: STBlock, catcher: Catcher, agree: Callable[[bool], bool] = bool) -> dict[str, Finding]:
        """Where the inputs of a batch stand in the output of each layer."""
        call, x = partial(self._call, block), block.inputs.flatten(0, 1)
        found = probe_batch(x, catcher, call, self.options.seed, takes_batch(self.options.forward), agree)
        self._outputs.update(found.outputs)
        return found.findings

    def names(self, example: Tensor) -> list[str]:
        """The layers that can be measured on some inputs, in the order in which they run."""
        order: dict[str, None] = {}
        caught = self._catching(lambda layer, output, axis: order.update({layer: None}))
        block = STBlock(example.to(self.device)[:, None], None, slice(0, 1), torch.arange(len(example)))
        with isolated_random_state(self.options.seed), caught as catcher:
            found = self._probed(block, catcher)
            with catcher.forward_pass():
                self._call(block, block.inputs.flatten(0, 1))
        return [layer for layer in order if isinstance(found.get(layer, CONSTANT), Layout)]

    def _call(self, block: STBlock, x: Tensor, positions: Tensor | None = None) -> Any:
        """Run the model on x: the inputs of a block, or some that stand at these positions among them."""
        forward: Callable[..., Any] | None = self.options.forward
        if forward is None:
            return self.model(x)
        if not takes_batch(forward):
            return forward(self.model, x)
        rows, columns = block.inputs.shape[:2]
        of_row = torch.arange(rows).repeat_interleave(columns)
        return forward(
            self.model, x, select_samples(block.batch, rows, of_row if positions is None else of_row[positions])
        )

    @contextmanager
    def _catching(self, consumer: Consumer, enter: Callable[[Tensor], Tensor] | None = None) -> Iterator[Catcher]:
        """The model in eval mode on its device, with hooks; everything is put back afterwards.

        Args:
            consumer: receives the outputs of layers.
            enter: transforms what reaches the module of ``transform_at``.
        """
        with ExitStack() as stack:
            stack.enter_context(on_device(self.model, self.device))
            before = stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(torch.no_grad())
            # A compiled graph silently skips hooks that were added later.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if enter is not None and self.transformed_module is not None:
                stack.enter_context(transformed_input(self.transformed_module, enter))
            yield stack.enter_context(catch_activations(self.model, before, self.selection, consumer))


def check_number(n_samples: int) -> None:
    """Raise for a number of samples of which nothing varies."""
    if n_samples < 2:
        raise ValueError(f"Expected at least two samples, but got {n_samples}: a variance needs two.")


def with_progress(loader: STLoader, about: str, show: bool) -> Iterator[STBlock]:
    """The blocks of a loader, with a bar that counts samples, in the first process alone."""
    hidden = not show or rank_and_world_size()[0] > 0
    with tqdm(
        None, about, loader.source.n_own, leave=False, delay=PROGRESS_DELAY, unit="sample", disable=hidden
    ) as bar:
        for block in loader:
            yield block
            if block.columns.stop == len(loader.transformations):
                bar.update(len(block.inputs))
