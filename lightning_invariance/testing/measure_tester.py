"""MeasureTester: the checks that every measure must pass."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Identity
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection

from lightning_invariance.evaluate import evaluate
from lightning_invariance.measures import Measure, NormalizedVariance
from lightning_invariance.testing.feeding import (
    ALL,
    LABELS,
    SAMPLES,
    assert_close,
    assert_nan_with_warning,
    assert_raises,
    exchange,
    feed,
    parts,
    update,
)
from lightning_invariance.transforms import TransformationSet


class MeasureTester(ABC):
    """Checks that a measure equals its definition for any split, merge and order of samples, device and type.

    They extend ``MetricTester`` of torchmetrics, without scripting, by the needs of an evaluation: merges, empty and
    uneven parts, processes, the order of samples, shared updates, moves and inference mode.

    A subclass overrides :meth:`make` and :meth:`definition`.
    """

    #: Whether the measure accepts only the 4 transformations of :meth:`cube`.
    fixed_transformations = False

    @abstractmethod
    def make(self) -> Measure:
        """Create the measure."""

    @abstractmethod
    def definition(self, st: Tensor) -> Tensor:
        """Compute the value for a whole ST tensor ``(samples, transformations, *activation_shape)`` in float64."""

    @property
    def two_passes(self) -> bool:
        """Whether the measure needs two passes over the samples of :meth:`cube`."""
        metric = self.make()
        update(metric, self.cube())
        return not metric.complete

    def cube(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The ST tensor of the checks, ``(13, 4, 3, 5, 5)``, whose samples have labels 0, 1, 2, 0, …."""
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(SAMPLES, 1, 3, 5, 5, generator=generator, dtype=torch.float64)
        noise = torch.randn(SAMPLES, 4, 3, 5, 5, generator=generator, dtype=torch.float64)
        return (samples + noise).to(dtype)

    def test_any_block_size_gives_the_definition(self) -> None:
        for size in (1, 2, 5, 13):
            value = feed([self.make()], self.cube(), [[slice(at, at + size) for at in range(0, SAMPLES, size)]])
            assert value.dtype == torch.float64, f"Expected a value in float64, but got {value.dtype}."
            assert_close(value, self.definition(self.cube()))

    def test_an_evaluation_gives_the_definition(self) -> None:
        # The network returns its input, and transformation j selects column j of the cube.
        picks = {str(j): partial(_column, j=j) for j in range(self.cube().shape[1])}
        columns = TransformationSet.from_callables(picks, inverses=dict.fromkeys(picks, _same), identity="0")
        data = TensorDataset(self.cube(), LABELS)
        for batch_size in (2, 8, 64):  # half a row, two rows, all rows
            result = evaluate(Identity(), data, columns, {"it": self.make()}, batch_size=batch_size, progress=False)
            assert_close(result["it"]["Identity"], self.definition(self.cube()))

    def test_merged_parts_give_the_definition(self) -> None:
        for sizes in ((5, 3, 5), (1, 12, 0), (0, 6, 7), (0, 0, 13)):
            assert_close(feed([self.make() for _ in sizes], self.cube(), parts(sizes)), self.definition(self.cube()))

    def test_processes_give_the_definition(self) -> None:
        for sizes in ((9, 4), (0, 6, 7), (6, 0, 7)):
            value = feed([self.make() for _ in sizes], self.cube(), parts(sizes), join=exchange)
            assert_close(value, self.definition(self.cube()))

    def test_a_dictionary_of_states_merges(self) -> None:
        metric, other = self.make(), self.make()
        update(metric, self.cube(), slice(0, 5))
        update(other, self.cube(), slice(5, SAMPLES))
        metric.merge_state(dict(other.metric_state))
        assert metric.n_samples == SAMPLES
        assert_raises(ValueError, partial(metric.merge_state, {}), "Expected a state")

    def test_the_order_of_samples_does_not_matter(self) -> None:
        order, metric = LABELS.argsort(descending=True), self.make()
        about = metric._filter_kwargs(labels=LABELS[order])
        metric.update(self.cube()[order], **about)
        if not metric.complete:
            metric.end_pass()
            metric.update(self.cube()[order], **about)
        assert_close(metric.compute(), self.definition(self.cube()))

    def test_updates_do_not_wait_for_another_device(self) -> None:
        # Tensors on "meta" have no values: reading one, or combining it with a tensor of another device, is an error.
        metric = self.make().to("meta")
        for rows in (slice(0, 5), slice(5, 10), slice(10, SAMPLES)):
            about = metric._filter_kwargs(labels=LABELS[rows], indices=torch.arange(SAMPLES)[rows])
            metric.update(self.cube(torch.float32)[rows].to("meta"), **about)
        assert metric.n_samples == SAMPLES
        devices = {name: state.device.type for name, state in metric.metric_state.items()}  # type: ignore[union-attr]
        assert {devices.pop(name) for name in metric.read_states if name in devices} == {"cpu"}
        assert set(devices.values()) == {"meta"}

    def test_activations_of_every_float_type(self) -> None:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            value = feed([self.make()], self.cube(dtype), [[slice(0, 7), slice(7, SAMPLES)]])
            assert_close(value, self.definition(self.cube(dtype).double()), rtol=1e-4, atol=1e-6)

    def test_complex_and_integer_activations_are_refused(self) -> None:
        for kind in (torch.complex64, torch.int64):
            assert_raises(TypeError, partial(update, self.make(), self.cube().to(kind)), "real floating-point")

    def test_forward_returns_the_value_of_the_batch(self) -> None:
        if self.two_passes:
            return
        metric = self.make()
        for rows in (slice(0, 6), slice(6, SAMPLES)):
            value = metric(self.cube()[rows], **metric._filter_kwargs(labels=LABELS[rows]))
            alone = self.make()
            update(alone, self.cube(), rows)
            assert_close(value, alone.compute())
        assert_close(metric.compute(), self.definition(self.cube()))

    def test_copies_and_reset(self) -> None:
        metric = self.make()
        value = feed([metric], self.cube(), [[ALL]])
        for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):  # noqa: S301 - our own bytes
            assert type(copy) is type(metric)
            assert_close(copy.compute(), value, rtol=0, atol=0)
        metric.reset()
        assert metric.n_samples == 0
        assert_close(feed([metric], self.cube(), [[ALL]]), self.definition(self.cube()))

    def test_states_are_saved_where_that_is_asked_for(self) -> None:
        metric, again = self.make(), self.make()
        value = feed([metric], self.cube(), [[ALL]])
        assert metric.state_dict() == {}
        metric.persistent(True)
        again.persistent(True)
        again.load_state_dict(metric.state_dict())
        again._update_count = 1
        assert_close(again.compute(), value, rtol=0, atol=0)

    def test_a_value_is_computed_anew_after_every_update(self) -> None:
        if self.two_passes:
            return
        metric = self.make()
        for rows in (slice(0, 6), slice(6, SAMPLES)):
            update(metric, self.cube(), rows)
            value = metric.compute()
        assert_close(value, self.definition(self.cube()))

    def test_updates_leave_earlier_states_alone(self) -> None:
        metric = self.make()
        update(metric, self.cube(), slice(0, 6))
        held: dict[str, Any] = dict(metric.metric_state)
        copies = {name: state.clone() for name, state in held.items()}
        update(metric, self.cube(), slice(6, SAMPLES))
        assert all(torch.equal(state, copies[name]) for name, state in held.items())

    def test_what_a_class_says_of_itself_is_fixed(self) -> None:
        metric = self.make()
        for attribute in ("is_differentiable", "higher_is_better"):
            assert_raises(RuntimeError, partial(setattr, metric, attribute, not getattr(metric, attribute)))

    def test_arithmetic_and_plot(self) -> None:
        metric = self.make()
        feed([metric], self.cube(), [[ALL]])
        doubled: Any = 2 * metric + 1
        assert_close(doubled.compute(), 2 * self.definition(self.cube()) + 1)
        assert metric.plot()[1].figure is not None

    def test_moves_take_all_states_along_but_those_to_read(self) -> None:
        metric = self.make()
        value = feed([metric], self.cube(), [[ALL]])
        metric.set_dtype(torch.float64)
        assert_close(metric.to("cpu").compute(), value, rtol=0, atol=0)
        metric.to("meta")  # any other device
        for _ in range(2):
            moved = metric.metric_state.keys() - set(metric.read_states)
            assert {getattr(metric, state).device.type for state in moved} == {"meta"}
            metric.reset()

    def test_no_gradient_is_kept(self) -> None:
        assert not feed([self.make()], self.cube().requires_grad_(), [[ALL]]).requires_grad

    def test_inference_mode_and_back(self) -> None:
        metric = self.make()
        for number in range(2):
            if number and metric.complete:
                break
            if number:
                metric.end_pass()
            with torch.inference_mode():
                update(metric, self.cube(), slice(0, 6))
            update(metric, self.cube(), slice(6, SAMPLES))
        assert_close(metric.compute(), self.definition(self.cube()))

    def test_a_collection_serves_it(self) -> None:
        if self.two_passes:
            return  # a collection makes one pass
        metrics = MetricCollection({"own": self.make(), "other": NormalizedVariance(), "same": self.make()})
        for rows in (slice(0, 6), slice(6, SAMPLES)):
            metrics.update(self.cube()[rows], labels=LABELS[rows])
        values = metrics.compute()
        assert_close(values["own"], self.definition(self.cube()))
        assert_close(values["same"], self.definition(self.cube()))

    def test_one_sample_is_nan_with_a_warning(self) -> None:
        if self.make().least_samples > 1:
            assert_nan_with_warning(partial(feed, [self.make()], self.cube(), [[slice(0, 1)]]))

    def test_one_transformation_is_nan_with_a_warning(self) -> None:
        if self.make().least_transformations > 1 and not self.fixed_transformations:
            assert_nan_with_warning(partial(feed, [self.make()], self.cube()[:, :1], [[ALL]]))


def _column(x: Tensor, j: int) -> Tensor:
    return x[:, j]


def _same(x: Tensor) -> Tensor:
    return x
