"""The history of a monitor: bounded in a checkpoint, of one configuration, with the scores of the same validation."""

import io
import math

import pytest
import torch
from lightnings import ModelCheckpoint, TensorBoardLogger
from trainings import Net, fit

from lightning_invariance import InvarianceMonitor, InvarianceResult, rotations, scales
from lightning_invariance.measures import (
    Anova,
    NormalizedVariance,
    Stratified,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)
from lightning_invariance.monitor.logging import curves

TURNS = rotations(4)


def results(count, layers=60, channels=250):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(count, layers, channels, generator=generator, dtype=torch.float64)
    return [
        InvarianceResult(
            {"NormalizedVariance": {f"layer{j}": values[i, j] for j in range(layers)}},
            epoch=i - 1,
            step=10 * i,
            n_samples=256,
            transformations=TURNS.labels,
            scores={"val_acc": i / count},
        )
        for i in range(count)
    ]


def test_a_checkpoint_of_a_thousand_evaluations_is_small_and_keeps_every_curve():
    monitor = InvarianceMonitor(TURNS)
    monitor.history[:] = results(1000)
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    assert file.tell() < 10 * 2**20
    file.seek(0)
    other = InvarianceMonitor(TURNS)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert len(other.history) == 1000
    for before, after in zip(monitor.history, other.history, strict=True):
        means, expected = after.per_layer(), before.per_layer()
        assert [*means] == [*expected]
        assert all(math.isclose(means[layer], expected[layer], rel_tol=1e-12) for layer in expected)
        assert (after.epoch, after.step, after.n_samples, after.scores) == (
            before.epoch, before.step, before.n_samples, before.scores
        )  # fmt: skip
        assert after.ratios == before.ratios
    for i in (0, -1):
        assert torch.equal(
            other.history[i]["NormalizedVariance"]["layer3"], monitor.history[i]["NormalizedVariance"]["layer3"]
        )
    again = InvarianceMonitor(TURNS)
    again.load_state_dict(other.state_dict())  # thinned twice
    assert again.history[500].per_layer() == monitor.history[500].per_layer()


def test_layers_that_some_evaluations_lack_are_nan():
    monitor = InvarianceMonitor(TURNS)
    monitor.history[:] = [*results(40, layers=20, channels=20000)]
    del monitor.history[5]._values["NormalizedVariance"]["layer7"]
    monitor.history[5]._tables["NormalizedVariance"][:] = [
        row for row in monitor.history[5].table() if row.layer != "layer7"
    ]
    other = InvarianceMonitor(TURNS)
    other.load_state_dict(monitor.state_dict())
    assert math.isnan(other.history[5].per_layer()["layer7"])
    assert other.history[6].per_layer()["layer7"] == pytest.approx(monitor.history[6].per_layer()["layer7"])


OTHERS = {
    "another measure": {"measures": [TransformationVariance()]},
    "one more measure": {"measures": [NormalizedVariance(response=True), TransformationVariance()]},
    "another argument": {"measures": [NormalizedVariance()]},
    "an argument of the value": {"measures": [NormalizedVariance(response=True, aggregate="mean")]},
    "other layers": {"layers": ["fc"]},
    "more samples": {"max_samples": 9},
    "operations": {"operations": True},
    "another set": {"transformations": scales()},
    "another fill": {"transformations": rotations(4, fill=0.5)},
}


@pytest.mark.parametrize("change", OTHERS)
def test_results_of_other_arguments_are_kept_apart(change):
    first, second = InvarianceMonitor(TURNS), InvarianceMonitor(**{"transformations": TURNS, **OTHERS[change]})
    first.history[:] = results(2)
    with pytest.warns(UserWarning, match="measured with other measures, layers, transformations"):
        second.load_state_dict(first.state_dict())
    assert [len(history) for history in (second.history, *second.earlier_histories)] == [0, 2]


def test_a_resume_with_other_arguments_begins_a_history_and_keeps_the_old_one(tmp_path):
    fit(tmp_path, InvarianceMonitor(TURNS), ModelCheckpoint(tmp_path, save_last=True), epochs=1)
    options = {"transformations": TURNS, "max_samples": 9}
    second = InvarianceMonitor(**options)
    with pytest.warns(UserWarning, match="measured with other measures, layers, transformations") as caught:
        fit(tmp_path, second, ModelCheckpoint(tmp_path), epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert sum("a new one begins" in str(w.message) for w in caught) == 1
    assert [result.epoch for result in second.history] == [0, 1, 2]
    assert [[result.epoch for result in history] for history in second.earlier_histories] == [[-1, 0]]
    third = InvarianceMonitor(**options)
    third.load_state_dict(second.state_dict())
    assert [len(history) for history in (third.history, *third.earlier_histories)] == [3, 2]
    back = InvarianceMonitor(TURNS)
    with pytest.warns(UserWarning, match="a new one begins"):
        back.load_state_dict(second.state_dict())
    assert [len(history) for history in (back.history, *back.earlier_histories)] == [0, 2, 3]


def test_layers_as_functions_and_types_are_the_same_after_a_resume():
    def chosen(name, module):
        return True

    for layers in (chosen, torch.nn.Linear, [torch.nn.Linear, "conv"], {"fc": "head"}):
        first, second = (InvarianceMonitor(TURNS, layers=layers) for _ in range(2))
        first.history[:] = results(2)
        second.load_state_dict(first.state_dict())
        assert len(second.history) == 2


def test_scores_come_from_the_same_validation(tmp_path):
    class Counting(Net):
        def training_step(self, batch, i):
            self.log("loss_epoch", 100.0 * self.current_epoch, on_epoch=True)
            return super().training_step(batch, i)

        def validation_step(self, batch, i):
            self.log("val_epoch", float(self.current_epoch))

    monitor = InvarianceMonitor(TURNS)
    fit(tmp_path, monitor, model=Counting(), epochs=3)
    assert [result.scores for result in monitor.history] == [{}, *({"val_epoch": float(i)} for i in range(3))]


def test_pictures_that_cannot_be_written_end_no_training(tmp_path, monkeypatch):
    class Full(TensorBoardLogger):
        @property
        def experiment(self):
            writer = super().experiment

            def full(*args, **kwargs):
                raise OSError("No space left on device")

            for name in ("add_image", "add_text", "add_custom_scalars", "add_histogram"):
                monkeypatch.setattr(writer, name, full)
            return writer

    monitor = InvarianceMonitor(TURNS, histograms=True)
    with pytest.warns(UserWarning, match="could not log: OSError: No space left on device. Training goes on") as caught:
        fit(tmp_path, monitor, epochs=2, logger=Full(tmp_path))
    assert sum("could not log" in str(w.message) for w in caught) == 1
    assert [result.epoch for result in monitor.history] == [-1, 0, 1]


def test_an_error_of_the_measurement_ends_it(tmp_path):
    def bad(model, x):
        raise ArithmeticError("bad")

    with pytest.raises(ArithmeticError, match="bad"):
        fit(tmp_path, InvarianceMonitor(TURNS, forward=bad), epochs=1)


@pytest.mark.parametrize("name", ["../../x", "/x", "a//b", "a\nb", "", "x/", "a:b", ".", "a/.. /b"])
def test_names_that_lead_out_of_a_folder_or_that_loggers_refuse(name):
    with pytest.raises(ValueError, match="letters, numbers, spaces and the signs"):
        InvarianceMonitor(TURNS, {name: NormalizedVariance()})
    with pytest.raises(ValueError, match="letters, numbers, spaces and the signs"):
        InvarianceMonitor(TURNS, name=name)


def test_no_two_layers_share_a_curve_in_a_logger_that_drops_signs():
    assert curves(["a", "b[0]"]) == {"a": "a", "b[0]": "b[0]"}
    found = curves(["relu", "relu#1", "relu1", "relu1_2", "x[0]", "x0"])
    plain = ["".join(sign for sign in name if sign not in "#[]") for name in found.values()]
    assert len(set(plain)) == len(plain) == 6
    assert found["relu#1"] == "relu#1"
    assert list(found) == ["relu", "relu#1", "relu1", "relu1_2", "x[0]", "x0"]


@pytest.mark.parametrize(
    "measure",
    [
        lambda: TransformationDistance(lambda x, y: (x - y).abs()),
        lambda: Stratified(NormalizedVariance(), 3),
        lambda: Anova(alpha=0.01),
        lambda: VarianceSameEquivariance(rotations(4)),
    ],
)
def test_equal_measures_share_a_history_whatever_their_addresses(measure):
    first, second = (InvarianceMonitor(TURNS, [measure()]) for _ in range(2))
    first.history[:] = results(2)
    second.load_state_dict(first.state_dict())
    assert len(second.history) == 2


def test_an_empty_history_is_nobodys():
    other = InvarianceMonitor(TURNS, [Anova(alpha=0.01)])
    other.load_state_dict(InvarianceMonitor(TURNS, [Anova()]).state_dict())  # where no warning is an error
    assert other.earlier_histories == []
    first = InvarianceMonitor(TURNS, [Anova()])
    first.history[:] = results(2)
    with pytest.warns(UserWarning, match="a new one begins"):
        other.load_state_dict(first.state_dict())
