"""Whole evaluations on accelerators: emulated by the CPU, with float64 and without as MPS, and CUDA where it is."""

import warnings
from contextlib import nullcontext
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from emulated import NAME, Emulation, ThisProcess, Watched, process_with_device
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils import backend_registration
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_invariance import InvarianceMonitor, evaluate, functional, rotations
from lightning_invariance.measures import (
    Anova,
    Consistency,
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    Stratified,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

EMULATED = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="PyTorch is too old"
)
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")

MEASURES = {
    "NV": lambda: NormalizedVariance(response=True),
    "TV": TransformationVariance,
    "TV of standard deviations": lambda: TransformationVariance(squared=False),
    "rejections": Anova,
    "p": lambda: Anova("p"),
    "paired F": lambda: Anova("f", paired=True),
    "ND": NormalizedDistance,
    "SD": SampleDistance,
    "TD of maps": lambda: TransformationDistance("euclidean", over="channel"),
    "TD of angles": lambda: TransformationDistance("cosine", over="channel"),
    "Goodfellow": lambda: Goodfellow(0.1),
    "Goodfellow in two passes": lambda: Goodfellow(0.1, capacity=4),
    "Goodfellow's quantile": lambda: Goodfellow(0.1, threshold="quantile"),
    "same-equivariance": lambda: VarianceSameEquivariance(mask=True),
    "distance same-equivariance": lambda: DistanceSameEquivariance(mask=True, normalize=True),
    "direct same-equivariance": lambda: DistanceSameEquivariance(formulation="direct", mask=True),
    "Consistency": Consistency,
    "Stratified": lambda: Stratified(NormalizedVariance(), 2),
}

#: With which networks are made.
SEED = 7

#: Labels are read, once a block; and p-values take as many steps as they need, once.
WAITS = {"Stratified", "p"}


def network():
    torch.manual_seed(SEED)  # of the device, too
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2)
    return nn.Sequential(*layers).eval()


def data_of(samples):
    images = torch.rand(samples, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(images, torch.arange(samples) % 2)


def result_of(name, device, confidence, samples=12, dtype=torch.float32, **options):
    if confidence:
        options.setdefault("outputs", {"accuracy": MulticlassAccuracy(2, average="micro")})
    return evaluate(
        network().to(device, dtype),
        data_of(samples),
        rotations(4),
        {"measure": MEASURES[name]()},
        forward=lambda model, x: model(x.to(dtype)),
        batch_size=16,
        progress=False,
        confidence=confidence,
        layers=["0", "1", "2", "4"],
        **options,
    )


def numbers_of(result):
    """Everything that a result holds of numbers, as plain lists, which travel between processes."""
    found = {f"value of {layer}": value.tolist() for layer, value in result["measure"].items()}
    found |= {f"error of {layer}": e.tolist() for layer, e in result.standard_errors.get("measure", {}).items()}
    found |= {f"response of {layer}": r for layer, r in result.response.get("measure", {}).items()}
    return found | {f"output {name}": output.values for name, output in result.outputs.items()}


def using(device):
    return {NAME: Emulation, "cuda": Watched, "cpu": nullcontext}[device]()


def on_device(device, name, confidence, dtype=torch.float32):
    with using(device) as used:
        found = numbers_of(result_of(name, device, confidence, dtype=dtype))
    state = torch.get_device_module(device).get_rng_state()
    torch.manual_seed(SEED)
    return found, used.operations, torch.equal(state, torch.get_device_module(device).get_rng_state())


def reads_of(device, name, samples, confidence):
    with using(device) as used:
        result_of(name, device, confidence, samples, outputs=None)
    return len(used.read)


class Rounded(nn.Module):
    """Values that depend on the length of the batch by a share of the largest, as different kernels would make them."""

    def __init__(self, apart):
        super().__init__()
        self.apart, self.seen = apart, nn.Identity()

    def forward(self, x):
        return self.seen(x + self.apart * x.abs().amax() * ((7 * x).sin() if len(x) % 2 else 0))


class OfBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixed = nn.Identity()

    def forward(self, x):
        return self.mixed(x - x.mean(0))


def findings_of(device, apart, dtype):
    model = nn.Sequential(Rounded(apart), OfBatch()).to(device)
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with using(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(
            model, images, rotations(4), device=device, forward=lambda model, x: model(x.to(dtype)), progress=False
        )
    return result.layers, result.left_out


class Noisy(TensorDataset):
    """Draws a random number for each sample, and leaves it out."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0] + 0 * torch.rand(())


def automatic(device, samples):
    sizes = []

    def forward(model, x):
        sizes.append(len(x))
        return model(x)

    images = Noisy(torch.rand(samples, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(SEED)
    state = torch.get_rng_state()
    with using(device):
        result = evaluate(
            nn.Sequential(nn.AdaptiveAvgPool2d(4)), images, rotations(4), device=device, forward=forward, progress=False
        )
    assert torch.equal(torch.get_rng_state(), state), "the data moved the random generator on"
    return max(sizes), result["NormalizedVariance"]["0"].tolist()


class Infinite(nn.Module):
    """One value of the batch is infinite if the batch has an even number of inputs."""

    def __init__(self):
        super().__init__()
        self.seen, self.infinite = nn.Identity(), nn.Identity()

    def forward(self, x):
        seen = self.seen(x)
        return self.infinite(seen / (torch.arange(x[0].numel(), device=x.device).view(x[0].shape) + len(x) % 2))


def findings_of_infinite(device):
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with using(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(Infinite(), images, rotations(4), device=device, progress=False)
    return result.layers, result.left_out


class Counting(nn.Module):
    """Counts its calls, and assigns one buffer anew."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(3))
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("same", torch.ones(2))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean()
        return x * self.same[0]


def buffers_after(device):
    with using(device):
        model = Counting().to(device)
        before = dict(model.named_buffers())
        evaluate(model, torch.rand(8, 1, 6, 6), rotations(4), batch_size=8, progress=False)
        after = dict(model.named_buffers())
        return {name: (after[name] is before[name], buffer.tolist()) for name, buffer in after.items()}


def by_hand(device):
    x = torch.rand(8, 4, 6, generator=torch.Generator().manual_seed(1))
    with using(device):
        measure, other = (NormalizedVariance().to(device) for _ in range(2))
        measure.update(x[:3].to(device))
        other.update(x[3:].to(device))
        measure.merge_state(other)
        value = measure.compute()
        return value.device.type, value.dtype, value.tolist(), measure.cpu().compute().tolist()


class Emulated(Accelerator):
    """The device for Lightning."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network().train()

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, label = batch
        return nn.functional.cross_entropy(self(x), label)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, foreach=False)


def train(folder, **options):
    loader = DataLoader(data_of(16), 8)
    measures = [NormalizedVariance(response=True), Goodfellow(0.1)]
    layers = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear]
    monitor = InvarianceMonitor(rotations(4), measures, layers=layers, confidence=0.95)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    trainer = pl.Trainer(max_epochs=2, callbacks=[monitor], default_root_dir=folder, **quiet, **options)
    trainer.fit(Classifier(), loader, loader)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def train_on_device(device, folder):
    with using(device) as used:
        if device == NAME:
            chosen = {"strategy": SingleDeviceStrategy(torch.device(NAME, 0), accelerator=Emulated())}
        else:
            chosen = {"accelerator": device, "devices": 1}
        return train(folder, **chosen), used.operations


#: Functions of a whole ST tensor of feature maps.
FUNCTIONS = {
    "TV": functional.transformation_variance,
    "NV": functional.normalized_variance,
    "NV of standard deviations": partial(functional.normalized_variance, squared=False),
    "ND": functional.normalized_distance,
    "TD of angles": partial(functional.transformation_distance, distance="cosine", over="channel"),
    "F": lambda st: functional.anova(st)[0],
    "Goodfellow": partial(functional.goodfellow, alpha=0.1),
    "same-equivariance": partial(functional.variance_same_equivariance, transformations=rotations(4), mask=2),
    "distance same-equivariance": partial(
        functional.distance_same_equivariance, transformations=rotations(4), normalize=True, mask=True
    ),
    "direct same-equivariance": partial(
        functional.distance_same_equivariance, transformations=rotations(4), formulation="direct", mask=True
    ),
}


def values_of_functions(device):
    st = torch.rand(5, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with using(device):
        return {name: function(st.to(device)).tolist() for name, function in FUNCTIONS.items()}


@pytest.fixture(scope="module")
def processes():
    """One with each of the emulated devices; they start with the first function that they are given."""
    with process_with_device(True) as one, process_with_device(False) as other:
        yield {"with float64": one, "without float64": other, "cuda": ThisProcess()}


def device_and_process(request, processes):
    """A device, a process that has it, and how far its float32 may be from the CPU's."""
    device, tolerance = ("cuda", 1e-3) if request.param == "cuda" else (NAME, 1e-5)
    return device, processes[request.param], tolerance


WITH_FLOAT64 = [pytest.param("with float64", marks=EMULATED), pytest.param("cuda", marks=CUDA)]
there = pytest.fixture(scope="module", params=[*WITH_FLOAT64, pytest.param("without float64", marks=EMULATED)])(
    device_and_process
)
there_with_float64 = pytest.fixture(scope="module", params=WITH_FLOAT64)(device_and_process)


@pytest.mark.parametrize(
    ("name", "confidence", "dtype"),
    [
        *((name, 0.95, torch.float32) for name in MEASURES),
        *((name, None, torch.float32) for name in ("NV", "ND", "Goodfellow in two passes")),
        *((name, 0.95, torch.bfloat16) for name in ("NV", "TV", "paired F", "ND", "Stratified")),
    ],
)
@pytest.mark.filterwarnings("ignore:NaN, and left out:UserWarning")
def test_an_evaluation_gives_the_same_on_an_accelerator(name, confidence, dtype, there):
    device, process, tolerance = there
    if device != NAME and dtype != torch.float32:
        pytest.skip("kernels for half precision round otherwise there")
    found, operations, put_back = process.submit(on_device, device, name, confidence, dtype).result()
    expected = numbers_of(result_of(name, "cpu", confidence, dtype=dtype))
    assert operations > 50, "the network did not run on the device"
    assert put_back, "the state of the device's random generator was not put back"
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        own, value = (torch.tensor(each, dtype=torch.float64) for each in (found[what], value))
        torch.testing.assert_close(own, value, rtol=tolerance, atol=tolerance**2, equal_nan=True)


@pytest.mark.parametrize("confidence", [None, 0.95])
@pytest.mark.parametrize("name", sorted(MEASURES.keys() - WAITS))
def test_no_block_makes_the_cpu_wait_for_the_accelerator(name, confidence, there_with_float64):
    device, process, _ = there_with_float64
    few, many = (process.submit(reads_of, device, name, samples, confidence).result() for samples in (12, 24))
    assert many == few


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 5e-3), (torch.bfloat16, 0.03)])
def test_rounding_of_other_kernels_does_not_make_a_layer_mixed(dtype, apart, there):
    device, process, _ = there
    layers, left_out = process.submit(findings_of, device, apart, dtype).result()
    assert layers == ["0.seen"]
    assert [*left_out] == ["1.mixed"]
    assert "mixed" in left_out["1.mixed"]
    if dtype == torch.float32:  # whose kernels on the CPU round nothing so coarsely
        with pytest.raises(RuntimeError, match="2 mixed"):
            findings_of("cpu", apart, dtype)


def test_automatic_batches_of_an_accelerator_are_large_and_change_no_value(there):
    device, process, tolerance = there
    size, values = process.submit(automatic, device, 700).result()
    assert size == 2800  # all of them, which are less than half a gigabyte
    _, expected = automatic("cpu", 700)
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=tolerance, atol=0)


def test_buffers_have_the_values_from_before_an_evaluation(there):
    device, process, _ = there
    found = process.submit(buffers_after, device).result()
    assert found == {"calls": (True, [0, 0, 0]), "last": (True, 0), "same": (True, [1, 1])}


def test_an_infinite_value_of_one_batch_is_no_agreement(there):
    device, process, _ = there
    layers, left_out = process.submit(findings_of_infinite, device).result()
    assert layers == ["seen"]
    assert "mixed" in left_out["infinite"]


def test_a_metric_moves_to_an_accelerator_and_back(there, request):
    kind, process, _ = there
    device, dtype, value, again = process.submit(by_hand, kind).result()
    assert (device, dtype) == (kind, torch.float32 if "without" in request.node.name else torch.float64)
    measure = NormalizedVariance()
    measure.update(torch.rand(8, 4, 6, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(torch.tensor(value, dtype=torch.float64), measure.compute(), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(again, dtype=torch.float64), measure.compute(), rtol=1e-6, atol=0)


def test_functions_give_the_same_on_an_accelerator(there):
    device, process, _ = there
    found = process.submit(values_of_functions, device).result()
    st = torch.rand(5, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for name, function in FUNCTIONS.items():
        value = function(st)
        own = torch.tensor(found[name], dtype=value.dtype)
        torch.testing.assert_close(
            own, value, rtol=1e-4, atol=1e-6, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.filterwarnings("ignore:NaN, and left out:UserWarning")
def test_a_monitor_logs_the_same_while_a_network_trains_on_an_accelerator(there, tmp_path):
    device, process, tolerance = there
    found, operations = process.submit(train_on_device, device, tmp_path / "device").result()
    expected = train(tmp_path / "cpu", accelerator="cpu")
    assert operations > 500
    assert len(expected) > 20
    assert found == pytest.approx(expected, rel=10 * tolerance, nan_ok=True)


@CUDA
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.filterwarnings("ignore:NaN, and left out:UserWarning")
def test_a_monitor_logs_nearly_the_same_in_half_precision(precision, tmp_path):
    found = train(tmp_path / "half", accelerator="cuda", devices=1, precision=precision)
    expected = train(tmp_path / "single", accelerator="cuda", devices=1)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "NormalizedVariance" in name:
            assert found[name] == pytest.approx(value, rel=0.2, nan_ok=True), name
