"""What the pictures of one evaluation cost: heatmap, evolution and response, drawn, rendered and logged to TensorBoard.

    python tests/benchmarks/drawing.py [--rounds 3] [--calls 5]

For networks of 60, 200 and 480 layers, at the 3rd and at the 500th evaluation. Each round is a process of its own,
whose first call counts apart: it loads fonts. The import of matplotlib does not count, nor the removal of what was made
to begin with, which Python's garbage collection would do at some time; what it does during the calls does. The values
are random: a few evaluations, again and again. Exits with 1 where the median of first calls is above its target.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

#: Layers → how many seconds all pictures of an evaluation may take.
TARGETS = {60: 0.3, 200: 0.8, 480: 1.5}

HISTORIES = (3, 500)

#: How many evaluations of a history differ.
DISTINCT = 10

PARTS = ("figure", "render", "log")


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


@contextmanager
def timed(times: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of each part while the context lasts."""
    from lightning_invariance import logging

    kinds = {"heatmap": "figure", "evolution": "figure", "response": "figure", "render": "render", "log_image": "log"}
    originals = {name: getattr(logging, name) for name in kinds}

    def wrapped(name: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            found = originals[name](*args, **options)
            times[kinds[name]] = times.get(kinds[name], 0) + time.perf_counter() - start
            return found

        return run

    for name in kinds:
        setattr(logging, name, wrapped(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(logging, name, original)


def measure(layers: int, count: int, calls: int) -> list[dict[str, float]]:
    """Seconds of each call in this process: in all, and of its parts."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from lightning_invariance.monitor.logging import log_pictures

    history = evaluations(layers, count)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = SimpleNamespace(loggers=[TensorBoardLogger(folder)], fit_loop=loop)
        trainer.loggers[0].experiment.flush()  # makes the file
        gc.collect()
        for _ in range(calls):
            times: dict[str, float] = {}
            start = time.perf_counter()
            with timed(times):
                log_pictures(trainer, history, {"NormalizedVariance": "NormalizedVariance"})
            found.append({"all": time.perf_counter() - start, **times})
        trainer.loggers[0].experiment.close()
    return found


def in_a_new_process(layers: int, count: int, calls: int) -> list[dict[str, float]]:
    """What :func:`measure` finds in a process that has drawn nothing."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", str(layers), str(count), "--calls", str(calls)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: list[dict[str, float]] = json.loads(output.splitlines()[-1])
    return found


def told(name: str, calls: Sequence[dict[str, float]]) -> float:
    """Print seconds and their parts; the median."""
    every = [call["all"] for call in calls]
    median = statistics.median(every)
    parts = ", ".join(f"{part} {statistics.median(call[part] for call in calls):.3f}" for part in PARTS)
    print(f"  {name:<12} {min(every):.3f} / {median:.3f} / {max(every):.3f}   ({parts})", flush=True)
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
    print("seconds: lowest / median / highest (medians of the parts)")
    for layers, target in TARGETS.items():
        for count in HISTORIES:
            rounds = [in_a_new_process(layers, count, options.calls) for _ in range(options.rounds)]
            print(f"{layers} layers, {count} evaluations: at most {target}")
            first = told("first call", [calls[0] for calls in rounds])
            later = told("later calls", [call for calls in rounds for call in calls[1:]])
            missed |= max(first, later) > target
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
