"""The script of the paper's figures, end to end on made-up images."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "paper.py"


def test_the_smallest_figure_is_made_and_made_again_from_its_files(tmp_path):
    small = ["--images", "32", "--train", "256", "--epochs", "1", "--filters", "2", "--output", str(tmp_path)]
    printed = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "samples", *small],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout)
        files = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir() if file.suffix != ".json"}
        printed.append(files)
    assert "| n | widest ± of a layer's NV | mean NV | ANOVA rejects |" in printed[0]
    assert printed[:2] == printed[2:]  # nothing was trained or measured again
