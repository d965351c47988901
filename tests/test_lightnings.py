"""The callback in a Trainer of `pytorch_lightning`: what depends on the classes of Lightning, in one process."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
#: By file: tests that meet classes of Lightning (callbacks, loggers, strategies, checkpoints, hooks of data).
TESTS = {
    "test_callback.py": "in_tensorboard or can_watch_it or goes_on_after_a_resume or two_names or without_data",
    "test_trainer.py": "averaged_weights or split_models or is_tested or hooks_of_the_trainer",
    "test_loggers.py": "several_loggers",
}


def test_the_other_lightning_has_the_callbacks_loggers_and_checkpoints_of_this_one():
    files, chosen = [str(HERE / name) for name in TESTS], " or ".join(TESTS.values())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *files, "-k", chosen],
        env={**os.environ, "LIGHTNING": "pytorch_lightning"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
