"""One evaluation: a model, its data, and walks over the ST matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from lightning_invariance.data.batches import taken, takes_batch
from lightning_invariance.data.fingerprints import Fingerprint, is_split
from lightning_invariance.data.loader import STBlock, STLoader
from lightning_invariance.distributed import gather_or_raise, rank_and_world_size
from lightning_invariance.engine.allocator import keep_freed_memory
from lightning_invariance.engine.batch_size import first_size, size_for_activations, size_for_inputs
from lightning_invariance.engine.blocks import Intake
from lightning_invariance.engine.budget import Activation, Output, activations_of, check_memory
from lightning_invariance.engine.memory_format import (
    FEWEST,
    ChannelsLastError,
    is_faster_with_channels_last,
    with_channels_last,
)
from lightning_invariance.engine.options import Options
from lightning_invariance.engine.output_metrics import Predictions
from lightning_invariance.engine.registry import Registry
from lightning_invariance.model.hooks import Catcher, catch_activations, transformed_input
from lightning_invariance.model.layout import CONSTANT, Finding, Layout
from lightning_invariance.model.preserved import (
    device_of,
    evaluation_mode,
    on_device,
    unchanged_tensors,
)
from lightning_invariance.model.probe import probe_block
from lightning_invariance.model.selection import module_of, select_layers
from lightning_invariance.precision import summed_on
from lightning_invariance.random_state import isolated_random_state
from lightning_invariance.results.result import OutputValues
from lightning_invariance.transforms import TransformationSet

#: A progress bar appears when a walk takes longer than this, in seconds.
PROGRESS_DELAY = 3.0


class Session:
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
        self.batch_size = first_size(self.device) if options.batch_size == "auto" else options.batch_size
        self.options = options
        self.selection = select_layers(model, options.layers, options.operations)
        at = options.transform_at
        self._transformed_module = None if at is None else module_of(model, at)
        self._findings: dict[str, Finding] | None = None  # of the first block
        self._channels_last = False
        self._outputs: dict[str, Output] = {}  # of all probes
        self._predictions: Predictions | None = None  # of the last walk

    def with_batch_size(self, batch_size: int) -> Session:
        """The same with another batch size."""
        return Session(self.model, self.data, replace(self.options, batch_size=batch_size))

    def loader(self, transformations: TransformationSet, run: int = 1) -> STLoader:
        """The blocks that this process takes.

        Args:
            transformations: the columns.
            run: how many samples in a row a process takes.

        Raises:
            ValueError: If the processes hold different data.
        """
        rank, world_size = rank_and_world_size()
        error: BaseException | None = None
        fingerprint = Fingerprint(None, None)
        try:
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
                transform=self._transformed_module is None,
                with_batch=takes_batch(self.options.forward) or bool(self.options.outputs),
                run=run,
            )
            if self.options.batch_size == "auto":
                self._resize(loader, size_for_inputs(loader, self.device))
            fingerprint = loader.source.fingerprint() if world_size > 1 else fingerprint
        except Exception as raised:  # the other processes must be told, or they would wait for ever
            error = raised
        if is_split(gather_or_raise(fingerprint, error)):
            loader.source.take_own_stream()
        return loader

    def walk(
        self,
        measures: Mapping[str, Metric],
        loader: STLoader,
        milestones: Sequence[int] = (),
        at_milestone: Callable[[Registry], None] | None = None,
        about: str = "Measuring invariance",
    ) -> Registry:
        """Show every row to the measures of every layer, as often as they need it.

        Args:
            measures: name → metric.
            loader: the rows.
            milestones: numbers of samples, in rising order, after which ``at_milestone`` is called.
            at_milestone: called with the registry between two blocks.
            about: text beside the progress bar.
        """
        registry = Registry(
            measures, loader.transformations, loader.n_samples, loader.source.run, self.options.confidence
        )
        intake = Intake(registry, self.options.channel_axis, within=self._transformed_module is not None)
        waiting = list(milestones)
        if self.options.outputs:
            self._predictions = Predictions(
                self.options.outputs, loader.transformations, self.device, self.options.confidence
            )
        with self._prepared(intake), catch_activations(self.model, self.selection, intake.consume) as catcher:
            while not registry.finished:
                error: BaseException | None = None
                loader.source.with_keys = self.options.confidence is not None and registry.in_first_pass
                try:
                    with isolated_random_state(self.options.seed):  # every pass sees the same random transformations
                        for block in with_progress(loader, about, self.options.progress):
                            if waiting and registry.n_samples >= waiting[0] and at_milestone is not None:
                                waiting = [n for n in waiting if n > registry.n_samples]
                                at_milestone(registry)
                            self._measure(block, intake, catcher, registry, loader)
                        waiting = []
                except Exception as raised:  # the other processes must be told, or they would wait for ever
                    error = raised
                registry.end_pass(self.device, error)
        return registry

    def outputs(self) -> dict[str, OutputValues]:
        """What the metrics of predictions and targets said in the last walk; every process must ask."""
        return {} if self._predictions is None else self._predictions.values()

    def _measure(self, block: STBlock, intake: Intake, catcher: Catcher, registry: Registry, loader: STLoader) -> None:
        """Run the model on a block, after a probe if there was none or the block reaches other layers."""
        x = block.inputs.flatten(0, 1)
        if self._findings is None:
            self._findings = self._probed(block, catcher)
            self._channels_last = self._choose_channels_last(block, catcher, registry, loader)
        first_of_walk = intake.findings is None
        intake.findings = self._findings
        intake.start_block(block)
        if first_of_walk:
            activations = activations_of(self._outputs, self._findings, self.options.channel_axis or {})
            check_memory(registry, activations, self.batch_size, summed_on(self.device), self.options.state_budget)
        output = self._output(block, x, catcher)
        if registry.in_first_pass and self._predictions is not None:
            self._predictions.add(block, output)
        if intake.unknown:
            intake.consume_unknown(self._probed(block, catcher))
        intake.end_block()
        if first_of_walk and self.options.batch_size == "auto":
            self._resize(loader, size_for_activations(loader, self.device, self._outputs.values()))

    def _choose_channels_last(self, block: STBlock, catcher: Catcher, registry: Registry, loader: STLoader) -> bool:
        """Whether to run the model with channels last: if the user does not say how, and sums need no copies then."""
        number = (loader.n_samples or 0) * len(loader.transformations)
        if self.options.batch_size != "auto" or not registry.with_any_channel_axis or number < FEWEST:
            return False

        def run(x: Tensor) -> Any:
            with catcher.forward_pass():  # nothing is added to sums before `Intake.start_block`
                return self._call(block, x, torch.arange(len(x)))

        function = self.options.forward
        called = getattr(function, "__code__", type(function)), self.options.transform_at, tuple(self.selection.modules)
        inputs = block.inputs.flatten(0, 1)
        return is_faster_with_channels_last(self.model, run, catcher, inputs, called, self.options.seed)

    def _output(self, block: STBlock, x: Tensor, catcher: Catcher) -> Any:
        """What the model returns for the inputs of a block, in the memory format that was chosen.

        Raises:
            ChannelsLastError: If it fails with channels last.
        """
        with catcher.forward_pass():
            if not self._channels_last:
                return self._call(block, x)
            try:
                return self._call(block, with_channels_last(x))
            except Exception as error:
                raise ChannelsLastError from error

    def _resize(self, loader: STLoader, batch_size: int) -> None:
        if batch_size != self.batch_size:
            self.batch_size = batch_size
            loader.resize(batch_size)

    def _probed(self, block: STBlock, catcher: Catcher) -> dict[str, Finding]:
        """Where the inputs of a batch stand in the output of each layer."""
        found = probe_block(block, catcher, self._call, self.options.seed, takes_batch(self.options.forward))
        self._outputs.update(found.outputs)
        return found.findings

    def names(self, example: Tensor) -> list[str]:
        """The layers that can be measured on some inputs, in the order in which they run."""
        order: dict[str, None] = {}
        caught = catch_activations(self.model, self.selection, lambda layer, output, axis: order.update({layer: None}))
        block = STBlock(example.to(self.device)[:, None], None, slice(0, 1), torch.arange(len(example)))
        with isolated_random_state(self.options.seed), self._prepared(None), caught as catcher:
            found = self._probed(block, catcher)
            with catcher.forward_pass():
                self._call(block, block.inputs.flatten(0, 1))
        return [layer for layer in order if isinstance(found.get(layer, CONSTANT), Layout)]

    def activations(self, loader: STLoader) -> dict[str, Activation]:
        """What the layers return for one input, from a probe of the first block; nothing where there is no sample."""
        findings: dict[str, Finding] = {}
        caught = catch_activations(self.model, self.selection, lambda layer, output, axis: None)
        with isolated_random_state(self.options.seed), self._prepared(None), caught as catcher:
            for block in loader:
                findings = self._probed(block, catcher)
                break
        return activations_of(self._outputs, findings, self.options.channel_axis or {})

    def _call(self, block: STBlock, x: Tensor, positions: Tensor | None = None) -> Any:
        """Run the model on x: the inputs of a block, or some that stand at these positions among them."""
        forward: Callable[..., Any] | None = self.options.forward
        if forward is None:
            return self.model(x)
        if not takes_batch(forward):
            return forward(self.model, x)
        rows, columns = block.inputs.shape[:2]
        of_row = torch.arange(rows).repeat_interleave(columns)
        return forward(self.model, x, taken(block.batch, rows, of_row if positions is None else of_row[positions]))

    def _prepared(self, intake: Intake | None) -> ExitStack:
        """The model in eval mode on its device, without gradients; everything is put back afterwards."""
        keep_freed_memory()
        with ExitStack() as stack:
            stack.enter_context(on_device(self.model, self.device))
            stack.enter_context(unchanged_tensors(self.model))
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(torch.no_grad())
            # A compiled graph silently skips hooks that were added later.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if intake is not None and self._transformed_module is not None:
                stack.enter_context(transformed_input(self._transformed_module, intake.enter))
            return stack.pop_all()


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
