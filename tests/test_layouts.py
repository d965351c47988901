"""Where the samples stand in the output of a layer, on networks that fold, transpose, mix or ignore them."""

import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

from lightning_invariance import TransformationSet, evaluate, flips, functional, quarter_turns, rotations

N, SIZE = 20, 6
IMAGES = torch.rand(N, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TURNS = rotations(4)


class Seen(nn.Module):
    """Marks a place in a network: a copy, since what is returned again is no layer."""

    def forward(self, x):
        return x.clone()


def on_a_rank():
    lstm = nn.Sequential(nn.Flatten(2), nn.LSTM(36, 5, batch_first=True)).double()
    few = evaluate(lstm, IMAGES, TURNS, layers="1", max_samples=2, progress=False)  # the third process has no sample
    return left_out_by(), few.layers


def test_three_processes_agree(ranks):
    for left_out, few in ranks(on_a_rank):
        assert left_out == left_out_by()
        assert few == ["1[0]", "1[1][0]", "1[1][1]"]


def test_an_axis_as_long_as_the_batch_is_not_taken_for_the_samples():
    shift = TransformationSet.from_callables({str(k): (lambda x, k=k: x.roll(k, 1)) for k in range(16)})
    first = nn.TransformerEncoderLayer(8, 2, 16).eval()
    batch_first = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    batch_first.load_state_dict(first.state_dict())
    x = torch.randn(8, 64, 8) + torch.linspace(-3, 3, 8)[:, None, None]
    found = evaluate(first, x, shift, forward=lambda model, x: model(x.transpose(0, 1)), progress=False)
    expected = evaluate(batch_first, x, shift, progress=False)
    for layer, value in expected["NormalizedVariance"].items():
        if layer in found["NormalizedVariance"]:
            other = found["NormalizedVariance"][layer]
            torch.testing.assert_close(other.reshape(value.shape), value, rtol=1e-3, atol=1e-6)
    assert "self_attn[0]" in found.layers
    assert found.left_out["dropout1"] == "repeated: returns the output of 'self_attn[0]' again"


@dataclass
class Output:
    hidden: torch.Tensor
    more: SimpleNamespace


class Wrapped(nn.Module):
    def forward(self, x):
        return Output(x.clone(), SimpleNamespace(spectrum=torch.fft.fft2(x.float()), nothing=None))


class Carrier:
    def __init__(self, tensor):
        self.tensor = tensor


class Carried(nn.Module):
    def forward(self, x):
        return Carrier(x.clone())


class Strange(nn.Module):
    """Layers that cannot be measured, each in its own way, and containers of other libraries."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
        self.table, self.loss, self.centred, self.positive, self.noise = (Seen() for _ in range(5))
        self.wrapped, self.carried, self.sometimes = Wrapped(), Carried(), Seen()

    def forward(self, x):
        y = self.conv(x)
        self.table(torch.ones(64, 5))
        self.loss(torch.stack([y.mean(), y.std()]))
        self.centred(y - y.mean(0, keepdim=True))
        self.positive(y.flatten()[y.flatten() > 0])
        self.noise(nn.functional.dropout(y))
        self.wrapped(y)
        self.carried(y)
        if y[0, 0, 0, 0] > 0:
            self.sometimes(y)
        return y


REASONS = {"table": "constant", "loss": "mixed", "centred": "mixed", "positive": "ragged", "noise": "random"}


def left_out_by():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return evaluate(Strange(), IMAGES.float(), TURNS, batch_size=16, progress=False).left_out


def test_layers_that_cannot_be_measured_are_left_out_with_one_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = evaluate(Strange(), IMAGES.float(), TURNS, batch_size=16, progress=False)
    assert {layer: reason.split(":")[0] for layer, reason in result.left_out.items()} == REASONS
    shapes = {layer: tuple(value.shape) for layer, value in result["NormalizedVariance"].items()}
    maps = (4, 4, 4)
    assert shapes == {
        "conv": maps,
        "wrapped[hidden]": maps,
        "wrapped[more][spectrum][real]": maps,
        "wrapped[more][spectrum][imag]": maps,
        "carried": maps,
        "sometimes": maps,
    }
    assert torch.equal(result["NormalizedVariance"]["carried"], result["NormalizedVariance"]["conv"])
    told = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
    assert told == [
        "5 layers are left out: 1 constant (table), 2 mixed (loss, centred), 1 ragged (positive), 1 random (noise)."
        " `result.left_out` says why."
    ]


def test_a_layer_that_some_samples_reach_says_how_many():
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))  # as with evaluate's seed
    signs = Strange().eval().conv(TURNS(IMAGES[order].float()).flatten(0, 1))[:, 0, 0, 0] > 0
    reached = 4 * int(signs[::16].sum())  # the first input of each batch of four samples decides
    assert 0 < reached < N
    with pytest.warns(
        UserWarning, match=rf"1 layer is reached by some of the samples only: sometimes \({reached} of 20\)"
    ):
        result = evaluate(Strange(), IMAGES.float(), TURNS, batch_size=16, max_samples=None, seed=0, progress=False)
    assert result.reached == {"sometimes": reached}


@pytest.mark.parametrize("layer", REASONS)
def test_a_layer_that_was_asked_for_by_name_is_an_error_that_says_why(layer):
    with pytest.raises(
        RuntimeError, match=f"layer '{layer}' to have values for every sample, but it is {REASONS[layer]}"
    ):
        evaluate(Strange(), IMAGES.float(), TURNS, layers=[layer, "conv"], batch_size=16, progress=False)


def test_an_empty_result_is_an_error():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv.forward(x)

    with pytest.raises(RuntimeError, match=r"none ran\. The hooks .* never fired"):
        evaluate(Direct(), IMAGES.float(), TURNS, progress=False)
    traced = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGES.float())
    with pytest.raises(RuntimeError, match="scripted, traced or exported"):
        evaluate(traced, IMAGES.float(), TURNS, progress=False)
    with pytest.raises(RuntimeError, match=r"all were left out: 2 mixed"):
        evaluate(nn.Sequential(Loss(), Seen()), IMAGES.float(), TURNS, progress=False)


class Loss(nn.Module):
    def forward(self, x):
        return x.mean()


def test_states_of_recurrent_networks():
    lstm = nn.LSTM(36, 5, num_layers=2).double()
    result = evaluate(lstm, IMAGES, TURNS, forward=lambda model, x: model(x.flatten(2).transpose(0, 1)), progress=False)
    shapes = [tuple(value.shape) for value in result["NormalizedVariance"].values()]
    assert shapes == [(3, 5), (2, 5), (2, 5)]
    with torch.no_grad():
        cube = lstm(TURNS(IMAGES).flatten(0, 1).flatten(2).transpose(0, 1))[1][0].transpose(0, 1).unflatten(0, (N, 4))
    expected = functional.normalized_variance(cube)
    torch.testing.assert_close(result["NormalizedVariance"]["LSTM[1][0]"], expected, rtol=1e-9, atol=0)


def test_a_network_without_any_dependence_on_order_keeps_its_values_in_one_pass():
    calls = []

    def forward(model, x):
        calls.append(len(x))
        return model(x)

    evaluate(nn.Conv2d(3, 2, 3), IMAGES.float(), quarter_turns(), forward=forward, batch_size=40, progress=False)
    assert calls == [5, 4, 40, 40]  # a probe of two small forward passes, and the walk


class Towers(nn.Module):
    """Two towers, one of which sees the same text whatever the image is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.dead = nn.Linear(3, 4), nn.Linear(5, 4), nn.ReLU()

    def forward(self, x):
        y = self.image(x.mean((2, 3)))
        return y @ self.text(torch.ones(len(x), 5, dtype=x.dtype)).T, self.dead(-y.square())


def test_a_tower_that_sees_no_input_is_constant():
    with pytest.warns(UserWarning, match=r"1 layer is left out: 1 constant \(text\)"):
        result = evaluate(Towers().double(), IMAGES, TURNS, progress=False)
    assert result.layers == ["image", "dead"]  # which is the same for every input, but computed from it
    assert result.dead["dead"].all()


class TextTower(nn.Module):
    """A tower for the text of each sample, and one for its image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.words, self.text, self.both = (
            nn.Linear(3, 4),
            nn.Embedding(10, 5),
            nn.Linear(5, 4),
            nn.Linear(4, 2),
        )

    def forward(self, x, words):
        return self.both(self.image(x.mean((2, 3))) * self.text(self.words(words)))


@pytest.mark.parametrize("images", [IMAGES, torch.ones_like(IMAGES)], ids=["images", "equal images"])
def test_layers_that_depend_on_other_entries_of_a_batch_alone_are_constant(images):
    data = TensorDataset(images, torch.arange(len(images)) % 10)
    with pytest.warns(UserWarning, match=r"2 layers are left out: 2 constant \((words, text|text, words)\)"):
        result = evaluate(
            TextTower().double(), data, TURNS, forward=lambda model, x, batch: model(x, batch[1]), progress=False
        )
    assert result.layers == ["image", "both"]


def test_a_network_that_is_dead_keeps_its_layers():
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    model[1].bias.data -= 1000.0
    result = evaluate(model, IMAGES, TURNS, progress=False)
    assert result.layers == ["0", "1", "2", "3"]
    assert result.dead["3"].all()


def test_equal_inputs_make_no_layer_constant():
    with pytest.warns(UserWarning, match=r"1 constant \(text\)"):
        result = evaluate(Towers().double(), torch.ones_like(IMAGES), flips(), progress=False)
    assert result.layers == ["image", "dead"]
    assert result.dead["image"].all()
