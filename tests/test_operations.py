"""Outputs of functions and operators within forward, in addition to outputs of modules."""

import pytest
import torch
from torch import nn

from lightning_invariance import InvarianceMonitor, evaluate, layer_names, rotations
from lightning_invariance.measures import NormalizedVariance

IMAGES = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TURNS = rotations(4)


class Block(nn.Module):
    """A residual block with functions, operators and work in place."""

    def __init__(self, inplace):
        super().__init__()
        self.conv, self.act, self.inplace = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=inplace), inplace

    def forward(self, x):
        y = nn.functional.relu(self.conv(x), inplace=self.inplace)
        y = torch.relu(y - 0.2)
        if self.inplace:
            y += x
        else:
            y = y + x
        y = self.act(y)
        return y.flatten(2).transpose(1, 2).transpose(1, 2).view(x.shape)


class Net(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(inplace), Block(inplace))

    def forward(self, x):
        x = self.blocks(self.stem(x))
        attention = nn.functional.softmax(x.flatten(2) @ x.flatten(2).transpose(1, 2), -1)
        scale = torch.arange(4, dtype=x.dtype).exp()  # does not depend on the input
        return attention.mean(1) * scale


NAMES = [f"blocks.{i}-{name}" for i in (0, 1) for name in ("relu", "sub", "relu#1", "add")]
NAMES += ["Net-matmul", "Net-softmax", "Net-mean", "Net-mul"]
MODULES = ["stem", "blocks.0.conv", "blocks.0.act", "blocks.1.conv", "blocks.1.act"]


@pytest.mark.parametrize("inplace", [False, True])
def test_operations_are_named_by_the_running_module_and_a_count(inplace):
    result = evaluate(Net(inplace).double(), IMAGES, TURNS, operations=True, progress=False)
    assert set(result.layers) == {*NAMES, *MODULES}
    assert result.left_out == {}
    assert result.channel_axis["blocks.0-add"] == 0


def test_patterns_choose_them_without_the_flag():
    result = evaluate(Net(), IMAGES.float(), TURNS, layers=["blocks.*-add", "stem"], progress=False)
    assert result.layers == ["stem", "blocks.0-add", "blocks.1-add"]
    assert evaluate(Net(), IMAGES.float(), TURNS, layers="blocks.1/relu#1", progress=False).layers == [
        "blocks.1-relu#1"
    ]
    with pytest.raises(RuntimeError, match=r"'blocks.0-div' to run .*ran are 'stem'"):
        evaluate(Net(), IMAGES.float(), TURNS, layers=["blocks.0-div", "stem"], progress=False)


def test_nothing_of_it_stays_and_modules_have_the_values_they_have_without():
    model = Net().double()
    without = evaluate(model, IMAGES, TURNS, progress=False)
    result = evaluate(model, IMAGES, TURNS, [NormalizedVariance(response=True)], operations=True, progress=False)
    for layer in MODULES:
        assert torch.equal(result["NormalizedVariance"][layer], without["NormalizedVariance"][layer])
    assert set(without.layers) == set(MODULES)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_module_within_which_none_runs_is_a_leaf():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            y = x.flatten(1, 2)
            return y + self.attention(y, y, y)[0]

    leaves = {"attention[0]", "attention[1]"}  # values and weights
    for layers in (None, "att*", nn.Module):
        result = evaluate(Attention().double(), IMAGES, TURNS, layers=layers, progress=False)
        assert set(result.layers) == leaves
        result = evaluate(Attention().double(), IMAGES, TURNS, layers=layers, operations=True, progress=False)
        assert set(result.layers) == {*leaves, "Attention-add"}
    result = evaluate(Attention().double(), IMAGES, TURNS, layers="*-*", progress=False)
    attention = {f"attention-multi_head_attention_forward[{place}]" for place in (0, 1)}
    assert set(result.layers) == {*attention, "Attention-add"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in Attention().modules())


def test_the_output_of_a_measured_module_in_another_shape_is_no_operation():
    class Attention(nn.MultiheadAttention):
        def forward(self, x):  # whose weights are not wanted: the module transposes what the function gives
            return super().forward(x, x, x, need_weights=False)[0]

    class Turned(nn.Module):
        def forward(self, x):
            y = x.exp() + 1
            return y.transpose(1, 2)

    class Half(nn.Module):
        def forward(self, x):
            return x.sin()[:, :1]  # other values than the operation's

    class RealPart(nn.Module):
        def forward(self, x):
            return 2 * torch.fft.fft(x).real

    attention = Attention(8, 2, batch_first=True)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(64, 8), attention, Turned(), Half(), RealPart()).double()
    names = layer_names(model, example=IMAGES[:4], operations=True)
    parts = ["5-fft_fft[real]", "5-fft_fft[imag]"]
    assert names == ["0", "1", "2", "3-exp", "3", "4-sin", "4", *parts, "5"]


def test_a_module_within_which_others_run_is_none():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Flatten()))
    assert evaluate(model, IMAGES.float(), TURNS, progress=False).layers == ["0.0", "0.1"]  # flat is no other value
    assert evaluate(model, IMAGES.float(), TURNS, layers=["0*"], progress=False).layers == ["0.0", "0.1"]


def test_names_are_known_beforehand_with_an_example():
    net = Net().double()
    names = layer_names(net, example=IMAGES[:2], operations=True)
    assert names == evaluate(net, IMAGES, TURNS, operations=True, progress=False).layers
    assert layer_names(net, ["blocks.*-add"], IMAGES[:5]) == ["blocks.0-add", "blocks.1-add"]
    assert layer_names(net, example=IMAGES[:3], forward=lambda model, x: model.stem(x)) == ["stem"]
    with pytest.raises(ValueError, match="`example` with `operations=True`"):
        layer_names(net, operations=True)
    with pytest.raises(ValueError, match=r"at least two inputs, but got \(1, 3, 8, 8\)"):
        layer_names(net, example=IMAGES[:1])


def test_the_monitor_takes_it():
    assert InvarianceMonitor(TURNS, operations=True).options.operations
