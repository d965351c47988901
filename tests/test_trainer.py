"""At home in every Trainer: when it evaluates, what it leaves alone, and which models and data it takes."""

import copy
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightnings import (
    CSVLogger,
    DeepSpeedStrategy,
    EarlyStopping,
    ModelCheckpoint,
    ModelParallelStrategy,
    StochasticWeightAveraging,
    pl,
)
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainings import DATA, IMAGES, Net, Recorder, fit, trainer_of

from lightning_invariance import InvarianceMonitor, TransformationSet, evaluate, layer_names, rotations
from lightning_invariance.measures import DistanceSameEquivariance, NormalizedVariance, VarianceSameEquivariance


def monitor(**options):
    return InvarianceMonitor(rotations(4), **options)


# Training is unchanged


class Manual(Net):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        loss = super().training_step(batch, _)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self):
        convolution, rest = list(self.conv.parameters()), [*self.bn.parameters(), *self.fc.parameters()]
        return torch.optim.SGD(convolution, lr=0.1), torch.optim.Adam(rest)


NEEDS_AVERAGING = pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="Lightning 2.6 has it")

#: Transformations that draw from every random generator.
NOISE = TransformationSet.from_callables(
    {"as it is": lambda x: x, "noise": lambda x: x + random.random() + np.random.rand() + torch.randn_like(x)}
)


@pytest.mark.parametrize(
    ("model", "callbacks", "options"),
    [
        (Net, list, {"accumulate_grad_batches": 2, "logger": True}),  # which draws pictures
        (Net, lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1)], {}),
        pytest.param(
            *(Net, lambda: [pl.callbacks.EMAWeightAveraging()], {}),
            marks=[NEEDS_AVERAGING, pytest.mark.filterwarnings("ignore:EMAWeightAveraging stands before")],
        ),
        (Manual, list, {}),
        (Net, list, {"precision": "bf16-mixed"}),
        (Net, list, {"num_sanity_val_steps": 0, "limit_train_batches": 3, "val_check_interval": 2}),
    ],
    ids=["accumulation", "SWA", "EMA", "two optimizers", "bf16-mixed", "no sanity check"],
)
def test_training_does_not_notice_it(tmp_path, model, callbacks, options):
    seen = []
    for extra in ([], [InvarianceMonitor(NOISE)]):
        recorder = Recorder()
        trainer = fit(
            tmp_path / str(len(seen)), *callbacks(), *extra, recorder, epochs=2, model=seeded(model), **options
        )
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        logged = {name: v.item() for name, v in trainer.logged_metrics.items() if "Variance" not in name}
        module = trainer.lightning_module
        state = {name: value.tolist() for name, value in module.state_dict().items()}
        flags = [m.training for m in module.modules()], [p.requires_grad for p in module.parameters()]
        seen.append((recorder.seen, generators, logged, state, flags))
    assert seen[0] == seen[1]
    assert not any(m._forward_hooks for m in module.modules())


def seeded(model):
    torch.manual_seed(3)
    return model()


def test_workers_and_their_batches_are_left_alone(tmp_path):
    seen = []
    for extra in ([], [monitor()]):
        recorder = Recorder()
        trainer = trainer_of(tmp_path, *extra, recorder, epochs=2)
        loaders = [DataLoader(DATA, 8, shuffle=s, num_workers=1, persistent_workers=True) for s in (True, False)]
        trainer.fit(Net(), *loaders)
        seen.append(recorder.seen)
    assert seen[0] == seen[1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux lists the open files")
def test_no_file_stays_open(tmp_path):
    for name in ("first", "second"):  # the first keeps the fonts of pictures open for good
        before = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()}
        fit(tmp_path, monitor(), epochs=1, logger=CSVLogger(tmp_path, "", name))
        after = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()}
    assert not {path for path in after - before if path.startswith("/")}


# When


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"every_n_epochs": 3, "epochs": 6}, [-1, 0, 2, 5]),
        ({"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0}, [-1, 1]),
        ({"overfit_batches": 2}, [-1, 0, 1, 2]),
        ({"val_check_interval": 0.5, "limit_train_batches": 4}, [-1, 0, 0, 1, 1, 2, 2]),
        ({"check_val_every_n_epoch": 3}, [-1, 2]),
        ({"limit_val_batches": 1}, [-1, 0, 1, 2]),
        ({"num_sanity_val_steps": 0}, [-1, 0, 1, 2]),
    ],
)
def test_when_it_evaluates(tmp_path, options, epochs):
    watching = monitor(every_n_epochs=options.get("every_n_epochs", 1))
    fit(tmp_path, watching, **{name: value for name, value in options.items() if name != "every_n_epochs"})
    assert [result.epoch for result in watching.history] == epochs


class TwoLoaders(Net):
    def validation_step(self, batch, _, dataloader_idx=0):
        super().validation_step(batch, _)


def test_the_first_of_several_validation_loaders(tmp_path):
    watching = monitor()
    validation = [DataLoader(DATA, 8), DataLoader(TensorDataset(*DATA[:5]), 8)]
    trainer_of(tmp_path, watching).fit(TwoLoaders(), DataLoader(DATA, 8), validation)
    assert watching.history[-1].n_samples == len(DATA)


class WithTest(Net):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


def test_validate_always_evaluates_and_test_never(tmp_path):
    watching = monitor(every_n_epochs=3)
    trainer = fit(tmp_path, watching, epochs=1, model=WithTest())
    assert len(watching.history) == 2
    for expected in (3, 4):
        trainer.validate(trainer.lightning_module, DataLoader(DATA, 8), verbose=False)
        assert len(watching.history) == expected
    trainer.test(trainer.lightning_module, DataLoader(DATA, 8), verbose=False)
    assert len(watching.history) == 4


def test_a_checkpoint_that_is_tested_does_not_replace_the_history(tmp_path):
    best = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    watching = monitor()
    trainer = fit(tmp_path, watching, best, epochs=3, model=WithTest())
    early = tmp_path / "epoch=0.ckpt"
    trainer.test(trainer.lightning_module, DataLoader(DATA, 8), ckpt_path=early, verbose=False)
    assert [result.epoch for result in watching.history] == [-1, 0, 1, 2]
    trainer.validate(trainer.lightning_module, DataLoader(DATA, 8), ckpt_path=early, verbose=False)
    assert [result.epoch for result in watching.history] == [-1, 0, 1, 2, None]
    assert watching.history[-1].per_layer() == pytest.approx(watching.history[1].per_layer())
    if Version(pl.__version__) < Version("2.5"):  # does not load the state of callbacks in `validate`
        return
    fresh = monitor()
    trainer_of(tmp_path, fresh).validate(WithTest(), DataLoader(DATA, 8), ckpt_path=early, verbose=False)
    assert [result.epoch for result in fresh.history] == [-1, 0, None]


def test_each_training_has_a_history_of_its_own(tmp_path):
    watching = monitor()
    trainer = fit(tmp_path, watching, epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, DataLoader(DATA, 8), DataLoader(DATA, 8))
    assert [result.epoch for result in watching.history] == [-1, 0, 1]  # of one training
    fit(tmp_path / "next fold", watching, epochs=1)
    assert [result.epoch for result in watching.history] == [-1, 0]
    assert [[result.epoch for result in each] for each in watching.earlier_histories] == [[-1, 0, 1]]
    assert watching.state_dict()["earlier"] == []  # or the checkpoints of a cross-validation would grow


def test_the_untrained_network_comes_first_after_a_validation(tmp_path):
    watching, model = monitor(), Net()
    trainer = trainer_of(tmp_path, watching)
    trainer.validate(model, DataLoader(DATA, 8), verbose=False)
    trainer.fit(model, DataLoader(DATA, 8), DataLoader(DATA, 8))
    assert [result.epoch for result in watching.history] == [-1, 0]


class Scaling(Net):
    """Scales images once they are on the device, and only of batches that it trains with otherwise."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return (100 * x - 50 if self.trainer.validating else 0 * x), y


class ScalingData(pl.LightningDataModule):
    def val_dataloader(self):
        return DataLoader(DATA, 8)

    train_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return 100 * batch[0] - 50, batch[1]


@pytest.mark.parametrize("owner", ["model", "data module"])
def test_batches_go_through_the_hooks_of_the_trainer(owner, tmp_path):
    watching, data = monitor(max_samples=None), TensorDataset(100 * IMAGES - 50)
    torch.manual_seed(0)
    model = Scaling() if owner == "model" else Net()
    expected = evaluate(model, data, rotations(4), progress=False)
    trainer = trainer_of(tmp_path, watching, limit_train_batches=1)
    if owner == "model":
        trainer.fit(model, DataLoader(DATA, 8), DataLoader(DATA, 8))
    else:
        trainer.fit(model, datamodule=ScalingData())
    found = watching.history[0]["NormalizedVariance"]
    for layer, value in expected["NormalizedVariance"].items():
        torch.testing.assert_close(found[layer], value, rtol=1e-4, atol=0)


@NEEDS_AVERAGING
def test_averaged_weights_that_are_taken_out_too_early_are_warned_of(tmp_path):
    averaging = pl.callbacks.EMAWeightAveraging
    with pytest.warns(UserWarning, match="EMAWeightAveraging stands before InvarianceMonitor"):
        fit(tmp_path, averaging(), monitor(), epochs=1)
    fit(tmp_path, monitor(), averaging(), epochs=1)


def test_a_dev_run_measures_few_samples(tmp_path):
    watching = monitor()
    fit(tmp_path, watching, fast_dev_run=True)
    assert [result.n_samples for result in watching.history] == [8, 8]


def test_a_resume_in_the_middle_of_an_epoch_evaluates_nothing_twice(tmp_path):
    middle = ModelCheckpoint(tmp_path / "middle", "{step}", every_n_train_steps=7, save_top_k=-1)
    fit(tmp_path, monitor(), middle, epochs=2)
    resumed = monitor()
    fit(tmp_path, resumed, epochs=3, ckpt_path=tmp_path / "middle" / "step=7.ckpt")  # 5 steps an epoch
    assert [result.epoch for result in resumed.history] == [-1, 0, 1, 2]


@pytest.mark.parametrize("watched", ["Rising/fc", "Rising_last", "Rising_mean"])
@pytest.mark.parametrize(
    ("patience", "epochs", "options"),
    [(1, [-1, 0, 2], {}), (2, [-1, 0, 2, 5], {}), (1, [-1, 2, 5], {"limit_val_batches": 0})],
)
def test_early_stopping_counts_new_values_only(tmp_path, patience, epochs, options, watched):
    class Rising(NormalizedVariance):  # never better than at first
        def compute(self):
            return super().compute() * 0 + len(watching.history)

    watching = monitor(measures={"Rising": Rising()}, every_n_epochs=3, layers=["fc"], data=IMAGES)
    # The callback comes first, so that without validation the value of an epoch is there when it is looked at.
    stop = EarlyStopping(watched, patience=patience, strict=False)
    fit(tmp_path, watching, stop, epochs=20, **options)
    # The first validation always evaluates; then every third epoch is one that is no better.
    assert [result.epoch for result in watching.history] == epochs


def test_same_equivariance_in_a_trainer(tmp_path):
    same = [VarianceSameEquivariance(mask=True), DistanceSameEquivariance(mask=True)]
    watching = monitor(measures=same, layers=["conv", "bn", "fc"])
    fit(tmp_path, watching, epochs=1)
    assert watching.history[-1].skipped == {name: ["fc"] for name in watching.measures}
    assert all(watching.history[-1].mean(name) > 0 for name in watching.measures)


def test_a_checkpoint_of_another_pace_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="every_n_epochs=2"):
        fit(tmp_path, monitor(every_n_epochs=2), ModelCheckpoint(tmp_path, monitor="NormalizedVariance_mean"), epochs=1)
    alike = ModelCheckpoint(tmp_path / "alike", monitor="NormalizedVariance_mean", every_n_epochs=4)
    fit(tmp_path, monitor(every_n_epochs=2), alike, epochs=1)  # a warning would be an error


@pytest.mark.parametrize(
    ("strategy", "match"),
    [(DeepSpeedStrategy, "DeepSpeedStrategy splits"), (ModelParallelStrategy, "with `tensor_parallel_size` above 1")],
)
def test_split_layers_are_refused(strategy, match):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    trainer.strategy._tensor_parallel_size = 2 if strategy is ModelParallelStrategy else 1
    with pytest.raises(MisconfigurationException, match=match):
        monitor().setup(trainer, Net(), "fit")
    trainer.strategy._tensor_parallel_size = 1
    if strategy is ModelParallelStrategy:
        monitor().setup(trainer, Net(), "fit")


# Which model


def values(model, images=IMAGES, **options):
    return evaluate(model, images, rotations(4), progress=False, **options)["NormalizedVariance"]


def assert_same(one, other, **tolerance):
    assert list(one) == list(other)
    for layer in one:
        torch.testing.assert_close(one[layer], other[layer], msg=layer, **tolerance)


def test_compiled_models_have_the_values_and_names_of_eager_ones():
    model = Net().eval()
    expected = values(model)
    calls = []

    def backend(graph, _):
        calls.append("compiled")
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        before = compiled(IMAGES)
    assert layer_names(compiled) == layer_names(model)
    assert_same(values(compiled), expected)
    in_place = copy.deepcopy(model)
    in_place.conv.compile(backend=backend)
    with torch.no_grad():
        in_place(IMAGES)
    assert_same(values(in_place), expected)
    graphs = len(calls)
    with torch.no_grad():
        assert torch.equal(compiled(IMAGES), before)
        in_place(IMAGES)
    assert len(calls) == graphs  # nothing was compiled again


class Convolution(nn.Conv2d):
    def forward(self, x):  # torch 2.6 compiles no forward of torch.nn's own
        return super().forward(x)


class Compilable(Net):
    def __init__(self):
        super().__init__()
        self.conv = Convolution(1, 3, 3)


def test_compiled_modules_within_a_model_keep_their_names():
    class Outer(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            torch.manual_seed(0)
            self.net = wrap(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()))
            self.last = wrap(nn.Flatten())

        def forward(self, x):
            return self.last(self.net(x))

    plain = Outer(lambda module: module).eval()
    compiled = Outer(lambda module: torch.compile(module, backend=lambda graph, _: graph.forward)).eval()
    assert layer_names(compiled) == layer_names(plain) == ["net.0", "net.1", "last"]
    for options in ({}, {"layers": ["net.0"]}, {"operations": True}, {"transform_at": "net"}):
        assert_same(values(compiled, **options), values(plain, **options))


def test_training_a_compiled_module_compiles_no_more_than_without_it(tmp_path):
    graphs = []
    for extra in ([], [monitor()]):
        compiled, model = [], seeded(Compilable)

        def backend(graph, _, compiled=compiled):
            compiled.append(graph)
            return graph.forward

        torch.compiler.reset()
        model.conv.compile(backend=backend)
        fit(tmp_path, *extra, epochs=2, model=model)
        graphs.append(len(compiled))
    assert graphs[0] == graphs[1] > 0
    plain = monitor()
    fit(tmp_path, plain, epochs=2, model=seeded(Compilable))
    for one, other in zip(extra[0].history, plain.history, strict=True):
        assert_same(one["NormalizedVariance"], other["NormalizedVariance"], rtol=1e-4, atol=1e-6)


def test_wrappers_are_taken_off():
    model = Net().eval()
    assert_same(values(nn.DataParallel(model)), values(model))


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("bf16-mixed", 0.2), ("bf16-true", 0.2), ("16-true", 0.05), ("64-true", 1e-5)]
)
def test_precisions(tmp_path, precision, tolerance):
    data = TensorDataset(IMAGES, DATA.tensors[1])
    model = seeded(Net)
    expected = values(copy.deepcopy(model), images=data)
    watching = monitor()
    fit(tmp_path, watching, epochs=1, model=model, precision=precision)
    untrained = watching.history[0]
    assert untrained["NormalizedVariance"]["conv"].dtype == torch.float64
    for layer, value in list(untrained.per_layer().items())[1:]:  # the first is the input
        assert value == pytest.approx(expected[layer][expected[layer].isfinite()].mean().item(), rel=tolerance)


def test_channels_last_and_inference_mode():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).eval()
    images = torch.rand(12, 3, 10, 10, generator=torch.Generator().manual_seed(1))
    expected = values(model, images)
    with torch.inference_mode():
        assert_same(values(model, images), expected)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    run = values(last, images, forward=lambda m, x: m(x.contiguous(memory_format=torch.channels_last)))
    assert_same(run, expected, rtol=1e-4, atol=1e-6)


def test_its_state_is_plain_data(tmp_path):
    watching = monitor()
    fit(tmp_path, watching, epochs=1)
    torch.save(watching.state_dict(), tmp_path / "state.pt")
    again = monitor()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [result.per_layer() for result in again.history] == [result.per_layer() for result in watching.history]
