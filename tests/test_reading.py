"""Results that explain themselves: the input's row, live means, types, classes, worst transformations, verdicts."""

import numpy as np
import pytest
import torch
from definitions import quotient, sv, tv
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import BinaryJaccardIndex, MulticlassAccuracy
from trainings import Net, events, fit, fit_with_tensorboard

from lightning_invariance import (
    InvarianceMonitor,
    InvarianceResult,
    TransformationSet,
    combine,
    compare,
    evaluate,
    layer_names,
    noise,
    plots,
    quarter_turns,
    rotations,
    translations,
)
from lightning_invariance.measures import (
    NormalizedDistance,
    NormalizedVariance,
    Stratified,
    TransformationVariance,
    VarianceSameEquivariance,
)

IMAGES = torch.rand(20, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TURNS = rotations(4)


def network():
    torch.manual_seed(3)
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3), nn.Identity()
    return nn.Sequential(*layers).double().eval()


def measured(**options):
    return evaluate(network(), IMAGES, TURNS, progress=False, **options)


def test_the_input_is_a_row_that_no_mean_counts():
    without, result = measured(confidence=0.9), measured(confidence=0.9, include_input=True)
    assert result.layers == ["input", *without.layers]
    st = TURNS(IMAGES).numpy()
    expected = quotient(tv(st), sv(st))
    np.testing.assert_allclose(result["NormalizedVariance"]["input"], expected, rtol=1e-9)
    assert (result.mean(), result.interval().network) == (without.mean(), without.interval().network)
    assert (result.input_layer, result.channel_axis["input"]) == ("input", 0)
    assert "input" not in compare(result, result)
    assert result.last() == result.per_layer()["4"]
    only_input = evaluate(
        *(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double(), IMAGES, quarter_turns(), VarianceSameEquivariance()),
        include_input=True, progress=False,
    )  # fmt: skip
    assert np.isnan(only_input.last())  # the input is no layer
    assert measured(include_input=True, transform_at="1").table()[0].shape == (4, 4, 4)  # of what is transformed


def test_a_module_that_is_called_input_keeps_its_name():
    model = nn.Sequential()
    model.add_module("input", nn.Conv2d(2, 3, 1).double())
    assert evaluate(model, IMAGES, TURNS, include_input=True, progress=False).layers == ["network input", "input"]


def test_what_returns_its_input_again_is_no_layer_unless_it_is_asked_for():
    result = measured()
    assert result.layers == layer_names(network(), example=IMAGES[:4]) == ["0", "1", "4"]
    assert result.left_out == {
        name: f"repeated: returns the output of {of!r} again" for name, of in (("2", "1"), ("3", "1"), ("5", "4"))
    }
    asked = measured(layers=["1", "2", nn.Flatten])
    assert asked.layers == ["1", "2", "3"]
    assert torch.equal(asked["NormalizedVariance"]["1"], asked["NormalizedVariance"]["2"])
    assert measured(layers=["[1235]"]).layers == ["1", "5"]  # 4, which 5 repeats, is not measured


@pytest.mark.parametrize(
    "module", [nn.ReLU(inplace=True), nn.Hardtanh(-99, 99, True), nn.Unflatten(1, (4, 4, 4)), nn.MaxPool2d(1)]
)
def test_what_changes_its_input_or_gives_it_axes_is_a_layer(module):
    first = nn.Sequential(nn.Flatten(), nn.Linear(72, 64)) if isinstance(module, nn.Unflatten) else nn.Conv2d(2, 4, 3)
    result = evaluate(nn.Sequential(first, module).double(), IMAGES, TURNS, progress=False)
    assert result.layers[-1] == "1"


def test_dead_units_stay_out_of_the_live_mean():
    model = network()
    model[0].bias.data[0] = -1e3  # a map that never fires
    result = evaluate(model, IMAGES, TURNS, progress=False)
    with torch.no_grad():
        st = model[:2](TURNS(IMAGES).flatten(0, 1)).view(20, 4, -1).numpy()
    values, dead = quotient(tv(st), sv(st)), (st == st[:1, :1]).all((0, 1))
    assert dead.sum() >= 16
    assert result.live_mean()["1"] == pytest.approx(values[~dead].mean(), rel=1e-9)
    assert result.per_layer()["1"] == pytest.approx(values.mean(), rel=1e-9)
    assert "live_mean" in str(result.table())
    assert result.layer_types == {"0": "Conv2d", "1": "ReLU", "4": "Linear"}
    frame = result.to_pandas()
    assert frame["live_mean"].tolist() == list(result.live_mean().values())
    assert frame["type"].tolist() == ["Conv2d", "ReLU", "Linear"]


def test_values_of_each_class(tmp_path):
    labels = torch.arange(20) % 2
    data = TensorDataset(IMAGES, labels)
    result = evaluate(network(), data, TURNS, Stratified(NormalizedVariance(), 2), progress=False)
    result.save(tmp_path / "result")
    for label in range(2):
        alone = evaluate(network(), IMAGES[labels == label], TURNS, progress=False)
        for layer, values in result.by_class["Stratified"].items():
            torch.testing.assert_close(values[label], alone["NormalizedVariance"][layer], rtol=1e-9, atol=0)
        rows = InvarianceResult.load(tmp_path / "result").table()
        assert [row.by_class[label] for row in rows] == pytest.approx([*alone.per_layer().values()], rel=1e-9)
        assert result.to_pandas()[f"class {label}"].tolist() == [row.by_class[label] for row in result.table()]
    cells = plots.heatmap(result, classes=True).axes[0].images[0].get_array()
    np.testing.assert_allclose(cells[[0, -1]].T, [row.by_class for row in result.table()])
    with pytest.raises(ValueError, match="`Stratified"):
        plots.heatmap(measured(), classes=True)


def test_the_worst_transformation_of_each_layer():
    result = measured(confidence=0.95)
    for row in result.worst():
        values = result.response["NormalizedVariance"][row.layer]
        assert (row.value, row.label) == (max(values), TURNS.labels[values.index(max(values))])
        assert row.low < row.value < row.high
    assert str(result.worst()).splitlines()[0].split() == ["layer", "worst", "change", "low", "high"]
    with pytest.raises(ValueError, match="response=True"):
        evaluate(network(), IMAGES, TURNS, NormalizedVariance(), progress=False).worst()


def test_responses_are_0_at_the_identity_and_half_the_squared_distance_elsewhere():
    turns = quarter_turns()
    model = network()[:1]
    result = evaluate(model, IMAGES, turns, VarianceSameEquivariance(), progress=False, include_input=True)
    with torch.no_grad():
        back = turns.inverse(model(turns(IMAGES).flatten(0, 1)).unflatten(0, (20, 4))).numpy()
    unit = back / np.sqrt((back**2).sum((3, 4), keepdims=True))
    expected = 0.5 * ((unit - unit[:, :1]) ** 2).sum((3, 4)).mean((0, 2))
    found = result.response["VarianceSameEquivariance"]
    assert found["0"][0] == 0
    assert found["0"] == pytest.approx(expected.tolist(), rel=1e-9)
    assert found["input"] == [0, 0, 0, 0]


def test_metrics_of_predictions_have_labels():
    data = TensorDataset(IMAGES, torch.arange(20) % 3)
    accuracy = MulticlassAccuracy(3, average="micro")
    result = evaluate(network(), data, TURNS, outputs=accuracy, progress=False)
    found = result.outputs["MulticlassAccuracy"]
    assert found.labels == TURNS.labels
    assert found.worst_label == TURNS.labels[found.values.index(min(found.values))]
    assert str(found).splitlines()[0].split() == ["transformation", "value"]
    rows = result.to_pandas().query("measure == 'MulticlassAccuracy'")
    assert rows["transformation"].tolist() == TURNS.labels
    assert rows["mean"].tolist() == found.to_pandas()["value"].tolist() == found.values
    with pytest.raises(TypeError, match="`outputs` to be a metric, or a list or dict of metrics, but got 'accuracy'"):
        evaluate(network(), data, TURNS, outputs="accuracy")


def test_predictions_that_move_are_mapped_back():
    masks = (IMAGES[:, 0] > 0.5).long()
    data = TensorDataset(IMAGES, masks)
    model = nn.Sequential(nn.Hardtanh(0, 1))

    def forward(model, x):
        return model(x)[:, 0]

    with pytest.warns(UserWarning, match="outputs_move=True"):
        stays = evaluate(model, data, quarter_turns(), forward=forward, outputs=BinaryJaccardIndex(), progress=False)
    moves = evaluate(
        *(model, data, quarter_turns()),
        forward=forward,
        outputs=BinaryJaccardIndex(),
        outputs_move=True,
        progress=False,
    )
    assert moves.outputs["BinaryJaccardIndex"].values == [1, 1, 1, 1]
    assert max(stays.outputs["BinaryJaccardIndex"].values[1:]) < 0.6
    functions = TransformationSet.from_callables([lambda x: x, lambda x: x / 2])
    with pytest.raises(ValueError, match="with inverses for `outputs_move`"):
        evaluate(model, data, functions, outputs=BinaryJaccardIndex(), outputs_move=True)


def test_noise_belongs_to_the_sample():
    t = noise(std=[0, 0.1, 0.5])
    together, alone = t(IMAGES), torch.cat([t(x[None]) for x in IMAGES.flip(0)]).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together[:, 0], IMAGES)
    assert torch.equal(t[1:](IMAGES), together[:, 1:])
    added = together - IMAGES[:, None]
    assert added[:, 1].std().item() == pytest.approx(0.1, rel=0.05)
    drawn = added[:, 1].flatten(), added[:, 2].flatten(), added[:, 2].roll(1, 0).flatten()  # of other levels, samples
    assert (torch.corrcoef(torch.stack(drawn)) - torch.eye(3)).abs().max() < 0.1
    assert not torch.equal(noise(std=[0.1], seed=1)(IMAGES), noise(std=[0.1])(IMAGES))
    other_type = t(IMAGES.float()).double() - IMAGES.float()[:, None].double()  # of equal values
    torch.testing.assert_close(
        other_type, t(IMAGES.float().double()) - IMAGES.float()[:, None].double(), atol=1e-6, rtol=0
    )
    assert (t.labels, t.identity) == (["σ=0", "σ=0.1", "σ=0.5"], 0)
    one, other = (evaluate(network(), IMAGES, t, batch_size=size, progress=False) for size in (3, 64))
    assert one.per_layer() == pytest.approx(other.per_layer(), rel=1e-9)
    for std in ([], [0.1, 0.1], [-1]):
        with pytest.raises(ValueError, match="`std` to hold different numbers"):
            noise(std=std)
    with pytest.raises(RuntimeError, match="no change of tokens"):
        t(torch.ones(2, 5, dtype=torch.long))


def test_any_random_function_can_have_a_seed():
    def drop(x):
        return x * (torch.rand(x.shape) > 0.5) * np.random.rand()

    t = TransformationSet.from_callables({"all": lambda x: x, "drop": drop}, identity="all", seed=0)
    state = torch.get_rng_state()
    assert torch.equal(t(IMAGES)[7:], t(IMAGES[7:]))
    assert torch.equal(torch.get_rng_state(), state)
    assert not t.is_random(IMAGES)


def test_the_verdict_says_which_is_more_invariant():
    other = network()
    other[4].weight.data *= 2
    plain, other = (
        evaluate(model, IMAGES, TURNS, TransformationVariance(), progress=False, confidence=0.95)
        for model in (network(), other)
    )
    assert compare(plain, plain, names=("one", "two")).verdict == "one and two cannot be told apart in any of 3 layers."
    found = compare(plain, other, names=("plain", "loud"))
    row = found["4"]
    half = f"{row.high - row.difference:.4g}"
    assert found.differing == ["4"]
    assert found.verdict == (
        f"plain is more invariant in 1 of 3 layers; at the last, 4, by {abs(row.difference):.4g} ± {half}; the other"
        " 2 cannot be told apart."
    )
    lines = str(found).splitlines()
    assert lines[0] == found.verdict
    assert lines[3].split()[:3] == ["layer", "plain", "loud"]


def test_layers_of_one_type_meet_by_depth():
    results = [
        InvarianceResult(
            {"NV": {name: torch.full((2,), value).double() for name, value in values.items()}},
            layer_types={name: {"c": "Conv2d", "r": "ReLU"}[name[0]] for name in values},
        )
        for values in ({"c1": 1.0, "r1": 2.0, "c2": 3.0, "r2": 4.0}, {"c1": 5.0, "r1": 6.0})
    ]
    bars = plots.compare(*results, "NV", depth=True).axes[0].patches
    assert [bar.get_height() for bar in bars] == [4, 4, 2, 2]  # c2 meets c1, r2 meets r1


def test_pictures_in_axes_of_ones_own():
    results = [measured(), measured(include_input=True)]
    figure = Figure(figsize=(3.3, 2.5), layout="constrained")
    for draw in (plots.layers, plots.stability):
        axes = figure.add_subplot()
        assert draw(results, ax=axes) is figure
        assert axes.lines
        figure.clear()
    axes = figure.add_subplot()
    assert plots.heatmap(results[0], ax=axes) is figure
    assert plots.compare(*results, ax=figure.add_subplot()) is figure
    assert plots.response(results[0], size=(4, 3)).get_size_inches().tolist() == [4, 3]


def test_networks_of_other_layers_are_drawn_from_left_to_right():
    def of(*names):
        return InvarianceResult({"NV": {name: torch.full((2,), 1.0 + i).double() for i, name in enumerate(names)}})

    few, many = of("a.0", "b.0", "end"), of("a.0", "a.1", "b.0", "b.1", "end")
    for results in ([few, many], [many, few]):
        axes = plots.layers(results, "NV").axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["a.0", "a.1", "b.0", "b.1", "end"]
        assert all(np.all(np.diff(line.get_xdata()) > 0) for line in axes.lines)


def test_the_monitor_logs_the_last_layer_and_explains_once(tmp_path):
    monitor = InvarianceMonitor(TURNS)
    trainer = fit_with_tensorboard(tmp_path, monitor, epochs=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = InvarianceMonitor(TURNS)
    fit_with_tensorboard(tmp_path, again, epochs=3, ckpt_path=tmp_path / "last.ckpt")
    logged = events(tmp_path)
    values = [result.per_layer()["fc"] for result in again.history]
    assert [e.value for e in logged.Scalars("NormalizedVariance_last")] == pytest.approx(values, rel=1e-6)
    assert len(logged.Tensors("invariance/text_summary")) == 1


def test_the_history_is_a_table(tmp_path):
    monitor = InvarianceMonitor(TURNS)
    fit(tmp_path, monitor, model=Net(), epochs=2)
    frame = monitor.history.to_pandas()
    assert frame.columns[:4].tolist() == ["epoch", "step", "measure", "layer"]
    assert frame.query("layer == 'fc'")["mean"].tolist() == [result.per_layer()["fc"] for result in monitor.history]
    assert frame["epoch"].unique().tolist() == [-1, 0, 1]
    lines = repr(monitor.history).splitlines()
    assert lines[0].split() == ["epoch", "step", "NormalizedVariance_last", "NormalizedVariance_mean"]
    assert len(lines) == 4


def test_neighbours_of_equal_values_share_a_row_with_their_dots():
    torch.manual_seed(0)
    x = torch.rand(64, 1, 6, 6)
    networks = [nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2)) for _ in range(2)]
    networks[1][0].weight.data[:] = 1
    history = [evaluate(network.eval(), x, quarter_turns(), confidence=0.95, progress=False) for network in networks]
    assert {"0", "1"} <= {*compare(*history).differing}
    axes = plots.evolution(history).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 + 1", "3"]
    assert 0 in axes.lines[0].get_ydata()


def test_only_what_has_the_values_of_all_of_another_output_is_a_repeat():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.even, self.fixed = nn.Conv2d(2, 8, 3), First(), Even(), InPlace()
            self.turned = Turned()

        def forward(self, x):
            h = self.conv(x)
            return self.turned(h).sum((1, 2, 3)) + self.first(h).sum() + self.even(h).sum() + self.fixed(h).sum()

    class First(nn.Module):
        def forward(self, x):
            return x[:, :4]

    class Even(nn.Module):
        def forward(self, x):
            return x[:, ::2]

    class Turned(nn.Module):
        def forward(self, x):
            return x.transpose(2, 3)

    class InPlace(nn.Module):
        def forward(self, x):
            x.data.clamp_(min=0)  # leaves no trace
            return x

    result = evaluate(Views().double(), IMAGES, TURNS, progress=False)
    assert result.layers == ["conv", "first", "even", "fixed"]
    assert result.left_out == {"turned": "repeated: returns the output of 'conv' again"}


def test_repeats_are_left_out_beside_operations():
    names = layer_names(network(), example=IMAGES[:4], operations=True)
    assert names == ["0", "1", "4"]


def test_a_container_that_is_called_input_keeps_its_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.fc = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1)), nn.Linear(72, 2)

        def forward(self, x):
            return self.fc(nn.functional.conv2d(x, self.input[0].weight, padding=1).flatten(1))

    assert evaluate(Net().double(), IMAGES, TURNS, include_input=True, progress=False).layers == ["network input", "fc"]


def test_dead_units_have_no_bias():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()).double()
    nn.init.constant_(model[0].bias, -9)
    model[0].bias.data[0] = 9
    few, many = (
        evaluate(model, IMAGES[:n], TURNS, NormalizedDistance(), confidence=0.95, progress=False) for n in (10, 20)
    )
    low, high = many.unit_interval("1")
    assert (low[1:] == 1).all()
    assert (high[1:] == 1).all()
    row = many.table()[1]
    live = row.live_mean / (1 + 1 / 20)
    interval = many.interval()["1"]
    assert (interval.low + interval.high) / 2 == pytest.approx(0.75 + live / 4, rel=1e-9)
    found = compare(few, many)["1"]
    assert found.difference == pytest.approx((live - few.table()[1].live_mean / (1 + 1 / 10)) / 4, rel=1e-9)


def test_old_evaluations_keep_their_live_means(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_invariance.monitor.history.CHECKPOINT_BYTES", 1)
    monitor, model = InvarianceMonitor(TURNS), Net()
    model.conv.bias.data[0] = -1e3
    fit(tmp_path, monitor, model=model, epochs=3)
    again = InvarianceMonitor(TURNS)
    again.load_state_dict(monitor.state_dict())
    assert [r.live_mean() for r in again.history] == [r.live_mean() for r in monitor.history]
    assert again.history[1].live_mean()["relu"] != again.history[1].per_layer()["relu"]


def test_sets_that_are_combined_know_their_identity():
    both = combine(rotations(4), noise([0, 0.1]))
    assert both.labels[both.identity] == "0° σ=0"
    assert combine(translations(), noise()).identity is None


def test_classes_are_not_interpolated():
    data = TensorDataset(IMAGES, (IMAGES[:, 0] > 0.5).long())
    with pytest.raises(ValueError, match="floating-point predictions for `outputs_move`, but got torch.int64"):
        evaluate(
            *(nn.Sequential(nn.Hardtanh()), data, TURNS),
            forward=lambda model, x: (model(x)[:, 0] > 0.5).long(),
            outputs=BinaryJaccardIndex(),
            outputs_move=True,
            progress=False,
        )


def test_metrics_that_view_their_arguments_have_intervals():
    data = TensorDataset(IMAGES, torch.rand(20, 3, dtype=torch.float64))
    result = evaluate(network(), data, TURNS, outputs=MeanSquaredError(), confidence=0.9, progress=False)
    found = result.outputs["MeanSquaredError"]
    assert all(low < value < high for low, value, high in zip(found.low, found.values, found.high, strict=True))


def test_repeats_are_told_with_gradients_and_metadata():
    class Labelled(torch.Tensor):
        """An image with metadata."""

    def forward(model, x):
        with torch.enable_grad():
            return model(x.as_subclass(Labelled))

    result = evaluate(network(), IMAGES, TURNS, forward=forward, progress=False)
    assert result.layers == ["0", "1", "4"]
