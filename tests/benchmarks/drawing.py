"""Seconds that the pictures of one evaluation take: heatmap, evolution and response, drawn and logged to TensorBoard.

    python tests/benchmarks/drawing.py [--rounds 3] [--calls 5]

For networks of 60, 200 and 480 layers, at the 3rd and at the 500th evaluation. Each round is a process of its own,
whose first call counts apart, because it loads fonts; the import of matplotlib does not count. The values are random: a
few evaluations, again and again. Exits with 1 where the median of first calls or of later ones is above its target.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

#: Layers → how many seconds all pictures of an evaluation may take.
TARGETS = {60: 1.2, 200: 1.2, 480: 1.8}

HISTORIES = (3, 500)

#: How many evaluations of a history differ.
DISTINCT = 10


def evaluations(layers: int, count: int) -> list[Any]:
    """The history of a network of residual blocks."""
    from lightning_invariance import InvarianceResult

    generator = torch.Generator().manual_seed(0)
    parts = ("conv1", "bn1", "relu1", "conv2", "bn2", "add")
    names = [f"net.layer{i // 36}.{i // 6 % 6}.{parts[i % 6]}" for i in range(layers)]
    values = {name: torch.randn(64 + i % 64, generator=generator).double() for i, name in enumerate(names)}
    angles = [22.5 * j for j in range(16)]
    response = {name: torch.rand(16, generator=generator).tolist() for name in names}
    made = [
        InvarianceResult(
            {"NormalizedVariance": {name: (v - 0.1 * e).exp() for name, v in values.items()}},
            transformations=[f"{angle}°" for angle in angles],
            parameters={"angle": angles},
            response={"NormalizedVariance": response},
            scores={"val_acc": e / DISTINCT},
        )
        for e in range(min(count, DISTINCT))
    ]
    history = [copy.copy(made[i % len(made)]) for i in range(count)]
    for i, result in enumerate(history):
        result.epoch = i - 1
    return history


def measure(layers: int, count: int, calls: int) -> list[float]:
    """Seconds of each call in this process."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from lightning_invariance.monitor.logging import log_pictures

    history = evaluations(layers, count)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = SimpleNamespace(loggers=[TensorBoardLogger(folder)], fit_loop=loop)
        trainer.loggers[0].experiment.flush()  # makes the file
        gc.collect()
        for _ in range(calls):
            start = time.perf_counter()
            log_pictures(trainer, history, {"NormalizedVariance": "NormalizedVariance"})
            found.append(time.perf_counter() - start)
        trainer.loggers[0].experiment.close()
    return found


def in_a_new_process(layers: int, count: int, calls: int) -> list[float]:
    """Seconds of each call in a process that has drawn nothing before."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", str(layers), str(count), "--calls", str(calls)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: list[float] = json.loads(output.splitlines()[-1])
    return found


def report(name: str, seconds: Sequence[float]) -> float:
    """Print the lowest, the median and the highest; return the median."""
    median = statistics.median(seconds)
    print(f"  {name:<12} {min(seconds):.3f} / {median:.3f} / {max(seconds):.3f}", flush=True)
    return median


def main() -> int:
    """Print every figure; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--one", type=int, nargs=2, metavar=("LAYERS", "EVALUATIONS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(*options.one, options.calls)))
        return 0
    missed = False
    print("seconds: lowest / median / highest")
    for layers, target in TARGETS.items():
        for count in HISTORIES:
            rounds = [in_a_new_process(layers, count, options.calls) for _ in range(options.rounds)]
            print(f"{layers} layers, {count} evaluations: at most {target}")
            first = report("first call", [calls[0] for calls in rounds])
            later = report("later calls", [call for calls in rounds for call in calls[1:]])
            missed |= max(first, later) > target
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
