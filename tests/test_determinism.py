"""Default arguments give the same bits in every process, under any load, and after a kill.

``python tests/test_determinism.py evaluate|train FOLDER THREADS`` runs in a process of its own.
"""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from lightnings import ModelCheckpoint, pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_invariance import InvarianceMonitor, InvarianceResult, TransformationSet, evaluate, rotations

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(256, 3, 8, 8, generator=GENERATOR)
DATA = TensorDataset(IMAGES, torch.arange(256) % 2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 2),
    )


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class DiesInEpoch1(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            os._exit(3)


def train(folder, *callbacks, ckpt_path=None):
    torch.manual_seed(1)
    monitor = InvarianceMonitor(rotations(16))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[monitor, ModelCheckpoint(folder, save_last=True), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader(DATA, 64), DataLoader(DATA, 64), ckpt_path=ckpt_path)
    return monitor.history


@contextlib.contextmanager
def busy_threads(count):
    """Load on the machine while the context lasts."""
    end = threading.Event()

    def work():
        x = torch.rand(200, 200)
        while not end.is_set():
            x = (x @ x).clamp(0, 1)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def run(what, folder):
    """Run in another process with as many threads: a training rounds otherwise with more of them."""
    command = [sys.executable, __file__, what, str(folder), str(torch.get_num_threads())]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def assert_same_bits(one, other):
    assert list(one) == list(other)
    for measure in one:
        assert list(one[measure]) == list(other[measure])
        for layer, values in one[measure].items():
            assert torch.equal(values.nan_to_num(-1), other[measure][layer].nan_to_num(-1)), layer


def test_an_evaluation_has_the_same_bits_in_another_process_beside_busy_threads(tmp_path):
    done = run("evaluate", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    there = InvarianceResult.load(tmp_path / "result.npz")
    assert_same_bits(evaluate(network(), IMAGES, rotations(16)), there)
    with busy_threads(2):
        assert_same_bits(evaluate(network(), IMAGES, rotations(16)), there)


def test_a_killed_and_resumed_training_has_the_same_history_to_the_bit(tmp_path):
    done = run("train", tmp_path)
    assert done.returncode == 3, done.stderr[-2000:]
    resumed = train(tmp_path, ckpt_path=tmp_path / "last.ckpt")
    whole = train(tmp_path / "whole")
    assert [result.epoch for result in resumed] == [result.epoch for result in whole] == [-1, 0, 1]
    for one, other in zip(resumed, whole, strict=True):
        for measure in one:
            for layer in one[measure]:
                assert torch.equal(one.per_channel(measure, layer), other.per_channel(measure, layer))


class NormalizesInPlace(nn.Module):
    """Subtracts and divides, out of place or in one of the ways in which networks do it in place."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
        self.silu = nn.SiLU(inplace=way == "SiLU")

    def forward(self, x):
        if self.way == "operators":
            x -= 0.3
            x /= 0.5
        elif self.way == "methods":
            x.sub_(0.3).div_(0.5)
        elif self.way == "torchvision":
            from torchvision.transforms import v2

            x = v2.Normalize([0.3], [0.5], inplace=True)(x)
        elif "SiLU" not in self.way:
            x = (x - 0.3) / 0.5
        return self.net(self.silu(x) if "SiLU" in self.way else x)


@pytest.mark.parametrize(
    ("way", "plain"),
    [("operators", ""), ("methods", ""), ("torchvision", ""), ("SiLU", "SiLU out of place")],
)
def test_a_network_that_changes_its_input_in_place_has_the_values_of_one_that_does_not(way, plain):
    gains = TransformationSet.from_callables({"same": lambda x: x, "half": lambda x: 0.5 * x})
    x = torch.rand(512, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    found, expected = (evaluate(NormalizesInPlace(each), x, gains, layers="net.*") for each in (way, plain))
    for layer, values in expected["NormalizedVariance"].items():
        torch.testing.assert_close(found["NormalizedVariance"][layer], values, rtol=1e-6, atol=0)
    assert torch.equal(x, kept)


def settings():
    """What an evaluation might change in the process."""
    import random
    import warnings

    import matplotlib
    import numpy as np

    return {
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "type": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "oneDNN": (torch.backends.mkldnn.enabled, torch.backends.mkldnn.deterministic),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "random": (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
        "pictures": (matplotlib.get_backend(), dict(matplotlib.rcParams)),
        "threads of Python": threading.active_count(),
        "folder": os.getcwd(),
    }


def pages_of_activations():
    """How many pages the system hands out while activations of 40 MiB are made and freed ten times.

    The C library maps more than 32 MiB anew each time, unless a process asks it not to.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_nothing_of_the_process_changes(tmp_path):
    evaluate(network(), IMAGES[:8], rotations(4)).plot()  # what is loaded once, such as fonts
    before, pages = settings(), pages_of_activations()
    evaluate(network(), IMAGES, rotations(4), confidence=0.95)
    train(tmp_path)
    after = settings()
    after["random"] = before["random"]  # the training draws numbers
    assert after == before
    evaluate(network(), IMAGES, rotations(4))
    assert settings()["random"][0] == before["random"][0]
    assert pages_of_activations() > pages / 2  # freed memory returns to the system as it did


def main(what, folder, threads):
    torch.set_num_threads(threads)
    if what == "train":
        train(folder, DiesInEpoch1())
    with busy_threads(2):
        evaluate(network(), IMAGES, rotations(16)).save(folder / "result.npz")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
