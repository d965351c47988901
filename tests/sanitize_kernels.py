"""The C code under AddressSanitizer and UndefinedBehaviorSanitizer, on random shapes and layouts.

    python tests/sanitize_kernels.py [--cases 150] [--seed 0]

Compiles ``accumulators/csrc`` anew with both, and runs it in a process of its own, against the definitions in float64.
Ends with 0 and says so where the compiler does not have them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from lightning_invariance.accumulators import Deviations, Rows, means_of
from lightning_invariance.accumulators.backends import c_kernels, pairs

SOURCES = Path(c_kernels.__file__).parents[1] / "csrc"
FLAGS = ["-O1", "-g", "-fPIC", "-shared", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-Wall", "-Werror"]
FLAGS += ["-fno-sanitize-recover=undefined", "-DPy_LIMITED_API=0x030A0000", "-DFOR_EACH_PROCESSOR="]


#: Loaded first: the sanitizer replaces their functions.
FIRST = ("libasan.so", "libstdc++.so.6")


def compiled(folder: str) -> tuple[Path, str] | None:
    """The module with sanitizers, and the libraries to load first; None where the compiler has no sanitizers."""
    module = Path(folder) / "_kernels.so"
    compiler = os.environ.get("CC", "gcc")
    options = [compiler, *FLAGS, f"-I{sysconfig.get_path('include')}", "-o", str(module)]
    try:
        subprocess.run([*options, "-x", "c", os.devnull], check=True, capture_output=True)
        asked = [[compiler, f"-print-file-name={name}"] for name in FIRST]
        found = [subprocess.run(each, check=True, capture_output=True, text=True).stdout.strip() for each in asked]
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"Not run: no compiler with sanitizers ({error}).")
        return None
    subprocess.run([*options, *map(str, SOURCES.glob("*.c"))], check=True)
    return module, " ".join(found)


def load(module: str) -> None:
    """Let the package use a module that was compiled elsewhere."""
    spec = importlib.util.spec_from_file_location("_kernels", module)
    assert spec is not None
    assert spec.loader is not None
    c_kernels._kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(c_kernels._kernels)


def block(generator: random.Random, m: int, k: int) -> torch.Tensor:
    """Some rows: none, one or many, contiguous or not, with values that float32 holds and others."""
    n = generator.choice([0, 1, 2, 4, 7, 33, 300])
    n = min(n, max(1, 200_000 // (m * k)))
    layout = generator.choice(["contiguous", "columns", "rows", "moved"])
    x = torch.randn(n, m, k)
    if layout == "columns":
        x = torch.randn(n, m + 3, k)[:, 1 : m + 1]
    elif layout == "rows":
        x = torch.randn(2 * n, m, k)[::2]
    elif layout == "moved":
        x = torch.randn(n, k, m).movedim(1, 2)
    offset, scale = generator.choice([0, 0, 3, 1e5]), generator.choice([1, 1, 1e-30, 1e25])
    x = (x + offset) * scale
    if generator.random() < 0.1 and n:
        x = x.clone()
        x[0, 0, generator.randrange(k)] = float("nan")
    return x


def check(generator: random.Random) -> None:
    """One random case of each function."""
    m = generator.choice([1, 2, 3, 16, 63, 64, 65, 255, 256, 257, 300])
    k = max(1, generator.choice([0, 64, 128, 1024, 2048]) + generator.choice([-1, 0, 1, 17]))
    torch.set_num_threads(generator.randint(1, 4))
    channels = generator.choice([each for each in (1, 2, 17, 64, 65, k) if k % each == 0])
    axis = generator.choice([0, 1])
    shape = (channels, k // channels) if axis == 0 else (k // channels, channels)
    reference = generator.choice([None, generator.randrange(m)])
    accumulator = Deviations(response=generator.random() < 0.7, reference=reference)
    states, rows = accumulator.empty(), []
    for _ in range(3):
        x = block(generator, m, k)
        if len(x):
            values = x.unflatten(2, shape)
            accumulator.add(states, Rows(values, before=sum(map(len, rows)), channel_axis=axis))
            rows.append(x)
        network = pairs._network(min(m, c_kernels.MOST_SORTED))
        found = c_kernels.absolute_differences(x[:, : c_kernels.MOST_SORTED], network)
        some = x[:, : c_kernels.MOST_SORTED].double()
        expected = sum(((some - some[:, j : j + 1]).abs().sum((0, 1)) for j in range(some.shape[1])), torch.zeros(k))
        rounding = 1e-5 * some.nan_to_num().abs().sum().item() / k * len(some)
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=rounding, equal_nan=True)
        each = c_kernels.absolute_differences(x[:, : c_kernels.MOST_SORTED], network, True)
        torch.testing.assert_close(each.sum(0), found, rtol=1e-6, atol=0, equal_nan=True)
        if m <= c_kernels.MOST_COLUMNS:
            check_influences(x, m, k)
    if rows:
        x = torch.cat(rows).double()
        if accumulator.response and not x.isnan().any():
            origin, factor = (x.mean(1), m / max(1, m - 1)) if reference is None else (x[:, reference], 1 / 2)
            apart = factor * (x - origin[:, None]).square().unflatten(2, shape).sum((0, 3 - axis))
            # Means of rows are rounded to float32: 2 c 6e-8 a of small deviations c in a row of large ones a.
            part = 1e-10 if reference is None else 1e-12
            torch.testing.assert_close(states["changes"], apart, rtol=1e-3, atol=part * apart.max().item())
        x, means = x.nan_to_num(), means_of(states).nan_to_num()
        known = means_of(states).isfinite().all(0)
        rounding = 1e-5 * x.abs().max().item()
        torch.testing.assert_close(means[:, known], x.mean(0)[:, known], rtol=1e-4, atol=rounding)


def check_influences(x: torch.Tensor, m: int, k: int) -> None:
    """Influences against their definition."""
    means, weights = torch.randn(m, k), torch.rand(4, k) / torch.tensor([1, 1, 1, 100])[:, None]
    counts = -(torch.rand(k) > 0.2).int()
    squares, fourths = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    of_changes = c_kernels.ChangesOfSamples(torch.rand(k), m // 2) if k % 2 else None
    found = c_kernels.add_influences(x, means, weights, counts, squares, fourths, of_changes)
    on_sum = found.on_sum
    wide, (w, v, b, s) = x.double(), weights.double()
    of_rows = (wide - wide.mean(1, keepdim=True)).square().sum(1)
    of_columns = (wide - means).square().sum(1)
    psi = torch.where(counts < 0, (w * of_rows + v * of_columns - b) / (1 - s * of_columns).clamp_min(0.05), 0.0)
    if psi.numel() and psi.isfinite().all() and psi.abs().max() < 1e8:  # float32 holds the squares
        rounding = 1e-5 * psi.abs().max().item()
        torch.testing.assert_close(on_sum, psi.sum(1), rtol=1e-4, atol=k * rounding)
        torch.testing.assert_close(squares, psi.square().sum(0), rtol=1e-3, atol=len(x) * rounding**2)
        if of_changes is not None and 1e-10 < wide.abs().max() < 1e10:  # float32 holds the squares
            changes = (wide - wide[:, [m // 2]]).square() @ of_changes.factors.double()
            torch.testing.assert_close(found.changes, changes, rtol=1e-4, atol=0)
            torch.testing.assert_close(found.spreads.double(), (wide - means).square().sum(1), rtol=1e-4, atol=0)


def main() -> int:
    """Compile, start the process under test, and give its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--module", help="used by the process under test")
    options = parser.parse_args()
    if options.module:
        load(options.module)
        generator = random.Random(options.seed)
        torch.manual_seed(options.seed)
        for _ in range(options.cases):
            check(generator)
        print(f"{options.cases} cases without a report of the sanitizers.")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        made = compiled(folder)
        if made is None:
            return 0
        command = [sys.executable, __file__, "--module", str(made[0])]
        command += ["--cases", str(options.cases), "--seed", str(options.seed)]
        environment = {**os.environ, "LD_PRELOAD": made[1], "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
