"""Run the notebooks of this folder, and keep what they print and draw.

    python examples/notebooks.py [--check] [NAME ...]

Needs ``pip install -e ".[notebooks]"``. All of them take less than a minute on two
cores. ``--check`` leaves the files as they are.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def run(path: Path, keep: bool) -> float:
    """Run a notebook from its folder, and return the seconds; an error in a cell is raised."""
    notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}  # when each cell ran
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    if keep:
        nbformat.write(notebook, path)
    return time.perf_counter() - start


def main() -> None:
    """Run the notebooks that are named, or all."""
    names = [name for name in sys.argv[1:] if name != "--check"]
    for path in sorted(HERE.glob("*.ipynb")):
        if not names or path.stem in names:
            print(f"{path.name}: {run(path, keep='--check' not in sys.argv):.0f} s", flush=True)


if __name__ == "__main__":
    main()
