"""Sums on GPUs and other accelerators: what they come to, and what they launch and move."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import Counted
from definitions import anova, goodfellow, quotient, same_equivariance, sd, sv, td, tv

from lightning_invariance import quarter_turns, rotations
from lightning_invariance.accumulators.backends import devices
from lightning_invariance.accumulators.deviations import Deviations
from lightning_invariance.accumulators.layer_state import LayerState
from lightning_invariance.accumulators.rows import Rows
from lightning_invariance.measures import (
    Anova,
    ChannelEquivariance,
    Consistency,
    DistanceSameEquivariance,
    EffectiveInvariance,
    EquivarianceCorrelation,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    TransformationDistance,
    VarianceSameEquivariance,
)

TESTS = Path(__file__).parent

MEASURES = {
    "NV": (NormalizedVariance(), 16),
    "default": (NormalizedVariance(response=True), 25),
    "NV of standard deviations": (NormalizedVariance(squared=False), 17),
    "Anova": (Anova(), 16),
    "paired Anova": (Anova(paired=True), 23),
    "TD": (TransformationDistance(), 24),
    "TD of maps": (TransformationDistance("euclidean", over="channel"), 24),
    "TD of angles": (TransformationDistance("cosine", over="channel"), 23),
    "SD": (SampleDistance(), 24),
    "ND": (NormalizedDistance(), 24),
    "Goodfellow": (Goodfellow(), 24),
    "Consistency": (Consistency(), 24),
    "same-equivariance": (VarianceSameEquivariance(transformations=rotations(16)), 28),
    "distance same-equivariance": (DistanceSameEquivariance(transformations=rotations(16)), 22),
    "effective invariance": (EffectiveInvariance(), 19),
    "permuted channels": (ChannelEquivariance(rotations(16)), 52),
    "channels that stay": (ChannelEquivariance(rotations(16), "identity"), 60),
    "correlation": (EquivarianceCorrelation(rotations(16)), 58),
}

#: Times the bytes of a block, where they are more than kernels: float64 throughout, and states beside few samples.
BYTES = {"paired Anova": 31}


def counted(measure, block):
    """What the third block of a layer costs."""
    layer = LayerState(measure.needs, tuple(block.shape[2:]), n_transformations=block.shape[1], device=block.device)
    for start in range(0, 3 * len(block), len(block)):
        with Counted() as found:
            layer.add(Rows(block, torch.arange(start, start + len(block))))
    return found


@pytest.mark.parametrize("name", MEASURES)
def test_a_block_takes_few_kernels_that_move_few_bytes_and_read_nothing_back(name):
    measure, most = MEASURES[name]
    block = torch.empty(8, 16, 64, 14, 14, device="meta")  # where reading a value is an error
    found = counted(measure, block)
    assert 0 < found.kernels <= most, found.names
    assert found.bytes <= BYTES.get(name, most) * block.nbytes


def consistency(x):
    """The share of pairs of transformations with one winning channel, the mean over samples and positions."""
    winners = x.argmax(2)
    same = winners[:, :, None] == winners[:, None]
    m = x.shape[1]
    return (same.sum((1, 2)) - m).mean() / (m * (m - 1))


TURNS = quarter_turns()
BACK = [lambda maps, k=k: np.rot90(maps, -k, (-2, -1)) for k in range(4)]

#: Measures with their definitions, which use nothing of the package.
DEFINITIONS = {
    "NV": (NormalizedVariance(), lambda x: quotient(tv(x), sv(x))),
    "standard deviations": (NormalizedVariance(squared=False), lambda x: quotient(tv(x, False), sv(x, False))),
    "F": (Anova("f"), lambda x: anova(x, "f", False)),
    "paired F": (Anova("f", paired=True), lambda x: anova(x, "f", True)),
    "TD": (TransformationDistance(), td),
    "TD of maps": (TransformationDistance("euclidean", over="channel"), lambda x: td(x, "euclidean", "channel")),
    "ND": (NormalizedDistance(), lambda x: quotient(td(x), sd(x))),
    "Goodfellow": (Goodfellow(0.1), lambda x: goodfellow(x, 0.1, "normal", 1)[0]),
    "Consistency": (Consistency(), consistency),
    "same-equivariance": (
        VarianceSameEquivariance(TURNS, normalize=True, over="channel"),
        lambda x: same_equivariance(x, BACK, True, "channel", None),
    ),
    "distance same-equivariance": (
        DistanceSameEquivariance(TURNS, "euclidean", normalize=True, over="channel"),
        lambda x: same_equivariance(x, BACK, True, "channel", None, "euclidean"),
    ),
}


def test_the_paired_f_is_exact_where_all_samples_change_alike(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    generator = torch.Generator().manual_seed(0)
    st = 1000 * torch.rand(1, 4, 12, generator=generator) + torch.randn(10, 1, 12, generator=generator)
    st += 1e-3 * torch.randn(10, 4, 12, generator=generator)
    st[:, 1, :3] = 3e38 * (1 - 0.4 * torch.rand(10, 3, generator=generator))  # differences that float32 does not hold
    st[:, 2, :3] = -st[:, 1, :3]
    measure = Anova("f", paired=True)
    for rows in st.split(4):
        measure.update(rows)
    np.testing.assert_allclose(measure.compute().numpy(), anova(st.numpy().astype(np.longdouble), "f", True), rtol=1e-9)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_values_of_every_family_are_the_definition(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    generator = torch.Generator().manual_seed(0)
    st = torch.rand(10, 4, 6, 5, 5, generator=generator) + torch.rand(10, 1, 6, 5, 5, generator=generator)
    st[:, :, 1] *= 1e-25  # whose squares float32 does not hold
    st[:, :, 2] = 0
    st[3, 2, 3] = 0
    st[:, :, 4] = torch.arange(4.0)[:, None, None]
    made, definition = DEFINITIONS[name]
    measure = made.clone()
    for rows in (torch.arange(4), torch.arange(4, 10)):
        measure.update(st[rows], indices=rows)
    expected = torch.from_numpy(np.array(definition(st.numpy().astype(np.longdouble)), dtype=np.float64))
    found = measure.compute().double()
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-5, atol=0, equal_nan=True)


#: Activations and the axis of their channels: maps, tokens, single units.
ACTIVATIONS = [((3, 6, 6), 0), ((10, 7, 7), 0), ((40,), 0), ((), 0), ((9, 30), 1)]


#: Activations with types and sizes of values: squares of the smaller ones are beyond float32.
CUBES = [(*activation, torch.float32, 1.0) for activation in ACTIVATIONS]
CUBES += [(*activation, torch.float32, 1e-25) for activation in (ACTIVATIONS[0], ACTIVATIONS[2])]
CUBES += [((3, 6, 6), 0, torch.float16, 1.0), ((9, 30), 1, torch.bfloat16, 1.0), ((3, 6, 6), 0, torch.bfloat16, 1e-25)]


@pytest.mark.parametrize("reference", [2, None])
@pytest.mark.parametrize(("shape", "axis", "dtype", "scale"), CUBES)
def test_sums_and_changes_of_any_activation_are_the_definition(shape, axis, reference, dtype, scale, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)  # which is the CPU
    generator = torch.Generator().manual_seed(0)
    st = torch.randn(11, 1, *shape, generator=generator) + torch.randn(11, 5, *shape, generator=generator)
    st = (scale * st).to(dtype)
    accumulator = Deviations(response=True, reference=reference)
    states, n = accumulator.empty(), 0
    for block in st.split([1, 4, 6]):
        rows = Rows(block, before=n, channel_axis=axis)
        accumulator.add(states, rows)
        n += len(block)
        # Triton reads half precision as it is.
        assert rows.values.dtype == (dtype if os.environ.get("TRITON_INTERPRET") == "1" else torch.float32)
    x = st.double()
    of_rows, of_columns = x - x.mean(1, keepdim=True), x - x.mean(0)
    apart = of_rows if reference is None else x - x[:, [reference]]
    channels = shape[axis] if shape else 1
    maps = apart.reshape(11, 5, *(shape or (1,))).movedim(2 + axis, 2).reshape(11, 5, channels, -1)
    for found, expected in (
        (states["row_spread"], of_rows.square().sum((0, 1)).flatten()),
        (states["column_spread"][0], of_columns.square().sum((0, 1)).flatten()),
        (states["changes"], maps.square().sum((0, 3)) * (5 / 4 if reference is None else 1 / 2)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_rows_may_be_added_on_a_device_after_others_on_the_cpu_and_a_merge(monkeypatch):
    st = torch.rand(30, 4, 6400, generator=torch.Generator().manual_seed(0))  # as wide as float32 means are kept for
    accumulator, parts = Deviations(response=True, reference=0), []
    for some in st.split(10):
        states, n = accumulator.empty(), 0
        for block in some[:8].split(4):
            accumulator.add(states, Rows(block, before=n))
            n += len(block)
        parts.append({**states, "n_samples": torch.tensor(n)})
    states = accumulator.merge({**accumulator.merge(*parts[:2]), "n_samples": torch.tensor(16)}, parts[2])
    assert states["offsets"].dtype == torch.float32
    assert len(states["offsets"]) > 1
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
        for n, some in enumerate(st.split(10)):
            accumulator.add(states, Rows(some[8:], before=24 + 2 * n))
    x = st.double()
    torch.testing.assert_close(
        states["row_spread"], (x - x.mean(1, keepdim=True)).square().sum((0, 1)), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(states["column_spread"][0], (x - x.mean(0)).square().sum((0, 1)), rtol=1e-6, atol=0)


def test_without_a_working_triton_it_warns_once_and_takes_pytorch(monkeypatch):
    class Broken:
        calls = 0

        @staticmethod
        def add_deviations(*_):
            Broken.calls += 1
            raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)
    monkeypatch.setattr(devices, "_tries_triton", True)
    monkeypatch.setattr(devices, "_kernels_for", lambda _: Broken if devices._tries_triton else None)
    st = torch.randn(8, 4, 10, generator=torch.Generator().manual_seed(0))
    metric = NormalizedVariance()
    with pytest.warns(UserWarning, match="Triton could not compile.*no C compiler"):
        metric.update(st[:4])
    metric.update(st[4:])
    assert Broken.calls == 1
    expected = st.double().var(1).mean(0) / st.double().var(0).mean(0)
    torch.testing.assert_close(metric.compute(), expected, rtol=1e-6, atol=0)


#: Tests of the sums, by file: splits, merges, extreme and special values, changes. Only the CPU has float32 means; over
#: the largest cubes the interpreter takes long.
OF_SUMS = {
    "test_variance": "special_cases or out_of_range or first_column",
    "test_extremes": "NV",
    "test_response": "identity or batches or nan",
    "test_devices": "definition and (NV or Goodfellow)",
}


def test_the_kernels_of_triton_pass_the_tests_of_the_sums():
    pytest.importorskip("triton")
    some = " or ".join(f"({name} and ({tests}))" for name, tests in OF_SUMS.items())
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*pytest_of, *(str(TESTS / f"{name}.py") for name in OF_SUMS), "-k", some],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", found.stdout)[1]) >= 50


#: Tests of measures that are run on a GPU where there is one, without tests that pretend to be elsewhere, and tests of
#: float32 means, which the CPU keeps.
ON_GPU = ["variance", "extremes", "response", "distance", "anova", "goodfellow"]
ON_GPU += ["equivariance", "stratified", "sample_pairs", "groups"]
NOT_ON_GPU = "not (small_for_a_norm or other_types or different_types)"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("name", ON_GPU)
def test_the_measures_pass_their_tests_on_a_gpu(name):
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    found = subprocess.run(
        [*pytest_of, f"{TESTS}/test_{name}.py", "-k", NOT_ON_GPU],
        env={**os.environ, "LIGHTNING_INVARIANCE_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]


#: Architectures of NVIDIA's cards of 2018 and 2022; ptxas has a name of its own for features of the last.
CARDS = {75: "sm_75", 90: "sm_90a"}


def compiled(kernel, pointers, constants, warps, card, folder):
    """A kernel for a card: its intermediate form, and what ptxas says of it.

    Args:
        kernel: the function.
        pointers: types of its first arguments; those that follow are 32-bit integers, or limits in float32.
        constants: name → value of the last arguments.
        warps: of a program.
        card: see :data:`CARDS`.
        folder: for files.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    rest = [name for name in kernel.arg_names[len(pointers) :] if name not in constants]
    types = [*pointers, *("fp32" if name in ("smallest", "largest") else "i32" for name in rest)]
    source = ASTSource(
        fn=kernel,
        signature=dict(zip(kernel.arg_names, [*types, *len(constants) * ["constexpr"]], strict=True)),
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
    )
    found = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": warps}).asm
    (folder / "kernel.ptx").write_text(found["ptx"])
    ptxas = triton.knobs.nvidia.ptxas.path
    command = [ptxas, "-v", f"-arch={CARDS[card]}", str(folder / "kernel.ptx"), "-o", os.devnull]
    return found["ttgir"], subprocess.run(command, capture_output=True, text=True, check=True).stderr


def assert_in_registers(told, m):
    """Nothing is spilled, and a multiprocessor with 65,536 registers runs 12 warps at a time, 10 with many columns."""
    assert int(re.search(r"(\d+) bytes spill stores", told)[1]) == 0, told
    warps = 12 if m <= 16 else 10
    assert int(re.search(r"Used (\d+) registers", told)[1]) <= 65536 / (32 * warps), told


@pytest.fixture
def kernels_of_triton():
    pytest.importorskip("triton", minversion="3.4")  # the first with these arguments of its compiler
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter does not compile")
    from lightning_invariance.accumulators.backends import triton_kernels

    return triton_kernels


#: Columns, and the type of activations.
SIZES = [*((m, "fp32") for m in (4, 16, 64, 256)), (16, "fp16"), (16, "bf16")]


@pytest.mark.parametrize(("m", "dtype"), SIZES)
@pytest.mark.parametrize("card", CARDS)
def test_the_kernel_fits_into_the_registers_of_every_card_and_reads_activations_once(
    card, m, dtype, tmp_path, kernels_of_triton
):
    columns, width, warps, positions = kernels_of_triton.tile_of(m, 64 * 3136, 3136, True)
    constants = {"CHANGES": True, "CENTRED": False, "POOLED": positions == 3136, "FULL": columns == m}
    constants |= {"COLUMNS": columns, "WIDTH": width}
    code, told = compiled(kernels_of_triton._add_rows, [f"*{dtype}", *5 * ["*fp64"]], constants, warps, card, tmp_path)
    # Tiles of columns and activations: the narrow ones are activations, of the first row and in the loop of the next,
    # the float64 ones are states. Where float32 does not hold a tile, it is read again as one column after another.
    tiles = re.findall(rf"tt\.load .*tensor<{columns}x{width}x!tt\.ptr<(f32|bf16|f16|f64)>", code)
    assert sorted(tiles) == sorted(2 * [dtype.replace("fp", "f"), "f64"]), tiles
    assert_in_registers(told, m)
