"""Behaviour when something breaks: kills with resume, ranks that raise, die or hang, full disks, broken files.

    python tests/faults.py [--kills 50]

Prints a table of what happened, and ends with 1 where something was not as it should be.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightnings import CSVLogger, ModelCheckpoint, TensorBoardLogger, pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_invariance import InvarianceMonitor, InvarianceResult, evaluate, rotations
from lightning_invariance.measures import NormalizedDistance, NormalizedVariance

EPOCHS = 12
GENERATOR = torch.Generator().manual_seed(0)
DATA = TensorDataset(torch.rand(96, 1, 16, 16, generator=GENERATOR), torch.arange(96) % 3)
MEASURES = [NormalizedVariance(response=True), NormalizedDistance(samples=4)]


def network() -> nn.Sequential:
    """A small network with the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(1152, 3)
    )


class Net(pl.LightningModule):
    """A classifier."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def train(folder: Path, epochs: int = EPOCHS) -> InvarianceMonitor:
    """Train, from the last checkpoint where there is one, with two loggers and pictures."""
    monitor = InvarianceMonitor(rotations(4), MEASURES)
    checkpoint = ModelCheckpoint(folder / "checkpoints", save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=[TensorBoardLogger(folder, "tb", "0"), CSVLogger(folder, "csv", "0")],
        callbacks=[monitor, checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(Net(), DataLoader(DATA, 32), DataLoader(DATA, 32), ckpt_path=last if last.exists() else None)
    return monitor


def values_of(history: list[InvarianceResult]) -> list[tuple[int | None, list[float]]]:
    """Epoch and layer means of every evaluation."""
    return [(r.epoch, [x for measure in r for x in r.per_layer(measure).values()]) for r in history]


def as_child(*arguments: str) -> subprocess.Popen[str]:
    """This file in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kills(count: int) -> tuple[bool, str]:
    """SIGKILL at random moments, resume, and compare with a training that was not killed."""
    generator, outcomes = random.Random(0), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        start = time.time()
        expected = values_of(train(Path(name) / "whole").history)
        longest = time.time() - start + 8
        run = 0
        while outcomes["killed"] < count:
            folder = Path(name) / str(run)
            while True:
                child = as_child("--train", str(folder))
                try:
                    output, _ = child.communicate(timeout=generator.uniform(3, longest))
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.communicate()
                    outcomes["killed"] += 1
                    continue
                break
            run += 1
            if child.returncode:
                outcomes[f"failed after a resume: {output.strip().splitlines()[-1][:200]}"] += 1
                continue
            found = torch.load(folder / "history.pt", weights_only=True)
            outcomes["history as without kills" if found == expected else "another history"] += 1
    good = set(outcomes) == {"killed", "history as without kills"}
    return good, ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())


def in_rank(rank: int, fault: str, folder: str) -> None:
    """An evaluation in which rank 1 breaks in the third block."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=15)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=3, timeout=limit)
    calls = 0

    def forward(model, x):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 6:
            if fault == "raises":
                raise ArithmeticError("a bad batch")
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return model(x)

    try:
        evaluate(network(), DATA, rotations(4), MEASURES, forward=forward, batch_size=16, progress=False)
        told = "a result"
    except Exception as error:
        told = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    Path(folder, str(rank)).write_text(told)
    os._exit(0)


def ranks(fault: str) -> tuple[bool, str]:
    """Three processes of which one breaks: all others must end with an error."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [context.Process(target=in_rank, args=(rank, fault, folder)) for rank in range(3)]
        start = time.time()
        for process in processes:
            process.start()
        for rank in (0, 2):
            processes[rank].join(120)
        seconds = time.time() - start
        hanging = [rank for rank in (0, 2) if processes[rank].is_alive()]
        for process in processes:
            process.kill()
            process.join()
        told = [Path(folder, str(rank)).read_text() if Path(folder, str(rank)).exists() else "—" for rank in (0, 2)]
    good = not hanging and all("Error" in each for each in told)
    return good, f"after {seconds:.0f} s: " + "; ".join(f"rank {r}: {t}" for r, t in zip((0, 2), told, strict=True))


def full_disk() -> tuple[bool, str]:
    """Files may not grow beyond 40 kB: an image and a result do not fit."""
    with tempfile.TemporaryDirectory() as folder:
        child = as_child("--small-files", folder)
        output, _ = child.communicate()
        return child.returncode == 0, output.strip().splitlines()[-1]


def with_small_files(folder: Path) -> None:
    """Save a result over an older one and train, where files cannot grow."""
    result = evaluate(network(), DATA, rotations(4), MEASURES, progress=False)
    small = evaluate(network(), DATA, rotations(4), MEASURES, layers="5", progress=False)
    small.save(folder / "result.npz")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        result.save(folder / "result.npz")
        told = "saved"
    except OSError as error:
        told = f"{type(error).__name__}: {error.strerror}"
    kept = InvarianceResult.load(folder / "result.npz")
    same = torch.equal(kept["NormalizedVariance"]["5"], small["NormalizedVariance"]["5"])
    left = sorted(path.name for path in folder.iterdir())
    print(f"save: {told}; the file of before is {'whole' if same else 'broken'}; files: {left}")
    sys.exit(not (same and told != "saved" and left == ["result.npz"]))


def read_only() -> tuple[bool, str]:
    """The folder of a result cannot be written to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        child = as_child("--read-only", name)
        output, _ = child.communicate()
        folder.chmod(0o755)
        return child.returncode == 0, output.strip().splitlines()[-1]


def in_read_only(folder: Path) -> None:
    """Save there, without the rights of the superuser."""
    result = evaluate(network(), DATA, rotations(4), MEASURES, progress=False)
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        result.save(folder / "result.npz")
    except OSError as error:
        print(f"save: {type(error).__name__}: {error.strerror}")
        sys.exit(0)
    sys.exit("saved")


def broken_files(count: int = 400) -> tuple[bool, str]:
    """Bytes that changed, and files that end early: a ValueError or the same values, nothing else."""
    generator, outcomes = random.Random(0), Counter[str]()
    result = evaluate(network(), DATA, rotations(4), MEASURES, progress=False)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "result.npz")
        result.save(path)
        whole = path.read_bytes()
        for _ in range(count):
            changed = bytearray(whole)
            if generator.random() < 0.3:
                changed = changed[: generator.randrange(len(whole))]
            for _ in range(generator.randint(1, 4) if changed else 0):
                changed[generator.randrange(len(changed))] = generator.randrange(256)
            path.write_bytes(changed)
            try:
                found = InvarianceResult.load(path)
            except ValueError as error:
                outcomes["ValueError" if "result.npz" in str(error) else "ValueError without the file"] += 1
            except Exception as error:
                outcomes[type(error).__name__] += 1
            else:
                same = values_of([found]) == values_of([result])
                outcomes["the same values" if same else "other values"] += 1
    good = set(outcomes) <= {"ValueError", "the same values"}
    return good, ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    for mode in ("--train", "--small-files", "--read-only"):
        parser.add_argument(mode, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.train:
        torch.save(values_of(train(options.train).history), options.train / "history.pt")
        return 0
    if options.small_files:
        with_small_files(options.small_files)
    if options.read_only:
        in_read_only(options.read_only)
    print("| fault | as it should be | what happened |\n|---|---|---|", flush=True)
    faults = {f"one rank of three {fault}": lambda fault=fault: ranks(fault) for fault in ("raises", "dies", "hangs")}
    faults |= {"a file that cannot grow": full_disk, "a read-only folder": read_only, "broken files": broken_files}
    faults[f"{options.kills} kills with resume"] = lambda: kills(options.kills)
    bad = 0
    for name, fault in faults.items():
        good, told = fault()
        bad += not good
        print(f"| {name} | {'yes' if good else 'NO'} | {told} |", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
