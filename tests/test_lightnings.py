"""What holds in `lightning.pytorch` holds in `pytorch_lightning` too: the same tests, a process for each file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ["test_trainer", "test_callback", "test_strategies", "test_loggers", "test_cli", "test_tensorboard"]


@pytest.mark.parametrize("file", FILES)
def test_it_holds_for_the_other_lightning_too(file, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"{HERE / file}.py"],
        env={**os.environ, "LIGHTNING": "pytorch_lightning"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
