"""The callback in training runs of several processes, which Lightning starts or torchrun."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_distributed import DATA, Net, measures

from lightning_invariance import InvarianceMonitor, InvarianceResult, evaluate, rotations

SCRIPT = Path(__file__).parent / "train_distributed.py"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def run(launcher, *arguments):
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=240
    )


def test_a_monitor_pickles_as_strategies_that_spawn_processes_need():
    monitor = InvarianceMonitor(rotations(4), measures())
    again = pickle.loads(pickle.dumps(monitor))
    assert again.state_key == monitor.state_key
    assert again.history == []


@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [([], "ddp"), (TORCHRUN, "ddp"), ([], "sharded")],
    ids=["ddp", "torchrun", "sharded"],
)
def test_every_process_has_the_values_of_one(tmp_path, launcher, strategy):
    done = run(launcher, strategy, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    histories = [[InvarianceResult.from_state_dict(state) for state in report["history"]] for report in reports]
    assert [result.epoch for result in histories[0]] == [-1, 0, 1]
    model = Net()
    if strategy == "sharded":
        model.layers[1] = torch.nn.GroupNorm(1, 3)
    model.double().load_state_dict(reports[0]["weights"])
    alone = evaluate(model, DATA, rotations(4), measures(), batch_size=16)
    for history, report in zip(histories, reports, strict=True):
        assert history[-1].n_samples == len(DATA)
        assert all(report["training"])
        for name in alone:
            for layer, expected in alone[name].items():
                torch.testing.assert_close(history[-1][name][layer], expected, rtol=1e-9, atol=0, equal_nan=True)
        assert report["watched"].item() == pytest.approx(alone.mean(), rel=1e-6)
    # Logged once, by one process.
    logged = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0})
    logged.Reload()
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    assert len(logged.Images("NormalizedVariance/heatmap")) == 3
    assert len(logged.Scalars("NormalizedVariance_mean")) == 3


def test_the_history_reaches_the_process_that_called_fit(tmp_path):
    done = run([], "ddp_fork", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(tmp_path / "caller.pt") == [-1, 0, 1]


def test_an_error_on_one_process_ends_the_job_with_that_error(tmp_path):
    done = run([], "ddp", tmp_path, "fail")
    assert done.returncode != 0
    assert "ArithmeticError" in done.stderr
    assert "a bad batch" in done.stderr
