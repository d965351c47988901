"""InvarianceMonitor in a Trainer."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightnings import CSVLogger, EarlyStopping, ModelCheckpoint, pl
from PIL import Image
from torch.utils.data import DataLoader
from trainings import DATA, IMAGES, LAYERS, Net, Recorder, events, fit, fit_with_tensorboard, trainer_of

from lightning_invariance import InvarianceMonitor, evaluate, rotations, scales
from lightning_invariance.measures import NormalizedVariance, TransformationVariance


def test_curves_and_pictures_in_tensorboard(tmp_path):
    monitor = InvarianceMonitor(rotations(4), [NormalizedVariance(), TransformationVariance()])
    trainer = fit_with_tensorboard(tmp_path, monitor)
    logged = events(tmp_path)
    validated = [event.step for event in logged.Scalars("val_loss")]
    assert validated == [4, 9, 14]
    for measure in ("NormalizedVariance", "TransformationVariance"):
        for layer in LAYERS:
            points = logged.Scalars(f"{measure}/{layer}")
            assert [event.step for event in points] == [0, *validated]
            values = [result.per_layer(measure)[layer] for result in monitor.history]
            assert [event.value for event in points] == pytest.approx(values, rel=1e-6)
        means = [event.value for event in logged.Scalars(f"{measure}_mean")]
        assert means == pytest.approx([result.mean(measure) for result in monitor.history], rel=1e-6)
        for picture in ("heatmap", "evolution"):
            assert [event.step for event in logged.Images(f"{measure}/{picture}")] == [0, *validated]
            assert logged.Images(f"{measure}/{picture}")[0].width > 300
    assert [result.epoch for result in monitor.history] == [-1, 0, 1, 2]
    assert [result.step for result in monitor.history] == [0, *validated]
    assert trainer.callback_metrics["NormalizedVariance/fc"].item() == pytest.approx(
        monitor.history[-1].per_layer("NormalizedVariance")["fc"], rel=1e-6
    )


def test_values_equal_evaluate(tmp_path):
    monitor = InvarianceMonitor(rotations(4))
    model = Net()
    pl.seed_everything(5, verbose=False)
    untrained = evaluate(model, DATA, rotations(4))
    fit(tmp_path, monitor, model=model)
    trained = evaluate(model, DATA, rotations(4))
    for expected, result in ((untrained, monitor.history[0]), (trained, monitor.history[-1])):
        for layer in LAYERS:
            assert torch.equal(result["NormalizedVariance"][layer], expected["NormalizedVariance"][layer])


def test_without_validation_the_training_epoch_counts(tmp_path):
    monitor = InvarianceMonitor(rotations(4), data=IMAGES, every_n_epochs=2)
    fit_with_tensorboard(tmp_path, monitor, epochs=4, limit_val_batches=0)
    assert [result.epoch for result in monitor.history] == [-1, 1, 3]
    points = events(tmp_path).Scalars("NormalizedVariance/fc")
    assert [event.step for event in points] == [0, 9, 19]


def test_the_trainer_without_data(tmp_path):
    with pytest.raises(MisconfigurationException, match="give it `data`"):
        fit(tmp_path, InvarianceMonitor(rotations(4)), limit_val_batches=0)


def test_early_stopping_and_checkpoints_can_watch_it(tmp_path):
    monitor = InvarianceMonitor(rotations(4), layers=["conv", "fc"])
    best = ModelCheckpoint(tmp_path / "best", "best", monitor="NormalizedVariance_mean", enable_version_counter=False)
    stop = EarlyStopping("NormalizedVariance/fc", mode="min", patience=1)
    fit(tmp_path, stop, best, monitor, epochs=12)
    means = [result.mean() for result in monitor.history[1:]]
    assert best.best_model_score.item() == pytest.approx(min(means), rel=1e-6)
    curve = [result.per_layer()["fc"] for result in monitor.history[1:]]
    assert stop.best_score.item() == pytest.approx(min(curve), rel=1e-6)
    assert len(curve) < 12
    assert min(curve[-1:]) > stop.best_score.item()


def test_history_goes_on_after_a_resume(tmp_path):
    first = InvarianceMonitor(rotations(4))
    last = ModelCheckpoint(tmp_path, save_last=True)
    fit(tmp_path, first, last, epochs=2)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert [key for key in checkpoint["callbacks"] if "InvarianceMonitor" in key]
    second = InvarianceMonitor(rotations(4))
    fit(tmp_path, second, ModelCheckpoint(tmp_path), epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert [result.epoch for result in second.history] == [-1, 0, 1, 2, 3]
    for before, after in zip(first.history, second.history, strict=False):
        assert before.per_layer() == after.per_layer()
        assert torch.equal(
            before.per_channel("NormalizedVariance", "conv"), after.per_channel("NormalizedVariance", "conv")
        )
        assert (before.epoch, before.step) == (after.epoch, after.step)


def test_old_results_keep_channels_only_when_memory_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_invariance.monitor.callback.HISTORY_BYTES", 2000)  # one result of 182 numbers fits
    monitor = InvarianceMonitor(rotations(4))
    fit(tmp_path, monitor)
    shapes = [tuple(result["NormalizedVariance"]["conv"].shape) for result in monitor.history]
    assert shapes == [(3,), (3,), (3,), (3, 4, 4)]


def test_two_monitors_need_two_names(tmp_path):
    with pytest.raises(MisconfigurationException, match="set `name`"):
        fit_with_tensorboard(tmp_path, OtherMonitor(rotations(4)), InvarianceMonitor(scales()))
    fit_with_tensorboard(tmp_path, InvarianceMonitor(rotations(4)), InvarianceMonitor(scales(), name="scale"), epochs=1)
    tags = events(tmp_path).Tags()["scalars"]
    assert {"NormalizedVariance/fc", "NormalizedVariance_scale/fc", "NormalizedVariance_scale_mean"} <= set(tags)


class OtherMonitor(InvarianceMonitor):
    """A subclass has a state key of its own, so that only the monitor can notice the clash of tags."""


def test_the_csv_logger_gets_files(tmp_path):
    fit(tmp_path, InvarianceMonitor(rotations(4)), epochs=1, logger=CSVLogger(tmp_path, "", "csv"))
    assert "NormalizedVariance/fc" in (tmp_path / "csv" / "metrics.csv").read_text()
    pictures = sorted(path.relative_to(tmp_path / "csv").as_posix() for path in tmp_path.glob("csv/**/*.png"))
    assert pictures == [
        f"images/NormalizedVariance/{kind}_step={step}.png"
        for kind in ("evolution", "heatmap", "response")
        for step in (0, 4)
    ]
    assert Image.open(tmp_path / "csv" / pictures[0]).size[0] > 300


def test_validate_measures_once(tmp_path):
    monitor = InvarianceMonitor(rotations(4))
    metrics = trainer_of(tmp_path, monitor).validate(Net(), DataLoader(DATA, 8), verbose=False)[0]
    assert len(monitor.history) == 1
    assert metrics["NormalizedVariance/fc"] == pytest.approx(monitor.history[0].per_layer()["fc"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs` to be an int of at least 1, but got 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` .* but got 0"),
        ({"max_samples": 1}, ValueError, "`max_samples` .* of at least 2, but got 1"),
        ({"transformations": rotations(1)}, ValueError, "at least two transformations"),
        ({"transformations": None}, TypeError, "TransformationSet"),
        ({"measures": [3]}, TypeError, "Metric"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        InvarianceMonitor(**{"transformations": rotations(4), **arguments})


def test_an_unknown_layer_stops_before_training(tmp_path):
    recorder = Recorder()
    with pytest.raises(ValueError, match="no layer 'conv1'"):
        fit(tmp_path, InvarianceMonitor(rotations(4), layers=["conv1"]), recorder)
    assert recorder.seen == []
