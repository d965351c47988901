"""What every measure must be able to do; a subclass says how it is made and what its definition is.

The list is that of ``MetricTester`` in torchmetrics' own tests, without scripting, and with what the walk relies on:
merging, parts that are empty or uneven, the order of samples, shared updates, moves, and inference mode. The same
across processes is in test_distributed.py.
"""

import itertools
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_invariance.measures import NormalizedVariance

LABELS = torch.arange(13) % 3
ALL = slice(0, 13)


def cube(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(13, 1, 3, 5, 5, generator=generator, dtype=torch.float64)
    return (samples + torch.randn(13, 4, 3, 5, 5, generator=generator, dtype=torch.float64)).to(dtype)


def update(metric, st, rows=ALL):
    metric.update(st[rows], **metric._filter_kwargs(labels=LABELS[rows]))


def feed(metrics, st, shares):
    """Show each metric its share of the rows as often as it needs, and merge all into the first."""
    while True:
        for metric, share in zip(metrics, shares, strict=True):
            for rows in share:
                update(metric, st, rows)
        # What a walk does: after each pass all of them learn what all have seen.
        copies = [metric.clone() for metric in metrics]
        for i in range(len(metrics)):
            for copy in copies[:i] + copies[i + 1 :]:
                metrics[i].merge_state(copy)
        if metrics[0].complete:
            return metrics[0].compute()
        for metric in metrics:
            metric.end_pass()


def assert_close(value, expected, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol, equal_nan=True)


class MeasureTester:
    """Checks of one measure.

    Attributes:
        make: gives a new measure.
        definition: gives its value on a whole ST tensor.
        one_sample: whether one sample is enough.
        one_transformation: whether one transformation is enough; None where their number is given.
        two_passes: whether the measure needs to see every row twice.
    """

    two_passes = False

    one_sample = False
    one_transformation = False

    def make(self):
        raise NotImplementedError

    def definition(self, st):
        raise NotImplementedError

    @pytest.mark.parametrize("size", [1, 2, 5, 13])
    def test_any_block_size_gives_the_definition(self, size):
        value = feed([self.make()], cube(), [[slice(start, start + size) for start in range(0, 13, size)]])
        assert value.dtype == torch.float64
        assert_close(value, self.definition(cube()))

    @pytest.mark.parametrize("shares", [(5, 3, 5), (1, 12, 0), (0, 6, 7), (0, 0, 13)])
    def test_merged_parts_give_the_definition(self, shares):
        ends = list(itertools.accumulate(shares))
        rows = [[slice(end - share, end)] if share else [] for share, end in zip(shares, ends, strict=True)]
        assert_close(feed([self.make() for _ in shares], cube(), rows), self.definition(cube()))

    def test_a_dictionary_of_states_merges(self):
        metric, other = self.make(), self.make()
        update(metric, cube(), slice(0, 5))
        update(other, cube(), slice(5, 13))
        metric.merge_state({name: getattr(other, name) for name in other._defaults})
        assert metric.n_samples == 13
        with pytest.raises(ValueError, match="Expected a state"):
            metric.merge_state({})

    def test_the_order_of_samples_does_not_matter(self):
        order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
        order = order[LABELS[order].argsort(stable=True)]  # sorted by class
        metric = self.make()
        about = metric._filter_kwargs(labels=LABELS[order])
        metric.update(cube()[order], **about)
        if not metric.complete:
            metric.end_pass()
            metric.update(cube()[order], **about)
        assert_close(metric.compute(), self.definition(cube()))

    def test_updates_do_not_wait_for_another_device(self):
        # Tensors on this one have no values: to read one, or to join one with a tensor from elsewhere, is an error.
        metric = self.make().to("meta")
        for rows in (slice(0, 5), slice(5, 10), slice(10, 13)):
            about = metric._filter_kwargs(labels=LABELS[rows], indices=torch.arange(13)[rows])
            metric.add(cube(torch.float32)[rows].to("meta"), **about)
        assert metric.n_samples == 13
        states = {name: state.device.type for name, state in metric.metric_state.items()}
        assert {states.pop(name) for name in metric.read_states if name in states} == {"cpu"}
        assert set(states.values()) == {"meta"}

    def test_what_is_done_on_another_device_gives_the_definition(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)  # which is the CPU
        value = feed([self.make()], cube(torch.float32), [[slice(0, 7), slice(7, 13)]])
        assert_close(value, self.definition(cube(torch.float32).double()), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_activations_of_every_float_type(self, dtype):
        value = feed([self.make()], cube(dtype), [[slice(0, 7), slice(7, 13)]])
        assert_close(value, self.definition(cube(dtype).double()), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("kind", [torch.complex64, torch.int64])
    def test_complex_and_integer_activations_are_refused(self, kind):
        with pytest.raises(TypeError, match="real floating-point"):
            update(self.make(), cube().to(kind))

    def test_forward_returns_the_value_of_the_batch(self):
        if self.two_passes:
            pytest.skip("one pass is not enough")
        metric = self.make()
        few, many = slice(0, 6), slice(6, 13)
        for rows in (few, many):
            value = metric(cube()[rows], **metric._filter_kwargs(labels=LABELS[rows]))
            alone = self.make()
            update(alone, cube(), rows)
            assert_close(value, alone.compute())
        assert_close(metric.compute(), self.definition(cube()))

    def test_copies_and_reset(self):
        metric = self.make()
        value = feed([metric], cube(), [[ALL]])
        for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
            assert copy is not metric
            assert type(copy) is type(metric)
            assert_close(copy.compute(), value, rtol=0, atol=0)
        metric.reset()
        assert metric.n_samples == 0
        assert_close(feed([metric], cube(), [[ALL]]), self.definition(cube()))

    def test_states_are_saved_where_that_is_asked_for(self):
        metric, again = self.make(), self.make()
        value = feed([metric], cube(), [[ALL]])
        assert metric.state_dict() == {}
        metric.persistent(True)
        again.persistent(True)
        again.load_state_dict(metric.state_dict())
        again._update_count = 1
        assert_close(again.compute(), value, rtol=0, atol=0)

    def test_what_a_class_says_of_itself_is_fixed(self):
        metric = self.make()
        assert isinstance(hash(metric), int)
        for attribute in ("is_differentiable", "higher_is_better"):
            with pytest.raises(RuntimeError):
                setattr(metric, attribute, not getattr(metric, attribute))

    def test_arithmetic_and_plot(self):
        metric = self.make()
        feed([metric], cube(), [[ALL]])
        doubled = 2 * metric + 1
        assert_close(doubled.compute(), 2 * self.definition(cube()) + 1)
        figure, axes = metric.plot()
        assert axes.figure is figure
        assert metric.plot(ax=axes)[1] is axes

    def test_moves_take_all_states_along_but_those_to_read(self):
        metric = self.make()
        value = feed([metric], cube(), [[ALL]])
        metric.set_dtype(torch.float64)
        assert_close(metric.to("cpu").compute(), value, rtol=0, atol=0)
        metric.to("meta")  # any device that is not the one before
        for _ in range(2):
            moved = metric._defaults.keys() - set(metric.read_states)
            assert {getattr(metric, state).device.type for state in moved} == {"meta"}
            metric.reset()

    def test_no_gradient_is_kept(self):
        assert not feed([self.make()], cube().requires_grad_(), [[slice(0, 7), slice(7, 13)]]).requires_grad

    def test_inference_mode_and_back(self):
        metric = self.make()
        with torch.inference_mode():
            update(metric, cube(), slice(0, 6))
        update(metric, cube(), slice(6, 13))
        if not metric.complete:
            metric.end_pass()
            with torch.inference_mode():
                update(metric, cube(), slice(0, 6))
            update(metric, cube(), slice(6, 13))
        assert_close(metric.compute(), self.definition(cube()))

    def test_a_collection_serves_it(self):
        if self.two_passes:
            pytest.skip("a collection makes one pass")
        metrics = MetricCollection({"own": self.make(), "other": NormalizedVariance(), "same": self.make()})
        for rows in (slice(0, 6), slice(6, 13)):
            metrics.update(cube()[rows], labels=LABELS[rows])
        values = metrics.compute()
        assert_close(values["own"], self.definition(cube()))
        assert_close(values["same"], self.definition(cube()))

    def test_one_sample_is_nan_with_a_warning(self):
        if self.one_sample:
            pytest.skip("defined for one sample")
        with pytest.warns(UserWarning, match="NaN"):
            assert feed([self.make()], cube(), [[slice(0, 1)]]).isnan().all()

    def test_one_transformation_is_nan_with_a_warning(self):
        if self.one_transformation is not False:
            pytest.skip("defined for one transformation, or their number is given")
        with pytest.warns(UserWarning, match="NaN"):
            assert feed([self.make()], cube()[:, :1], [[ALL]]).isnan().all()
