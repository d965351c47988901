"""A network is as before after an evaluation, and values do not depend on what it remembers between forward passes."""

import copy
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightnings import pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_invariance import InvarianceMonitor, TransformationSet, evaluate

GAINS = TransformationSet.from_callables({"same": lambda x: x, "half": lambda x: 0.5 * x, "twice": lambda x: 2 * x})
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def nv(network, **options):
    result = evaluate(network, X, GAINS, progress=False, **options)
    return result["NormalizedVariance"], result.left_out


def around(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), middle, nn.Linear(12, 3))


class Holder:
    n = 0


@dataclass(slots=True)
class Slots:
    n: int = 0


def more(owner, name):
    """Add 1 to an attribute; return the number before."""
    before = getattr(owner, name, 0)
    setattr(owner, name, before + 1)
    return before


def more_in(container, key=0):
    """Add 1 to an item; return the number before."""
    container[key] += 1
    return container[key] - 1


def longer(items):
    """Append to a list or deque; return the length before."""
    items.append(0)
    return len(items) - 1


def trained(owner):
    with torch.enable_grad():
        (owner.weight - 3).square().backward()
    owner.optimizer.step()
    return 1000 * float(owner.weight.detach())


#: Where a module may keep a number between passes → how it counts one more pass; each returns the number before.
PLACES = {
    "attribute": lambda m: more(m, "number"),
    "new attribute": lambda m: more(m, "later"),
    "class": lambda m: more(type(m), "of_class"),
    "object": lambda m: more(m.holder, "n"),
    "slots": lambda m: more(m.slots, "n"),
    "namespace": lambda m: more(m.namespace, "n"),
    "list": lambda m: longer(m.list),
    "deque": lambda m: longer(m.deque),
    "dict": lambda m: more_in(m.dict),
    "nested containers": lambda m: more_in(m.nested["in"][0][0]),
    "closure": lambda m: m.function(),
    "array": lambda m: float(more_in(m.array)),
    "tensor": lambda m: float(more_in(m.tensor)),
    "buffer": lambda m: float(more_in(m.buffer)),
    "data": lambda m: float(m.weight.detach()) + 0 * m.weight.data.add_(1).numel(),
    "metric": lambda m: (float(m.metric.weight), m.metric.update(1.0))[0],
    "metric in a list": lambda m: (float(m.metrics[0].weight), m.metrics[0].update(1.0))[0],
    "hidden module": lambda m: (float(m.hidden[0].num_batches_tracked), m.hidden[0].train()(torch.ones(2, 3)))[0],
    "training": trained,
}


class Remembers(nn.Module):
    """Multiplies by 1 plus the number of earlier passes that it remembers, in one of many places."""

    of_class = 0

    def __init__(self, where):
        super().__init__()
        self.where, self.number, self.list, self.dict, self.deque = where, 0, [], {0: 0}, deque(maxlen=9)
        self.nested, self.array, self.tensor = {"in": [({0: 0},)]}, np.zeros(3), torch.zeros(2)
        self.holder, self.slots, self.namespace = Holder(), Slots(), SimpleNamespace(n=0)
        self.metric, self.metrics, self.hidden = MeanMetric(), [MeanMetric()], [nn.BatchNorm1d(3)]
        self.register_buffer("buffer", torch.zeros(1))
        self.weight = nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.Adam([self.weight])
        calls = []
        self.function = lambda: longer(calls)

    def forward(self, x):
        return torch.tanh(x) * (1 + PLACES[self.where](self))


@pytest.mark.parametrize("where", PLACES)
def test_what_a_network_remembers_is_put_back_after_every_pass(where):
    network = around(Remembers(where))
    attributes, kept = dict(vars(network[1])), copy.deepcopy(network.state_dict())
    found = nv(network, batch_size=32)[0]
    for layer, values in nv(around(nn.Tanh()))[0].items():
        if where != "training" or layer == "0":
            torch.testing.assert_close(found[layer], values, rtol=1e-6, atol=0)
    assert vars(network[1]).keys() == attributes.keys()
    assert all(vars(network[1])[name] is value for name, value in attributes.items())
    assert list(network.state_dict()) == list(kept)
    assert all(torch.equal(value, kept[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert PLACES[where](network[1]) == pytest.approx(1 if where == "training" else 0, abs=1e-3)
    Remembers.of_class = 0


class Leaky(nn.Module):
    """A neuron whose membrane is kept between passes, or begins anew."""

    def __init__(self, keeps):
        super().__init__()
        self.keeps, self.membrane = keeps, torch.zeros(1, 12)

    def forward(self, x):
        membrane = self.membrane if self.membrane.shape == x.shape else torch.zeros_like(x)
        membrane = 0.9 * membrane + x
        if self.keeps:
            self.membrane = membrane
        return (membrane > 0.3).float()


@pytest.mark.parametrize("batch_size", [3, 32, 4096])
def test_a_spiking_neuron_has_the_values_of_one_that_begins_anew(batch_size):
    network = around(Leaky(keeps=True))
    before = network[1].membrane
    expected = nv(around(Leaky(keeps=False)))[0]
    for layer, values in nv(network, batch_size=batch_size)[0].items():
        torch.testing.assert_close(values, expected[layer], rtol=1e-6, atol=0)
    assert network[1].membrane is before


class Ema(nn.Module):
    mean = 0.0

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x - self.mean


class Noise(nn.Module):
    """Noise of a generator of its own."""

    def __init__(self, kind):
        super().__init__()
        make = {"torch": torch.Generator().manual_seed, "numpy": np.random.default_rng}[kind]
        self.generator = make(0)

    def forward(self, x):
        if isinstance(self.generator, torch.Generator):
            return x + torch.randn(x.shape, generator=self.generator)
        return x + torch.from_numpy(self.generator.normal(size=x.shape)).float()


@pytest.mark.filterwarnings("ignore:2 layers are left out")
@pytest.mark.parametrize(
    ("middle", "reason"), [(Ema(), "mixed"), (Noise("torch"), "random"), (Noise("numpy"), "random")]
)
def test_layers_that_mix_samples_or_are_random_are_left_out(middle, reason):
    network, before = around(middle), copy.deepcopy(vars(middle))
    _, left_out = nv(network)
    assert {layer: why.partition(":")[0] for layer, why in left_out.items()} == {"1": reason, "2": reason}
    assert torch.equal(middle(torch.zeros(9, 12)), around(restored(middle, before))[1](torch.zeros(9, 12)))


def restored(module, attributes):
    """Another module with the attributes of before."""
    vars(module).update(attributes)
    return module


class Lora(nn.Linear):
    """Adds a product to its weights in eval mode, and takes it away in train mode."""

    merged = False

    def __init__(self):
        super().__init__(8, 12)
        self.a, self.b = (nn.Parameter(torch.randn(shape) / 9) for shape in ((2, 8), (12, 2)))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self


class Expanded(nn.Module):
    """Makes a filter as a buffer in eval mode, and deletes it in train mode."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))

    def train(self, mode=True):
        if mode and hasattr(self, "filter"):
            del self.filter
        elif not mode and self.training:
            self.register_buffer("filter", 2 * self.weight.detach())
        return super().train(mode)

    def forward(self, x):
        return x @ (2 * self.weight if self.training else self.filter).T


@pytest.mark.parametrize("make", [Lora, Expanded])
@pytest.mark.parametrize("mode", [True, False])
def test_modules_that_do_more_in_train_and_eval_are_as_before(make, mode):
    torch.manual_seed(0)
    network = nn.Sequential(make(), nn.Tanh()).train().train(mode)
    kept = copy.deepcopy(network.state_dict())
    nv(network)
    network.train().eval()
    network.train(mode)
    assert network.state_dict().keys() == kept.keys()
    assert all(torch.allclose(value, kept[name], atol=1e-6) for name, value in network.state_dict().items())


class Sized(nn.Module):
    """Sets a buffer in the first forward pass, in one of many ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        first = {"none": None, "shrunk": torch.ones(40), "data": torch.ones(1)}.get(way, torch.empty(0))
        if way != "registered":
            self.register_buffer("scale", first)

    def forward(self, x):
        largest = x.detach().abs().amax(0)
        if self.way == "resized" and not self.scale.numel():
            self.scale.resize_(x.shape[1]).copy_(largest)
        elif self.way in ("assigned", "none") and (self.scale is None or not self.scale.numel()):
            self.scale = largest
        elif self.way == "registered" and not hasattr(self, "scale"):
            self.register_buffer("scale", largest)
        elif self.way == "shrunk":
            self.scale.resize_(x.shape[1])
        elif self.way == "data":
            self.scale.data = largest
        return x + self.scale.sum()


@pytest.mark.filterwarnings("ignore:.* left out")
@pytest.mark.parametrize("way", ["resized", "assigned", "none", "registered", "shrunk", "data"])
def test_buffers_that_forward_makes_or_resizes_are_as_before(way):
    network = around(Sized(way))
    kept = copy.deepcopy(network.state_dict())
    nv(network)
    after = network.state_dict()
    assert after.keys() == kept.keys()
    assert all(after[name].shape == kept[name].shape and torch.equal(after[name], kept[name]) for name in kept)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc", "to_mkldnn"])
@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_buffers_and_parameters_of_other_layouts(layout, kind):
    class Graph(nn.Module):
        def __init__(self, adjacency):
            super().__init__()
            if kind == "parameter":
                self.adjacency = nn.Parameter(adjacency)
            else:
                self.register_buffer("adjacency", adjacency)

        def forward(self, x):
            a = self.adjacency.to_dense() if self.adjacency.is_mkldnn else self.adjacency
            return torch.tanh((a @ x.T).T)

    dense = (torch.arange(64.0).view(8, 8) % 3 == 0).float()
    expected = nv(nn.Sequential(Graph(dense), nn.Tanh()))[0]
    found = nv(nn.Sequential(Graph(getattr(dense, layout)()), nn.Tanh()))[0]
    for layer, values in expected.items():
        torch.testing.assert_close(found[layer], values, rtol=1e-5, atol=1e-7)


class Logs(pl.LightningModule):
    """Logs, prints and counts in forward."""

    def __init__(self, **how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.net, self.seen = how, nn.Linear(8, 3), MeanMetric()

    def forward(self, x):
        y = self.net(x)
        self.log("spread", y.std(), **self.how)
        self.log_dict({"mean": y.mean()}, **self.how)
        self.seen(y.mean())
        self.print("a forward pass")
        return y

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        self.log("seen", self.seen.compute())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("how", [{}, {"on_step": True, "on_epoch": True}])
def test_nothing_is_logged_or_counted_in_an_evaluation(how, tmp_path, capsys):
    def metrics(*callbacks):
        trainer = pl.Trainer(
            default_root_dir=tmp_path, max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
        )  # fmt: skip
        data = TensorDataset(X, torch.arange(64) % 3)
        trainer.fit(Logs(**how), DataLoader(data, 8), DataLoader(data, 8))
        printed = capsys.readouterr().out.count("a forward pass")
        return {name: float(value) for name, value in trainer.callback_metrics.items()}, printed

    without, printed = metrics()
    found, printed_with = metrics(InvarianceMonitor(GAINS))
    assert {name: found[name] for name in without} == without
    assert printed_with == printed
