"""Loaders with batches of their own, outputs that cannot be measured, and numbers that depended on the batch size."""

import random
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from lightnings import pl
from torch import nn
from torch.func import vmap
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from lightning_invariance import InvarianceMonitor, STLoader, TransformationSet, evaluate, rotations
from lightning_invariance.measures import (
    Anova,
    Goodfellow,
    IntraclassCorrelation,
    MainEffect,
    NormalizedDistance,
    NormalizedVariance,
)

GAINS = TransformationSet.from_callables({"same": lambda x: x, "half": lambda x: 0.5 * x, "shifted": lambda x: x + 1})
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, torch.arange(64) % 3)
FAR = TensorDataset(100 + 50 * X, DATA.tensors[1])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))


def assert_same_values(found, expected, rtol=1e-5):
    assert list(found["NormalizedVariance"]) == list(expected["NormalizedVariance"])
    for layer, values in expected["NormalizedVariance"].items():
        torch.testing.assert_close(found["NormalizedVariance"][layer], values, rtol=rtol, atol=0)


class Normalising(DataLoader):
    """A loader that changes its batches."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield (x - 100) / 50, y


class Wrapper:
    """Any object that can be iterated, around a loader."""

    def __init__(self, loader, change=lambda x: x):
        self.loader, self.change = loader, change

    def __iter__(self):
        for x, y in self.loader:
            yield self.change(x), y

    def __len__(self):
        return len(self.loader)


class Stream(IterableDataset):
    """Says that it is a dataset, and gives batches."""

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(DataLoader(DATA, 8))


class Repeating(BatchSampler):
    """Never ends, so that workers stay, but has a length."""

    def __iter__(self):
        while True:
            yield from super().__iter__()


class WithGaps(Dataset):
    """Samples of which some are None."""

    def __init__(self, first):
        self.first = first

    def __len__(self):
        return 64 + self.first

    def __getitem__(self, i):
        return None if i < self.first else DATA[i - self.first]


LOADERS = {
    "overrides __iter__": lambda: Normalising(FAR, 8),
    "wrapper": lambda: Wrapper(DataLoader(FAR, 8), lambda x: (x - 100) / 50),
    "list of batches": lambda: list(DataLoader(DATA, 8)),
    "batches that say they are a dataset": Stream,
    "batch sampler without an end": lambda: DataLoader(
        DATA, batch_sampler=Repeating(SequentialSampler(DATA), 8, False)
    ),
    "items are batches": lambda: DataLoader(
        DATA, sampler=BatchSampler(SequentialSampler(DATA), 8, False), batch_size=None
    ),
    "some are None": lambda: WithGaps(9),
    "None batches": lambda: [*DataLoader(DATA, 8), None],
}


@pytest.mark.filterwarnings("ignore:.* of the data (is|are) missing")
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("confidence", [None, 0.95])
def test_the_batches_of_a_loader_are_measured_as_they_are(kind, confidence):
    result = evaluate(network(), LOADERS[kind](), GAINS, confidence=confidence, progress=False)
    assert result.n_samples == 64
    assert result.n_skipped == {"some are None": 9, "None batches": 1}.get(kind, 0)
    assert_same_values(result, evaluate(network(), DATA, GAINS, progress=False))


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        x, y = (batch["a"][0], batch["a"][1]) if isinstance(batch, dict) else batch
        self.log("loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class OfJointBatches(Net):
    def on_after_batch_transfer(self, batch, _):
        return batch if self.trainer.training else {**batch, "x": batch["a"][0] + 0 * batch["b"][0].sum()}


def fit(tmp_path, val, monitor, net=None, **options):
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[monitor],
        enable_progress_bar=False, enable_model_summary=False, **{"max_epochs": 1, **options},
    )  # fmt: skip
    trainer.fit(net or Net(), DataLoader(DATA, 8), val)
    return monitor.history


@pytest.mark.parametrize("kind", ["wrapper", "batches that say they are a dataset", "joint batches"])
def test_a_monitor_measures_the_batches_of_the_validation(kind, tmp_path):
    joint = CombinedLoader({"a": DataLoader(DATA, 8), "b": DataLoader(DATA, 16)}, "max_size_cycle")
    val, net = (joint, OfJointBatches()) if kind == "joint batches" else (LOADERS[kind](), Net())
    result = fit(tmp_path, val, InvarianceMonitor(GAINS), net)[-1]
    assert result.n_samples == 64
    expected = evaluate(nn.ModuleDict({"net": network()})["net"], DATA, GAINS, progress=False)
    for layer, values in expected["NormalizedVariance"].items():
        torch.testing.assert_close(result["NormalizedVariance"][f"net.{layer}"], values, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("every", "number"), [(1, 11), (2, 6), (3, 5)])
def test_validations_count_where_an_epoch_has_many(every, number, tmp_path):
    options = {"max_epochs": -1, "max_steps": 40, "check_val_every_n_epoch": None, "val_check_interval": 4}
    history = fit(tmp_path, DataLoader(DATA, 64), InvarianceMonitor(GAINS, every_n_epochs=every), **options)
    assert len(history) == number


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        there = (tokens > 0)[..., None]
        return self.head((self.embedding(tokens) * there).sum(1) / there.sum(1))


NEXT = TransformationSet.from_callables({"same": lambda t: t, "next": lambda t: torch.where(t > 0, t % 49 + 1, t)})


@pytest.mark.filterwarnings("ignore:1 layer is left out")
def test_layers_after_pooling_are_measured_where_batches_are_padded():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 50, (5 + k % 20,), generator=generator) for k in range(64)]
    batches = [pad_sequence(texts[i : i + 8], batch_first=True) for i in range(0, 64, 8)]
    whole = pad_sequence(texts, batch_first=True)
    result = evaluate(Padded(), Wrapper([(batch, None) for batch in batches]), NEXT, progress=False)
    expected = evaluate(Padded(), whole, NEXT, layers="head", progress=False)
    assert_same_values(result, expected)
    assert result.left_out == {
        "embedding": "ragged: the length of the output varies between samples (axis 0: 12 and 20)"
    }
    with pytest.raises(RuntimeError, match=r"all were left out: 1 ragged .* \(axis 0: 12 and 20\)"):
        evaluate(nn.Sequential(nn.Embedding(50, 8)), Wrapper([(b, None) for b in batches]), NEXT, progress=False)


@pytest.mark.filterwarnings("ignore:.* left out")
def test_layers_of_one_size_are_measured_for_images_of_several_sizes():
    images = [torch.rand(1, 8 + i % 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(24)]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    turns = rotations(4)
    result = evaluate(net, DataLoader(images, 1), turns, progress=False)
    with torch.no_grad():
        st = torch.stack([net(turns(image[None])[0]) for image in images]).double()
    assert (result.n_samples, list(result.left_out)) == (24, ["2", "0"])  # the second is flat already
    nv = st.var(1).mean(0) / st.var(0).mean(0)
    torch.testing.assert_close(result["NormalizedVariance"]["3"], nv, rtol=1e-4, atol=0)


class Gathers(nn.Module):
    """Subtracts a mean over all processes, so that a forward pass waits for the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        here = self.first(x)
        dist.all_reduce(torch.ones(1))
        return self.second(here)


def on_ranks_that_wait(sizes):
    data = X[: sizes[0]] if len(sizes) == 1 else Wrapper(list(DataLoader(DATA, 4))[sizes[dist.get_rank()]])
    if len(sizes) == 1:
        return evaluate(Gathers(), data, GAINS, batch_size=12, progress=False)["NormalizedVariance"]["second"]
    result = evaluate(Gathers(), data, GAINS, batch_size=12, max_samples=None, progress=False)
    return result["NormalizedVariance"]["second"]


@pytest.mark.parametrize(
    ("sizes", "samples"),
    [((14,), slice(0, 14)), ((2,), slice(0, 2)), ((slice(0, 5), slice(5, 6), slice(6, 16)), slice(0, 64))],
)
def test_ranks_with_fewer_blocks_keep_up_with_the_others(ranks, sizes, samples):
    class Alone(Gathers):
        def forward(self, x):
            return self.second(self.first(x))

    expected = evaluate(Alone(), X[samples], GAINS, progress=False)["NormalizedVariance"]["second"]
    for found in ranks(on_ranks_that_wait, sizes):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


UNMEASURED = {
    "nested": lambda x: torch.nested.nested_tensor([row[:3] for row in x]),
    "sparse": lambda x: x.to_sparse(),
    "masked": lambda x: torch.masked.masked_tensor(x, x > 0),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore:.* left out", "ignore:.*prototype", "ignore:.*MaskedTensors")
@pytest.mark.parametrize("kind", UNMEASURED)
def test_outputs_that_cannot_be_measured_are_left_out_with_the_reason(kind):
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.aside = network(), Returns(UNMEASURED[kind])

        def forward(self, x):
            self.aside(x)
            return self.net(x)

    result = evaluate(Aside(), X, GAINS, progress=False)
    assert {layer: why.partition(":")[0] for layer, why in result.left_out.items()} == {"aside": kind}
    assert len(result["NormalizedVariance"]) == 3


@pytest.mark.filterwarnings("ignore:3 layers are left out")
def test_modules_inside_vmap_are_left_out_and_others_measured():
    class PerSample(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = network(), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(vmap(self.net)(x))

    result = evaluate(PerSample(), X, GAINS, progress=False)
    assert list(result["NormalizedVariance"]) == ["head"]
    assert {why.partition(":")[0] for why in result.left_out.values()} == {"transformed"}


@pytest.mark.filterwarnings("ignore:.* left out", "ignore:`torch.jit")
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.freeze(torch.jit.script(net.eval()))])
def test_a_scripted_part_does_not_hinder_the_rest(make):
    model = nn.Sequential(make(network()), nn.Linear(3, 2))
    result = evaluate(model, X, GAINS, progress=False)
    assert list(result["NormalizedVariance"]) == ["1"]
    assert {why.partition(":")[0] for why in result.left_out.values()} == {"scripted"}


def test_messages_name_the_transformation_and_gradients():
    broken = TransformationSet.from_callables({"same": lambda x: x, "crop": lambda x: x[:, :, 99]})
    with pytest.raises(RuntimeError, match=r"transformation 'crop' to transform a batch \(1, 8\) .* raised IndexError"):
        evaluate(network(), X, broken, progress=False)
    needs_gradients = Returns(lambda x: torch.autograd.grad(x.square().sum(), x)[0])
    with pytest.raises(RuntimeError, match=r"needs gradients in forward.*torch.enable_grad.*requires_grad_.*forward="):
        evaluate(nn.Sequential(nn.Linear(8, 8), needs_gradients), X, GAINS, progress=False)


def rarely_firing_units(n=512, k=2048):
    """A ReLU layer of which every unit fires for few samples, some for the first one, at values that no float holds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, k, generator=generator) + 0.3 * torch.randn(n, 4, k, generator=generator) - 2.5
    x[0, :, : k // 2] += 3
    return x.relu()


def nv_of(x):
    x = x.double()
    tv, sv = x.var(1).mean(0), x.var(0).mean(0)
    return torch.where((tv == 0) & (sv == 0), 1.0, tv / sv)


FIRST = torch.zeros(128, 2, 1024)
FIRST[0, 0] = 0.3
OUTLIER = torch.randn(512, 2, 4096, generator=torch.Generator().manual_seed(0))
OUTLIER[0] += 100


@pytest.mark.parametrize("size", [1, 2, 7, 8, 33, 128, 512])
@pytest.mark.parametrize("x", [rarely_firing_units(), FIRST, OUTLIER], ids=["rare", "first", "outlier"])
def test_units_that_few_samples_fire_have_one_value_for_all_batch_sizes(x, size):
    measure = NormalizedVariance()
    for block in x.split(size):
        measure.update(block)
    torch.testing.assert_close(measure.compute(), nv_of(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_components_of_units_that_only_the_transformation_moves(dtype):
    x = torch.rand(1, 3, 4, dtype=dtype, generator=torch.Generator().manual_seed(0)).expand(130, 3, 4)
    for measure, value in ((IntraclassCorrelation(), torch.nan), (MainEffect(), 1.0)):
        assert torch.equal(measure(x).nan_to_num(9), torch.full((4,), value, dtype=torch.float64).nan_to_num(9))
    own = torch.rand(130, 3, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    far = own + torch.tensor([0, 1e8 if dtype == torch.float64 else 1e4, 0])[None, :, None].to(dtype)
    rounded = far.double() - torch.tensor([0, 1e8 if dtype == torch.float64 else 1e4, 0])[None, :, None].double()
    torch.testing.assert_close(IntraclassCorrelation()(far), IntraclassCorrelation()(rounded), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("place", [(1, 1), (0, 0), (3, 0)])
def test_nan_anywhere_makes_the_quantile_of_a_unit_nan(place):
    st = torch.tensor([[9.0, 8.0], [1.0, 2.0], [0.0, 3.0], [4.0, 1.0]])
    st[place] = torch.nan
    assert Goodfellow(alpha=0.25, threshold="quantile")(st).isnan()


def test_a_value_of_shape_1_keeps_its_shape():
    measure = NormalizedVariance()
    assert measure(torch.rand(5, 3, 1)).shape == measure.compute().shape == (1,)
    assert NormalizedVariance()(torch.rand(5, 3)).shape == ()


@pytest.mark.filterwarnings("ignore:1 layer is left out")
def test_a_layer_that_depends_on_the_batch_by_less_than_rounding_may_is_left_out():
    class Adaptive(nn.Module):
        def forward(self, x):  # like the step sizes of a solver
            return x * (1 + 3e-4 * x.mean())

    result = evaluate(nn.Sequential(nn.Linear(8, 8), Adaptive()), X, GAINS, progress=False)
    assert {layer: why.partition(":")[0] for layer, why in result.left_out.items()} == {"1": "mixed"}


def test_f_of_units_that_hardly_vary_beside_their_mean_is_exact():
    x = 0.5 + 1e-13 * torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for unit, f in enumerate(Anova(statistic="f")(x).tolist()):
        cells = [[Fraction(float(x[i, j, unit])) for i in range(6)] for j in range(4)]
        means = [sum(column) / 6 for column in cells]
        between = 6 * sum((mean - sum(means) / 4) ** 2 for mean in means) / 3
        within = sum((cell - mean) ** 2 for column, mean in zip(cells, means, strict=True) for cell in column) / 20
        assert f == pytest.approx(float(between / within), rel=1e-12)


class Noisy(Dataset):
    """Samples with noise of a generator of its own, in one of several places."""

    def __init__(self, kind):
        torch_generator, numpy_generator = torch.Generator().manual_seed(0), np.random.default_rng(0)
        python_generator = random.Random(0)
        self.draw = {
            "torch": lambda: torch.rand(1, generator=torch_generator),
            "numpy": lambda g=numpy_generator: torch.tensor([g.random()], dtype=torch.float32),
            "python": partial(lambda g: torch.tensor([g.random()]), python_generator),
        }[kind]

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return X[i] + self.draw()


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_generators_of_a_dataset_are_put_back(kind):
    one, other = Noisy(kind), Noisy(kind)
    evaluate(network(), one, GAINS, progress=False)
    evaluate(network(), DataLoader(one, batch_sampler=[[0, 1], [2, 3]]), GAINS, progress=False)
    assert torch.equal(one.draw(), other.draw())


def test_later_batches_of_a_random_dataset_draw_other_numbers_than_the_first():
    batches = DataLoader(Noisy("torch"), batch_sampler=[[0, 1], [2, 3], [0, 1]])
    x = torch.cat([block.inputs[:, 0] for block in STLoader(batches, GAINS, 64)])
    noise = x[:, 0] - X[[0, 1, 2, 3, 0, 1], 0]
    assert len(set(noise.tolist())) == 6


def test_an_image_with_as_many_targets_as_channels_is_a_sample():
    images = [(torch.rand(3, 8, 8), torch.tensor([0, 1, 1])) for _ in range(6)]
    assert [len(block.inputs) for block in STLoader(images, rotations(2), 64)] == [6]


def test_what_can_be_iterated_only_once_is_refused():
    with pytest.raises(TypeError, match="can be iterated only once: give a list"):
        evaluate(network(), iter(DataLoader(DATA, 8)), GAINS, max_samples=16)


def test_sums_are_not_taken_in_the_precision_of_autocast():
    measure = NormalizedDistance("euclidean", over="channel")
    maps, net = 1 + 0.3 * torch.randn(32, 5, 4, 4, generator=torch.Generator().manual_seed(0)), nn.Sequential(nn.Tanh())
    expected = evaluate(net, maps, GAINS, measure, progress=False)["NormalizedDistance"]["0"]
    with torch.autocast("cpu", torch.bfloat16):
        around = evaluate(net, maps, GAINS, measure, progress=False)["NormalizedDistance"]["0"]
    torch.testing.assert_close(around, expected, rtol=1e-6, atol=0)


def test_weights_that_are_loaded_for_a_forward_pass_may_be_on_meta():
    model, weight = network(), network()[0].weight
    model[0]._hf_hook = object()  # as accelerate marks modules
    model[0].weight = nn.Parameter(weight.detach().to("meta"))
    model[0].forward = lambda x: nn.functional.linear(x, weight, model[0].bias)
    assert_same_values(evaluate(model, X, GAINS, progress=False), evaluate(network(), X, GAINS, progress=False), 1e-6)
    del model[0]._hf_hook
    with pytest.raises(ValueError, match="on the meta device: load weights first"):
        evaluate(model, X, GAINS, progress=False)
