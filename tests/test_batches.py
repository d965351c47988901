"""Models that need several entries of a batch: `forward(model, x, batch)`."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from lightnings import pl
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from trainings import trainer_of

from lightning_invariance import InvarianceMonitor, TransformationSet, evaluate, functional

N = 11
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SCALE = torch.rand(N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NAMES = ["a" * (i % 4) for i in range(N)]
SETS = TransformationSet.from_callables({str(k): partial(lambda x, k: x * (1 + k / 3) - k, k=k) for k in range(4)})


class TwoInputs(nn.Module):
    """Needs a scale, and the length of a text, for each x."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4).double()
        self.seen = nn.Identity()

    def forward(self, x, scale, names, shift=None):
        assert len(x) == len(scale) == len(names)
        lengths = torch.tensor([float(len(name)) for name in names], dtype=x.dtype)
        y = self.linear(x * scale) + lengths[:, None]
        return self.seen(y if shift is None else y + shift)


@dataclass
class Item:
    x: torch.Tensor
    scale: torch.Tensor
    name: str


class Pair(NamedTuple):
    x: torch.Tensor
    rest: tuple


class Data(Dataset):
    def __init__(self, form):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {
            "dict": lambda: {"x": X[i], "scale": SCALE[i], "name": NAMES[i]},
            "tuple": lambda: (X[i], SCALE[i], NAMES[i]),
            "nested": lambda: ({"x": X[i], "inner": [SCALE[i], NAMES[i]]}, torch.tensor(i)),
            "named": lambda: Pair(X[i], (SCALE[i], NAMES[i])),
            "dataclass": lambda: Item(X[i], SCALE[i], NAMES[i]),
        }[self.form]()


def of_items(items):
    return Item(torch.stack([i.x for i in items]), torch.stack([i.scale for i in items]), [i.name for i in items])


FORWARDS = {
    "dict": lambda model, x, batch: model(**{"x": x, "scale": batch["scale"], "names": batch["name"]}),
    "tuple": lambda model, x, batch: model(x, batch[1], batch[2]),
    "nested": lambda model, x, batch: model(x, *batch[0]["inner"]),
    "named": lambda model, x, batch: model(x, *batch.rest),
    "dataclass": lambda model, x, batch: model(x, batch.scale, batch.name),
}
INPUTS = {"nested": lambda batch: batch[0]["x"], "dataclass": lambda batch: batch.x}


def expected():
    """The definition on the cube of a model that is called for every sample and transformation by itself."""
    model = TwoInputs()
    x = SETS(X)
    with torch.no_grad():
        rows = [[model(x[i, j : j + 1], SCALE[i : i + 1], [NAMES[i]])[0] for j in range(4)] for i in range(N)]
    return functional.normalized_variance(torch.stack([torch.stack(row) for row in rows]))


@pytest.mark.parametrize("batch_size", [3, 8, 12, 64])
@pytest.mark.parametrize("form", FORWARDS)
def test_every_entry_goes_with_its_sample(form, batch_size):
    data = Data(form)
    if form == "dataclass":
        data = DataLoader(data, collate_fn=of_items)
    found = evaluate(
        TwoInputs(),
        data,
        SETS,
        forward=FORWARDS[form],
        input_fn=INPUTS.get(form),
        batch_size=batch_size,
        progress=False,
    )
    torch.testing.assert_close(found["NormalizedVariance"]["seen"], expected(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4, N])
def test_batches_that_end_within_a_block_are_joined(size):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([Data("nested")[i] for i in range(N)])

    loader = DataLoader(Stream(), batch_size=size)
    options = {"forward": FORWARDS["nested"], "input_fn": INPUTS["nested"], "max_samples": N, "progress": False}
    found = evaluate(TwoInputs(), loader, SETS, batch_size=12, **options)
    torch.testing.assert_close(found["NormalizedVariance"]["seen"], expected(), rtol=1e-9, atol=1e-12)


def test_entries_of_a_batch_that_belong_to_no_sample_stay():
    shift = torch.ones(4, dtype=torch.float64)

    def collated(items):
        return {"x": X[: len(items)], "scale": SCALE[: len(items)], "names": NAMES[: len(items)], "shift": shift}

    seen = []

    def forward(model, x, batch):
        seen.append(batch["shift"])
        return model(**{**batch, "x": x})

    evaluate(TwoInputs(), DataLoader(Data("dict"), collate_fn=collated), SETS, forward=forward, progress=False)
    assert all(torch.equal(each, shift) for each in seen)


def test_two_arguments_and_defaults_get_no_batch():
    scale = torch.ones(3, dtype=torch.float64)

    def closed_over(model, x, scale=scale):
        assert scale.shape == (3,)
        return model(x, scale.expand(len(x), 3), [""] * len(x))

    with_default = evaluate(TwoInputs(), X, SETS, forward=closed_over, progress=False)
    bound = partial(lambda scale, model, x: closed_over(model, x, scale), scale)
    as_partial = evaluate(TwoInputs(), X, SETS, forward=bound, progress=False)
    assert torch.equal(with_default["NormalizedVariance"]["seen"], as_partial["NormalizedVariance"]["seen"])


@pytest.mark.parametrize("state_budget", [640, None])
def test_rows_longer_than_a_batch_and_large_sets(state_budget):
    found = evaluate(
        TwoInputs(), Data("tuple"), SETS, forward=FORWARDS["tuple"], batch_size=3, state_budget=state_budget,
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(found["NormalizedVariance"]["seen"], expected(), rtol=1e-9, atol=1e-12)


def test_the_monitor_passes_it_on_in_the_precision_of_the_trainer(tmp_path):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = TwoInputs()

        def forward(self, x, scale, names):
            assert x.dtype == scale.dtype == torch.float32
            return self.net(x, scale, names)

        def training_step(self, batch, _):
            return self.net(*batch).square().mean()

        def validation_step(self, batch, _):
            self.log("val_loss", self.net(*batch).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    monitor = InvarianceMonitor(SETS, forward=FORWARDS["tuple"])
    trainer, model = trainer_of(tmp_path, monitor, precision="32-true"), Module().float()
    data = [(X[i].float(), SCALE[i].float(), NAMES[i]) for i in range(N)]
    trainer.fit(model, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4))
    assert len(monitor.history) == 2
    torch.testing.assert_close(monitor.history[0]["NormalizedVariance"]["net.seen"], expected(), rtol=1e-4, atol=1e-5)


def test_an_error_of_forward_says_that_there_is_more_of_the_batch():
    with pytest.raises(TypeError, match=r"missing 2 required.*\n.*forward=lambda model, x, batch"):
        evaluate(TwoInputs(), X, SETS, progress=False)
