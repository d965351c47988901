"""Evaluations every n steps of the optimiser: when, at which step they are logged, and that nothing else changes."""

import pytest
import torch
from lightnings import CSVLogger, EarlyStopping, ModelCheckpoint, pl
from test_trainer import Manual
from torch.utils.data import DataLoader, IterableDataset
from trainings import DATA, Net, Recorder, fit, trainer_of

from lightning_invariance import InvarianceMonitor, rotations


def monitor(every=4, **options):
    return InvarianceMonitor(rotations(4), every_n_steps=every, **options)


class Endless(IterableDataset):
    """One epoch without end."""

    def __iter__(self):
        while True:
            yield from DATA


#: Five batches an epoch, three epochs: the steps after which it evaluates, the untrained network first.
SETTINGS = {
    "plain": ({}, [0, 4, 8, 12]),
    "every step of a short training": ({"every": 1, "max_steps": 3}, [0, 1, 2, 3]),
    "several validations an epoch": ({"val_check_interval": 2}, [0, 4, 8, 12]),
    "validations by steps": ({"val_check_interval": 6, "check_val_every_n_epoch": None}, [0, 4, 8, 12]),
    "rare validations": ({"check_val_every_n_epoch": 3}, [0, 4, 8, 12]),
    "gradients of two batches": ({"accumulate_grad_batches": 2, "every": 2}, [0, 2, 4, 6, 8]),
    "few batches": ({"limit_train_batches": 2, "limit_val_batches": 1}, [0, 4]),
    "two optimizers": ({"model": Manual, "every": 5}, [0, 6, 10, 16, 20, 26, 30]),
    "without a sanity check": ({"num_sanity_val_steps": 0, "every": 7}, [0, 7, 14]),
}


class Steps(pl.Callback):
    """Notes the step of the optimiser at each new result."""

    def __init__(self, watching):
        self.watching, self.steps = watching, []

    def on_train_batch_end(self, trainer, *_):
        new = len(self.watching.history) - len(self.steps)
        self.steps += ([0] if not self.steps else []) + [trainer.global_step] * (new - (not self.steps))


@pytest.mark.parametrize("name", SETTINGS)
def test_when_it_evaluates(tmp_path, name):
    options, expected = SETTINGS[name]
    options = dict(options)
    watching = monitor(options.pop("every", 4))
    steps, model = Steps(watching), options.pop("model", Net)()
    fit(tmp_path, watching, steps, model=model, **options)
    assert steps.steps == expected
    assert len(watching.history) == len(expected)


def test_an_epoch_without_end(tmp_path):
    watching = monitor(5)
    trainer = trainer_of(tmp_path, watching, epochs=-1, max_steps=12, val_check_interval=4)
    trainer.fit(Net(), DataLoader(Endless(), 8), DataLoader(DATA, 8))
    assert [result.step for result in watching.history] == [0, 4, 9]  # counted from 0, as Lightning's own metrics
    assert {result.epoch for result in watching.history[1:]} == {0}


def test_it_is_logged_at_the_step_of_the_metrics_of_the_batch(tmp_path):
    logger = CSVLogger(tmp_path, "", "run")
    fit(tmp_path, monitor(4), logger=logger, log_every_n_steps=1)
    rows = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    columns = [rows[0].index(name) for name in ("step", "NormalizedVariance_last", "train_loss")]
    found = {int(row[columns[0]]): [row[column] for column in columns[1:]] for row in rows[1:] if row[columns[1]]}
    assert [*found] == [0, 3, 7, 11]


def test_a_training_is_what_it_would_be_without(tmp_path):
    runs = []
    for callbacks in ([], [monitor(2)]):
        recorder = Recorder()
        trainer = fit(tmp_path, *callbacks, recorder, accumulate_grad_batches=2)
        runs.append((recorder.seen, trainer.lightning_module.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


@pytest.mark.parametrize("at", [4, 6])
def test_a_resumed_training_has_neither_gap_nor_repeat(tmp_path, at):
    whole, best = monitor(4), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=at)
    fit(tmp_path, whole, best)
    resumed = monitor(4)
    fit(tmp_path, resumed, ckpt_path=tmp_path / f"step={at}.ckpt")
    assert len(resumed.history) == len(whole.history)
    for one, other in zip(resumed.history[: 1 + at // 4], whole.history, strict=False):
        assert one.per_layer() == pytest.approx(other.per_layer())


def test_a_monitor_that_joins_a_resumed_training_keeps_to_its_steps(tmp_path):
    trainer = fit(tmp_path, max_steps=7)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    watching = monitor(5)
    steps = Steps(watching)
    with pytest.warns(UserWarning, match="resuming"):  # in the middle of an epoch
        fit(tmp_path, watching, steps, ckpt_path=tmp_path / "early.ckpt", max_steps=16, epochs=-1)
    assert steps.steps[1:] == [10, 15]


def test_early_stopping_counts_evaluations_between_validations(tmp_path):
    watching = monitor(10)
    stop = EarlyStopping(
        "NormalizedVariance_last", patience=2, min_delta=10.0
    )  # nothing is better than untrained by so much
    trainer = fit(tmp_path, watching, stop, epochs=20, num_sanity_val_steps=0)
    assert [result.epoch for result in watching.history] == [-1, 1, 3]
    assert trainer.global_step == 20


def test_validate_evaluates_and_both_arguments_exclude_each_other(tmp_path):
    watching = monitor(100)
    trainer = fit(tmp_path, watching, epochs=1)
    assert len(watching.history) == 1
    trainer.validate(trainer.lightning_module, DataLoader(DATA, 8), verbose=False)
    assert len(watching.history) == 2
    with pytest.raises(ValueError, match="one of the arguments `every_n_epochs` and `every_n_steps`, but got 2 and 4"):
        monitor(every_n_epochs=2)
    with pytest.raises(ValueError, match="`every_n_steps` to be an int of at least 1"):
        monitor(0)
