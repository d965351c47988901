"""What stays the same between the walks of one evaluation, and how a walk is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from lightning_invariance.activations import Selection, catch_activations, transformed_input
from lightning_invariance.distributed import gather_or_raise, rank_and_world_size
from lightning_invariance.isolation import evaluation_mode, isolated_random_state, on_device
from lightning_invariance.loader import STBlock, STLoader
from lightning_invariance.transforms import TransformationSet
from lightning_invariance.walk import Walk

#: The largest block whose release makes glibc's allocator keep what is freed, up to twice as much, instead of giving it
#: back to the system; it does that from a few hundred kilobytes on, and then fetches the memory of every activation
#: anew, page by page, which can take as long as the forward pass itself.
KEPT_MEMORY = 2**25 - 2**14

#: A progress bar appears when a walk takes longer than this, in seconds.
PROGRESS_DELAY = 3.0


@dataclass(frozen=True)
class Run:
    """A model, its data and how they meet; see :func:`evaluate` for what the fields mean.

    Attributes:
        model: see :func:`evaluate`, as for those that follow.
        data: samples.
        selection: the layers.
        entry: the module whose input is transformed; None for the network's.
        device: where to run.
        forward: how to run the model.
        batch_size: largest number of inputs in one forward pass.
        max_samples: how many samples.
        input_fn: picks x from a batch.
        seed: of all random choices.
        progress: show a bar.
    """

    model: nn.Module
    data: Any
    selection: Selection
    entry: nn.Module | None
    device: torch.device
    forward: Callable[[nn.Module, Tensor], Any] | None
    batch_size: int
    max_samples: int | None
    input_fn: Callable[..., Tensor] | None
    seed: int
    progress: bool

    def loader(self, transformations: TransformationSet) -> STLoader:
        """The blocks that this process takes."""
        rank, world_size = rank_and_world_size()
        return STLoader(
            self.data,
            transformations,
            self.batch_size,
            max_samples=self.max_samples,
            input_fn=self.input_fn,
            device=self.device,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            transform=self.entry is None,
        )

    def walk(
        self,
        measures: Mapping[str, Metric],
        loader: STLoader,
        milestones: Sequence[int] = (),
        about: str = "Measuring invariance",
    ) -> Walk:
        """Show every row to the measures of every layer, as often as they need it."""
        walk = Walk(measures, loader.transformations, milestones, loader.n_samples)
        with self._prepared(walk.enter), catch_activations(self.selection, walk.consume) as catcher:
            while not walk.finished:
                error: BaseException | None = None
                try:
                    with isolated_random_state(self.seed):  # every pass sees the same random transformations
                        for block in self._with_progress(loader, about):
                            catcher.start_pass()
                            walk.start_block(block, entered=self.entry is None)
                            self._call(block.inputs.flatten(0, 1))
                except Exception as raised:  # the other processes shall hear of it instead of waiting for ever
                    error = raised
                walk.end_pass(self.device, error)
        return walk

    def sizes(self, loader: STLoader) -> tuple[int, int]:
        """Number of activations of all layers together, and the size in bytes of the largest type of one."""
        numbers, sizes = [0], [4]

        def measured(layer: str, module: nn.Module, output: Tensor) -> None:
            numbers.append(output.numel())
            sizes.append(output.element_size())

        error: BaseException | None = None
        try:
            caught = catch_activations(self.selection, measured)
            with isolated_random_state(self.seed), self._prepared(lambda x: x), caught as catcher:
                catcher.start_pass()
                for block in loader:
                    self._call(block.inputs[0, :1])
                    break
        except Exception as raised:
            error = raised
        told = gather_or_raise((sum(numbers), max(sizes)), error)
        return max(number for number, _ in told), max(size for _, size in told)

    def _call(self, x: Tensor) -> Any:
        return self.model(x) if self.forward is None else self.forward(self.model, x)

    def _prepared(self, enter: Callable[[Tensor], Tensor]) -> ExitStack:
        """The model in eval mode on its device, without gradients; everything is put back afterwards."""
        if self.device.type == "cpu":
            torch.empty(KEPT_MEMORY, dtype=torch.uint8)
        with ExitStack() as stack:
            stack.enter_context(on_device(self.model, self.device))
            stack.enter_context(evaluation_mode(self.model))
            stack.enter_context(torch.no_grad())
            # A compiled graph silently skips hooks that were added later.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.entry is not None:
                stack.enter_context(transformed_input(self.entry, enter))
            return stack.pop_all()

    def _with_progress(self, loader: STLoader, about: str) -> Iterator[STBlock]:
        total = None if loader.n_samples is None else len(loader)
        show = self.progress and rank_and_world_size()[0] == 0
        yield from tqdm(loader, about, total, leave=False, delay=PROGRESS_DELAY, unit="batch", disable=not show)
