"""The example for LightningCLI, run as its first line says."""

import subprocess
import sys
from pathlib import Path

import pytest
from lightnings import NAME
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("jsonargparse")
EXAMPLE = Path(__file__).parents[1] / "examples" / "cli.py"


def example(folder, suffix):
    """The example as it stands, for the Lightning of the tests."""
    copy = folder / f"example{suffix}"
    copy.write_text(EXAMPLE.with_suffix(suffix).read_text().replace("lightning.pytorch", NAME))
    return copy


def run(folder, *arguments):
    command = [sys.executable, str(example(folder, ".py")), "fit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder)


def test_monitor_transformations_and_measures_from_yaml(tmp_path):
    done = run(tmp_path, "--config", str(example(tmp_path, ".yaml")), "--trainer.max_epochs", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = tmp_path.glob("runs/cli/lightning_logs/version_0/events*")
    logged = EventAccumulator(str(log))
    logged.Reload()
    tags = set(logged.Tags()["scalars"])
    for measure in ("NormalizedVariance", "Anova", "NormalizedVariance_shift"):
        assert {f"{measure}/net.0", f"{measure}/net.5", f"{measure}_mean"} <= tags
        assert len(logged.Scalars(f"{measure}_mean")) == 2  # the untrained network, and after the epoch
    config = (log.parent / "config.yaml").read_text()  # what Lightning keeps of the run
    assert "class_path: lightning_invariance.rotations" in config


def test_help_lists_the_arguments(tmp_path):
    done = run(tmp_path, "--trainer.callbacks.help", "lightning_invariance.InvarianceMonitor")
    assert done.returncode == 0, done.stderr[-3000:]
    for words in (
        ".transformations TRANSFORMATIONS",
        "the set, such as",
        ".every_n_epochs EVERY_N_EPOCHS",
        "how often",
    ):
        assert words in done.stdout


def test_a_bad_argument_is_named(tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text(example(tmp_path, ".yaml").read_text().replace("max_samples: 128", "max_samples: many"))
    done = run(tmp_path, "--config", str(config))
    assert done.returncode != 0
    assert "max_samples" in done.stderr
