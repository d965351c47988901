"""What holds in `lightning.pytorch` holds in `pytorch_lightning` too: the same tests, a process for each file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
HERE = Path(__file__).parent
#: Of these files the tests that run no Trainer; those that start processes in a third and fourth way; and those of what
#: jsonargparse prints.
LEFT_OUT = "architectures or vision_transformer or residual or another_size or channels_last or compiled_models"
LEFT_OUT += " or compiled_modules_within or sound or tokens or clouds or streams or ddp_fork or ddp_spawn"
LEFT_OUT += " or error_on_one_process and torchrun or help_lists or bad_argument_is_named"

FILES = ["test_trainer", "test_callback", "test_strategies", "test_loggers", "test_cli", "test_tensorboard"]


@pytest.mark.parametrize("file", FILES)
def test_it_holds_for_the_other_lightning_too(file, tmp_path):
    done = subprocess.run(
        [*PYTEST, f"{HERE / file}.py", "-k", f"not ({LEFT_OUT})"],
        env={**os.environ, "LIGHTNING": "pytorch_lightning"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
