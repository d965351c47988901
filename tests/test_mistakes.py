"""Mistakes of a new user: each has a message that says what to write instead."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from lightning_invariance import (
    InvarianceMonitor,
    TransformationSet,
    evaluate,
    flips,
    plots,
    quarter_turns,
    rotations,
    scales,
    translations,
)
from lightning_invariance.measures import Goodfellow, NormalizedVariance, Stratified

IMAGES = torch.rand(12, 3, 8, 8)


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("transformations", "message"),
    [
        ("rotation", "write `rotations\\(16\\)`"),
        (rotations, "call it, as in `rotations\\(16\\)`"),
        ([v2.RandomRotation(30), v2.GaussianBlur(3)], "TransformationSet.from_callables"),
        (None, "but got None: write `rotations\\(16\\)`"),
        (IMAGES, r"^.{0,80}but got Tensor of shape \(12, 3, 8, 8\): write"),
        ([IMAGES] * 2, r"^.{0,80}but got \[tensor\(.{0,80}…: write"),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda t: evaluate(network(), IMAGES, t), InvarianceMonitor], ids=["evaluate", "monitor"]
)
def test_transformations_that_are_no_set(make, transformations, message):
    with pytest.raises(TypeError, match=message):
        make(transformations)


@pytest.mark.parametrize("measures", [NormalizedVariance, [NormalizedVariance], {"nv": NormalizedVariance}])
@pytest.mark.parametrize(
    "make", [lambda m: evaluate(network(), IMAGES, rotations(4), m), lambda m: InvarianceMonitor(rotations(4), m)]
)
def test_the_class_of_a_measure_instead_of_a_measure(make, measures):
    with pytest.raises(TypeError, match=r"call it, as in `NormalizedVariance\(\)`"):
        make(measures)


def test_a_number_as_text():
    with pytest.raises(ValueError, match="of at least 1, but got '16'"):
        rotations("16")


def test_arguments_in_another_order():
    with pytest.raises(
        TypeError, match=r"`model` to be a torch.nn.Module, but got Tensor: call `evaluate\(model, data"
    ):
        evaluate(IMAGES, network(), rotations(4))
    for model, got in ((None, "NoneType"), (lambda x: x, "function")):
        with pytest.raises(TypeError, match=f"but got {got}"):
            evaluate(model, IMAGES, rotations(4))


def test_a_model_without_values():
    with torch.device("meta"):
        model = network()
    with pytest.raises(ValueError, match="on the meta device: load weights"):
        evaluate(model, IMAGES, rotations(4))


@pytest.mark.parametrize("labels", [torch.eye(12), torch.rand(12)], ids=["one-hot", "float"])
def test_labels_that_are_no_classes(labels):
    with pytest.raises(ValueError, match="whole number, as \\(x, y\\) .* one-hot and floating-point labels are none"):
        evaluate(network(), TensorDataset(IMAGES, labels), rotations(4), Stratified(NormalizedVariance(), 3))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x, factor):
        return factor * self.conv(x)


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (TwoInputs(), TypeError, "missing 1 required positional argument: 'factor'"),
        (NoForward(), NotImplementedError, 'missing the required "forward" function'),
        (nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), RuntimeError, "mat1 and mat2 shapes cannot be multiplied"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), RuntimeError, "to have 1 channels, but got 3 channels"),
    ],
)
def test_a_model_that_is_called_otherwise(model, error, message):
    with pytest.raises(
        error, match=rf"(?s){message}.*x of shape \(5, 3, 8, 8\).*`forward=lambda model, x: ...`.*`input_fn=`"
    ):
        evaluate(model, IMAGES, rotations(4))


def test_other_errors_of_a_model_stay_as_they_are():
    def forward(model, x):
        raise ArithmeticError("a bad batch")

    with pytest.raises(ArithmeticError, match="^a bad batch$"):
        evaluate(network(), IMAGES, rotations(4), forward=forward)


def test_a_warning_of_nan_names_a_handful_of_layers():
    class Bad(nn.Module):
        def forward(self, x):
            return x + torch.nan

    with pytest.warns(UserWarning, match=r"NaN.*0 \(192\).* and 14 more layers"):
        evaluate(nn.Sequential(*(Bad() for _ in range(20))), IMAGES, rotations(4), progress=False)


@pytest.mark.parametrize("shape", [(4, 28, 28, 1), (4, 8, 12, 3)])
def test_images_with_channels_last_are_refused(shape):
    with pytest.raises(ValueError, match=r"looks like channels last: give `x.movedim\(-1, -3\)`"):
        rotations(2)(torch.rand(shape))


@pytest.mark.parametrize("shape", [(4, 1, 100), (4, 2, 100, 1), (4, 256, 3), (4, 12), (4, 1, 128)])
@pytest.mark.parametrize("make", [lambda: rotations(8), translations, scales, quarter_turns, flips])
def test_points_signals_and_tokens_are_refused_before_the_network_runs(shape, make):
    with pytest.raises(ValueError, match=r"Expected images \(batch, channels, height, width\), .*from_callables"):
        evaluate(Forbidden(), torch.rand(shape), make(), progress=False)


class Forbidden(nn.Module):
    def forward(self, x):
        raise AssertionError("the network ran")


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (4, 64, 3, 3), (4, 3, 5, 4), (4, 3, 1, 1), (2, 3, 4, 8, 8)])
def test_images_with_channels_first_are_not(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rotations(2)(torch.rand(shape))


def test_a_channel_axis_without_names():
    with pytest.raises(TypeError, match=r'but got 0: write \{"\*": 0\} for all layers'):
        evaluate(nn.Conv2d(1, 2, 3), torch.rand(8, 1, 6, 6), rotations(4), channel_axis=0)


@pytest.mark.parametrize("data", [(IMAGES, torch.arange(12)), {"x": IMAGES, "y": torch.arange(12)}])
def test_tensors_that_are_no_dataset(data):
    with pytest.raises(TypeError, match=r"but got a (tuple|dict): give `torch.utils.data.TensorDataset\(x, y\)`"):
        evaluate(network(), data, rotations(4))


def test_several_loaders_are_no_data():
    with pytest.raises(TypeError, match="one DataLoader, but got 2 of them"):
        evaluate(network(), [DataLoader(TensorDataset(IMAGES))] * 2, rotations(4))


@pytest.mark.parametrize("measures", [DataLoader(TensorDataset(IMAGES)), 3])
def test_measures_that_are_none(measures):
    with pytest.raises(TypeError, match=r"argument `measures` to be a metric, or a list or dict of metrics, but got"):
        InvarianceMonitor(rotations(4), measures)


def test_a_collection_of_metrics_is_its_metrics():
    pairs = TensorDataset(torch.rand(12, 3), torch.arange(12) % 2)
    halves = TransformationSet.from_callables({"same": lambda x: x, "half": lambda x: x / 2})
    result = evaluate(nn.Linear(3, 2), pairs, halves, outputs=MetricCollection([MulticlassAccuracy(2)]), progress=False)
    assert [*result.outputs] == ["MulticlassAccuracy"]


def test_a_module_for_its_name():
    model = network()
    with pytest.raises(TypeError, match="argument `layers` .* but got a Conv2d: give its name"):
        evaluate(model, IMAGES, rotations(4), layers=model[0])


def test_a_scripted_model():
    with pytest.raises(RuntimeError, match="scripted, traced or exported models have none"):
        evaluate(torch.jit.script(network()), IMAGES, rotations(4))


def test_a_model_that_takes_a_dict():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, batch):
            return self.network(batch["image"])

    with pytest.raises((IndexError, TypeError), match=r"If it is not called as `model\(x\)`, give `forward="):
        evaluate(Keyed(), IMAGES, rotations(4))


@pytest.mark.parametrize(("make", "argument"), [(scales, "factors"), (translations, "pixels")])
def test_a_number_for_a_list(make, argument):
    with pytest.raises(TypeError, match=f"argument `{argument}` to be a list of numbers, but got 3"):
        make(3)


def test_angles_that_are_no_numbers():
    with pytest.raises(ValueError, match="argument `angles` to hold finite numbers"):
        rotations(angles=[0.0, float("nan")])


def test_intervals_of_a_measure_without():
    measures = [NormalizedVariance(), Goodfellow(0.2)]
    result = evaluate(network(), IMAGES, rotations(4), measures, confidence=0.95, progress=False)
    assert [*result.influences] == ["NormalizedVariance"]
    with pytest.raises(
        ValueError, match="influences of samples on Goodfellow.*Anova, Goodfellow, Stratified.* have none"
    ):
        result.interval("Goodfellow")
    assert "low" not in str(result.table("Goodfellow"))


def test_layers_and_results_that_are_not_there():
    with pytest.warns(
        UserWarning, match=r"`channel_axis` to name layers that ran, but none fits '7\*'\. There are 0, 1"
    ):
        result = evaluate(network(), IMAGES, rotations(4), channel_axis={"7*": -1}, progress=False)
    assert "2 layers, 12 samples" in repr(result)
    assert "1 layer, 12 samples" in repr(evaluate(network(), IMAGES, rotations(4), layers="1", progress=False))
    with pytest.raises(KeyError, match=r"No layer 'conv1' in this result\. There are 0, 1"):
        result["NormalizedVariance"]["conv1"]
    assert result["NormalizedVariance"].get("conv1") is None
    for draw in (plots.heatmap, plots.layers, plots.response):
        with pytest.raises(
            TypeError, match=r"to be one InvarianceResult, but got 'run/result\.npz'; `Inv.*load` reads"
        ):
            draw("run/result.npz")
    with pytest.raises(TypeError, match=r"to be one InvarianceResult, but got list of 2"):
        plots.heatmap([result, result])
    with pytest.raises(TypeError, match="to be one InvarianceResult, but got 1"):
        plots.layers([result, 1])
