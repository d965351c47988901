"""The example for LightningCLI, run as its first line says, and with the other Lightning."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("jsonargparse")
EXAMPLE = Path(__file__).parents[1] / "examples" / "cli.py"
CONFIG = EXAMPLE.with_suffix(".yaml")


def check_logs(folder):
    (log,) = folder.glob("runs/cli/lightning_logs/version_0/events*")
    logged = EventAccumulator(str(log))
    logged.Reload()
    tags = set(logged.Tags()["scalars"])
    for measure in ("NormalizedVariance", "Anova", "NormalizedVariance_shift"):
        assert {f"{measure}/net.0", f"{measure}/net.5", f"{measure}_mean"} <= tags
        assert len(logged.Scalars(f"{measure}_mean")) == 2  # the untrained network, and after the epoch
    config = (log.parent / "config.yaml").read_text()  # what Lightning keeps of the run
    assert "class_path: lightning_invariance.rotations" in config


def test_monitor_transformations_and_measures_from_yaml(tmp_path):
    command = [sys.executable, str(EXAMPLE), "fit", "--config", str(CONFIG), "--trainer.max_epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    check_logs(tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example with arguments in this process, in a folder of its own."""

    def call(*arguments, script=EXAMPLE):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), "fit", *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")

    return call


def test_the_other_lightning_has_a_command_line_too(tmp_path, run):
    for path in (EXAMPLE, CONFIG):
        (tmp_path / path.name).write_text(path.read_text().replace("lightning.pytorch", "pytorch_lightning"))
    run("--config", tmp_path / CONFIG.name, "--trainer.max_epochs", "1", script=tmp_path / EXAMPLE.name)
    check_logs(tmp_path)


def test_help_lists_the_arguments(run, capsys):
    with pytest.raises(SystemExit):
        run("--trainer.callbacks.help", "lightning_invariance.InvarianceMonitor")
    told = capsys.readouterr().out
    for words in (
        ".transformations TRANSFORMATIONS",
        "the set, such as",
        ".every_n_epochs EVERY_N_EPOCHS",
        "how often",
    ):
        assert words in told


def test_a_bad_argument_is_named(tmp_path, run, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text(CONFIG.read_text().replace("max_samples: 128", "max_samples: many"))
    with pytest.raises(SystemExit) as ended:
        run("--config", config)
    assert ended.value.code != 0
    assert "max_samples" in capsys.readouterr().err
