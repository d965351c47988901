"""Metrics of predictions and targets under each transformation, in the same walk."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from definitions import half_width
from lightning.pytorch.callbacks import EarlyStopping
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError, R2Score
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from trainings import Net, events, fit_with_tensorboard

from lightning_invariance import (
    InvarianceMonitor,
    InvarianceResult,
    TransformationSet,
    evaluate,
    plots,
    quarter_turns,
    rotations,
)
from lightning_invariance.measures import Goodfellow, NormalizedVariance
from lightning_invariance.results.result import OutputValues

X = torch.rand(37, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(37) % 3


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def accuracy():
    return MulticlassAccuracy(3, average="micro")


def expected_accuracies(turns):
    with torch.no_grad():
        predictions = classifier()(turns(X).flatten(0, 1)).argmax(1).view(37, -1)
    return (predictions == Y[:, None]).double().mean(0).tolist()


@pytest.mark.parametrize("batch_size", [3, 10, 64])
@pytest.mark.parametrize("measures", [None, [Goodfellow()], [NormalizedVariance()]])
def test_the_accuracy_under_each_transformation(batch_size, measures):
    """Also where rows are longer than a batch, and where a second pass shows everything again."""
    turns = rotations(8)
    data = TensorDataset(X, Y)
    result = evaluate(
        classifier(), data, turns, measures, outputs=accuracy(), batch_size=batch_size, confidence=0.9, layers=["1"]
    )
    found = result.outputs["MulticlassAccuracy"]
    expected = expected_accuracies(turns)
    assert found.values == pytest.approx(expected, rel=1e-6)
    assert found.mean == pytest.approx(sum(expected) / 8, rel=1e-6)
    assert found.worst == pytest.approx(min(expected), rel=1e-6)


def test_an_error_of_a_metric_says_what_it_got():
    with pytest.raises(
        RuntimeError, match=r"'MeanSquaredError' in argument `outputs` got predictions of shape \(2, 3\)"
    ):
        evaluate(classifier(), TensorDataset(X, Y.float()), quarter_turns(), outputs=MeanSquaredError(), batch_size=8)


def test_a_mean_over_classes_of_one_size_is_no_mean_over_samples():
    """It has the value of one here, but other samples would also change how many there are of each class."""
    metrics = {name: MulticlassAccuracy(3, average=name) for name in ("micro", "macro")}
    data = TensorDataset(X[:36], Y[:36])
    result = evaluate(classifier(), data, quarter_turns(), outputs=metrics, confidence=0.95, batch_size=20)
    micro, macro = result.outputs["micro"], result.outputs["macro"]
    assert macro.values == pytest.approx(micro.values)
    assert micro.low
    assert not macro.low


@pytest.mark.parametrize("values", [[math.nan, 0.9, 0.8], [0.9, math.nan, 0.8], [0.9, 0.8, math.nan]])
def test_the_worst_value_is_not_known_where_one_is_not(values):
    assert math.isnan(OutputValues(values, True).worst)
    assert math.isnan(OutputValues(values, False).worst)


def test_errors_are_worst_where_they_are_largest():
    data = [{"image": x, "label": x.flip(-1)} for x in X]
    metrics = {"mse": MeanSquaredError(), "again": MeanSquaredError()}
    result = evaluate(nn.Sequential(nn.Identity()), data, quarter_turns(), outputs=metrics)
    targets = X.flip(-1)
    expected = [(moved - targets).square().mean().item() for moved in quarter_turns()(X).unbind(1)]
    assert result.outputs["mse"].values == pytest.approx(expected, rel=1e-5)
    assert result.outputs["mse"].worst == pytest.approx(max(expected), rel=1e-5)
    assert [*result.outputs] == ["mse", "again"]


def test_targets_of_any_shape_and_outputs_in_containers():
    class Segments(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return SimpleNamespace(loss=torch.zeros(()), logits=self.net(x), other=x)

    torch.manual_seed(1)
    model, targets = Segments(), (X[:, 0] > 0.5).long()
    metric = MulticlassJaccardIndex(2)
    data = TensorDataset(X, targets)
    forward = lambda model, x: {"hidden": x, "logits": model(x).logits}  # noqa: E731
    for options in ({"forward": forward}, {}):
        result = evaluate(model, data, quarter_turns(), outputs=metric, **options)
        for j, moved in enumerate(quarter_turns()(X).unbind(1)):
            value = MulticlassJaccardIndex(2)(model.net(moved), targets)
            assert result.outputs["MulticlassJaccardIndex"].values[j] == pytest.approx(float(value), rel=1e-5)


def test_the_file_keeps_them_and_the_picture_draws_them(tmp_path):
    measure = NormalizedVariance(response=True)
    metrics = {"accuracy": accuracy(), "error": MulticlassAccuracy(3)}
    result = evaluate(classifier(), TensorDataset(X, Y), rotations(8), measure, outputs=metrics)
    result.save(tmp_path / "result.npz")
    loaded = InvarianceResult.load(tmp_path / "result.npz")
    assert loaded.outputs == result.outputs
    assert result.reduced().outputs == result.outputs
    above = plots.response(loaded).axes[0]
    assert above.lines[0].get_ydata().tolist() == result.outputs["accuracy"].values
    assert len(above.lines) == 2


def bounds(values, confidence):
    """Bounds by Student's t, with degrees of freedom from the kurtosis."""
    return [values.mean() - half_width(values, confidence), values.mean() + half_width(values, confidence)]


@pytest.mark.parametrize("batch_size", [3, 64])
def test_metrics_that_are_means_over_samples_have_intervals(batch_size, tmp_path):
    turns = rotations(8)
    metrics = {"accuracy": accuracy(), "mse": MeanSquaredError(), "IoU": MulticlassJaccardIndex(3), "r2": R2Score()}

    def forward(model, x):
        return model(x).sum(1)

    with torch.no_grad():
        moved = turns(X).flatten(0, 1)
        right = (classifier()(moved).argmax(1).view(37, -1) == Y[:, None]).double().numpy()
        errors = (forward(classifier(), moved).view(37, -1) - Y[:, None]).double().square().numpy()
    data, options = TensorDataset(X, Y), {"batch_size": batch_size, "confidence": 0.9}
    measure = NormalizedVariance(response=True)
    of_classes = evaluate(
        classifier(), data, turns, measure, outputs={n: metrics[n] for n in ("accuracy", "IoU")}, **options
    )
    of_numbers = evaluate(
        classifier(), TensorDataset(X, Y.float()), turns, outputs={n: metrics[n] for n in ("mse", "r2")},
        forward=forward, **options,
    )  # fmt: skip
    for found, expected in ((of_classes.outputs["accuracy"], right), (of_numbers.outputs["mse"], errors)):
        for j, column in enumerate(expected.T):
            assert [found.low[j], found.high[j]] == pytest.approx(bounds(column, 0.9), rel=1e-4)
        assert [found.mean_low, found.mean_high] == pytest.approx(bounds(expected.mean(1), 0.9), rel=1e-4)
    for found in (of_classes.outputs["IoU"], of_numbers.outputs["r2"]):  # which are none of single samples
        assert found.low == found.high == []
        assert found.mean_low is None
    of_classes.save(tmp_path / "result.npz")
    assert InvarianceResult.load(tmp_path / "result.npz").outputs == of_classes.outputs
    assert len(plots.response(of_classes).axes[0].collections) == 1  # one band


def test_evolution_draws_them_above_the_layers():
    turns, data = rotations(4), TensorDataset(X, Y)
    history = [evaluate(classifier(), data, turns, outputs=accuracy(), confidence=c) for c in (None, 0.9, 0.95)]
    for result in history:
        result.scores = {"val_acc": 0.5}
    above = plots.evolution(history).axes[0]
    means = [result.outputs["MulticlassAccuracy"].mean for result in history]
    assert above.lines[0].get_ydata().tolist() == means
    band = above.collections[-1].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(history[2].outputs["MulticlassAccuracy"].mean_high)
    assert plots.evolution(history, score="val_acc").axes[0].lines[0].get_ydata().tolist() == [0.5] * 3


def test_samples_that_are_all_right_have_no_narrow_interval():
    metric = {"right": MulticlassAccuracy(3, average="micro")}
    data = TensorDataset(X, torch.zeros(37, dtype=torch.long))

    def forward(model, x):
        return torch.tensor([[1.0, 0.0, 0.0]]) + 0 * model(x)

    found = evaluate(classifier(), data, rotations(4), outputs=metric, forward=forward, confidence=0.9).outputs["right"]
    assert found.values == [1.0] * 4
    assert all(math.isnan(bound) for bound in (*found.low, *found.high, found.mean_low))


def test_intervals_end_where_the_metric_does():
    """One of 37 samples is wrong: Student's interval would reach above 1."""
    targets = torch.zeros(37, dtype=torch.long)
    targets[0] = 1
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    nn.init.zeros_(fixed[1].weight)
    fixed[1].bias.data = torch.tensor([1.0, 0.0, 0.0])
    found = evaluate(fixed, TensorDataset(X, targets), rotations(4), outputs=accuracy(), confidence=0.95)
    [values] = found.outputs.values()
    assert values.values == pytest.approx([36 / 37] * 4)
    assert values.high == [1.0] * 4
    assert values.mean_high == 1.0
    kurtosis = (1 - 3 * 36 / 37**2) / (36 / 37**2)  # of a coin that falls so
    half = stats.t.ppf(0.975, 2 * 37 / (kurtosis - 1) - 1) / 37
    assert values.mean_low == pytest.approx(36 / 37 - half, rel=1e-4)
    assert 36 / 37 + half > 1.1


def test_targets_that_are_maps_do_not_move_which_is_said():
    maps, model = torch.randint(0, 3, (37, 4, 4)), nn.Sequential(nn.Conv2d(1, 3, 1))
    metric = MulticlassJaccardIndex(3)
    with pytest.warns(
        UserWarning, match=r"Targets of shape \(.*, 4, 4\) look like maps of the images, but do not move"
    ):
        evaluate(model, TensorDataset(X, maps), quarter_turns(), outputs=metric)
    brightness = TransformationSet.from_callables({"same": lambda x: x, "half": lambda x: x / 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(model, TensorDataset(X, maps), brightness, outputs=metric)


def on_a_rank():
    result = evaluate(classifier(), TensorDataset(X, Y), rotations(4), outputs=accuracy(), confidence=0.9)
    few = evaluate(classifier(), TensorDataset(X[:2], Y[:2]), rotations(4), outputs=accuracy())
    found = [each.outputs["MulticlassAccuracy"] for each in (result, few)]
    return found[0].values, found[1].values, found[0].low


def test_processes_have_the_values_of_one(ranks):
    few = evaluate(classifier(), TensorDataset(X[:2], Y[:2]), rotations(4), outputs=accuracy())
    one = evaluate(classifier(), TensorDataset(X, Y), rotations(4), outputs=accuracy(), confidence=0.9)
    for values in ranks(on_a_rank):
        assert values[0] == pytest.approx(expected_accuracies(rotations(4)), rel=1e-6)
        assert values[1] == pytest.approx(few.outputs["MulticlassAccuracy"].values)
        assert values[2] == pytest.approx(one.outputs["MulticlassAccuracy"].low)


def test_the_callback_logs_mean_and_worst(tmp_path):
    data = TensorDataset(torch.rand(20, 1, 6, 6), torch.arange(20) % 2)
    metric = MulticlassAccuracy(2, average="micro")
    monitor = InvarianceMonitor(rotations(4), data=data, outputs=metric, name="turns")
    stopping = EarlyStopping("MulticlassAccuracy_turns_worst", mode="max", patience=100)
    fit_with_tensorboard(tmp_path, monitor, stopping, epochs=1, model=Net())
    found = monitor.history[-1].outputs["MulticlassAccuracy"]
    logged = events(tmp_path)
    assert logged.Scalars("MulticlassAccuracy_turns_mean")[-1].value == pytest.approx(found.mean, rel=1e-6)
    assert logged.Scalars("MulticlassAccuracy_turns_worst")[-1].value == pytest.approx(found.worst, rel=1e-6)
    assert float(stopping.best_score) == pytest.approx(found.worst, rel=1e-6)


def test_metrics_that_do_not_fit_are_refused():
    data, turns = TensorDataset(X, Y), quarter_turns()
    with pytest.raises(ValueError, match="targets for the metrics.*but a batch is a list of"):
        evaluate(classifier(), X, turns, outputs=accuracy())
    with pytest.raises(ValueError, match="one value"):
        evaluate(classifier(), data, turns, outputs=MulticlassAccuracy(3, average=None))
    with pytest.raises(TypeError, match="`outputs`.*call it"):
        evaluate(classifier(), data, turns, outputs=[MulticlassAccuracy])
    with pytest.raises(ValueError, match="prediction for each of"):
        evaluate(classifier(), data, turns, outputs=accuracy(), forward=lambda model, x: model(x).sum())
    with pytest.raises(ValueError, match="`outputs=` needs"):
        evaluate(classifier(), data, rotations(16), outputs=accuracy(), state_budget=2500)
    with pytest.raises(ValueError, match="names of measures"):
        InvarianceMonitor(turns, outputs={"a:b": accuracy()})


def test_metrics_that_are_given_stay_as_they_are():
    metric = accuracy()
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    evaluate(classifier(), TensorDataset(X, Y), quarter_turns(), outputs=metric)
    assert float(metric.compute()) == 1
