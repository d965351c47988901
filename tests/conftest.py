"""Fixtures and settings of all tests."""

import importlib
import os

import pytest
import torch
from ranks import Ranks

from lightning_invariance.accumulators.backends import devices
from lightning_invariance.measures.adapter import AccumulatingMetric
from lightning_invariance.measures.base import Measure
from lightning_invariance.measures.stratified import Stratified

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers that each start a thread for every core would wait for each other.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))


@pytest.fixture(autouse=True)
def _same_random_numbers_in_any_order():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_left_where_the_tests_run():
    """Checkpoints of a trainer without a folder of its own would be, for instance."""
    before = set(os.listdir())
    yield
    left = [name for name in set(os.listdir()) - before if not name.startswith(".")]
    assert not left, f"tests left {left} in {os.getcwd()}"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Three processes that run a function each time they are called: ``ranks(function, *args)`` → what each returns."""
    group = Ranks(tmp_path_factory.mktemp("ranks"))
    yield group
    group.stop()


if os.environ.get("TRITON_INTERPRET") == "1":  # tests/test_devices.py runs others with Triton's interpreter

    @pytest.fixture(autouse=True)
    def _sums_by_triton(monkeypatch):
        """Tensors of the CPU as if they were on a GPU, whose kernels the interpreter runs."""
        triton_kernels = importlib.import_module("lightning_invariance.accumulators.backends.triton_kernels")
        monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
        monkeypatch.setattr(devices, "_kernels_for", lambda x: triton_kernels if triton_kernels.takes(x) else None)
        monkeypatch.setattr(triton_kernels, "MOST_WIDTH", 2**12)  # it takes as long for wide tiles as for narrow ones
        monkeypatch.setattr(triton_kernels, "MOST_OF_TILE", 2**16)
        monkeypatch.setattr(triton_kernels, "FEWEST_PROGRAMS", 1)


if DEVICE := os.environ.get("LIGHTNING_INVARIANCE_DEVICE"):  # tests/test_devices.py runs others on a GPU
    _add_rows = AccumulatingMetric._add_rows

    def _add_rows_there(self, st_block, *args, **kwargs):
        """Rows of the CPU, added on the device."""
        self.to(DEVICE)
        return _add_rows(self, st_block.to(DEVICE) if isinstance(st_block, torch.Tensor) else st_block, *args, **kwargs)

    def _back_from(method):
        def on_cpu(self):
            found = method(self)
            return found if found is None else found.cpu()

        return on_cpu

    AccumulatingMetric._add_rows = _add_rows_there
    Measure.compute, Measure.response = map(_back_from, (Measure.compute, Measure.response))
    Stratified.per_class = _back_from(Stratified.per_class)
