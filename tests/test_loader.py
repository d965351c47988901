"""STLoader: which inputs come in which blocks."""

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_invariance import STLoader, TransformationSet, combine, rotations, scales, translations

NUMBERS = torch.arange(10.0).view(10, 1)


def times(*factors):
    return TransformationSet.from_callables({str(f): (lambda x, f=f: x * f) for f in factors})


class Stream(IterableDataset):
    def __init__(self, n, ragged=False):
        self.n, self.ragged = n, ragged

    def __iter__(self):
        return (torch.full((1 + (i if self.ragged else 0),), float(i)) for i in range(self.n))


class Items:
    def __init__(self, make, n=6):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)


def samples_of(loader):
    return torch.cat([block.inputs[:, 0, 0] for block in loader if block.columns.start == 0]).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 8, 64])
def test_every_cell_comes_once(batch_size):
    loader = STLoader(NUMBERS, times(1, 10, 100), batch_size)
    rows: dict[float, list[float]] = {}
    blocks = 0
    for block in loader:
        blocks += 1
        assert block.inputs.shape[0] * block.inputs.shape[1] <= batch_size
        for row in block.inputs[..., 0].tolist():
            rows.setdefault(round(row[0] / (1, 10, 100)[block.columns.start]), []).extend(row)
    assert blocks == len(loader)
    assert rows == {i: [i, 10 * i, 100 * i] for i in range(10)}


def test_blocks_hold_complete_rows_and_the_last_is_short():
    loader = STLoader(NUMBERS, times(1, 2, 3), batch_size=8)
    assert [tuple(block.inputs.shape) for block in loader] == [(2, 3, 1)] * 5
    assert [len(block.inputs) for block in STLoader(NUMBERS[:9], times(1, 2), batch_size=8)] == [4, 4, 1]


def test_a_row_longer_than_a_batch_comes_in_parts():
    combined = combine(rotations(16), scales(), translations())
    blocks = list(STLoader(torch.rand(2, 1, 4, 4), combined, batch_size=1000))
    assert [(block.columns.start, block.columns.stop) for block in blocks] == 2 * [
        (0, 1000), (1000, 2000), (2000, 3000), (3000, 4000), (4000, 4224)
    ]  # fmt: skip
    whole = torch.cat([block.inputs for block in blocks[:5]], dim=1)
    assert whole.shape == (1, 4224, 1, 4, 4)


def test_max_samples_takes_the_same_samples_whatever_the_batch_size():
    chosen = [samples_of(STLoader(NUMBERS, times(1, 2), size, max_samples=4)) for size in (1, 2, 5, 64)]
    assert chosen == 4 * [chosen[0]]
    assert len(set(chosen[0])) == 4
    assert chosen[0] == samples_of(STLoader(NUMBERS, times(1, 2), max_samples=4))
    assert chosen[0] != samples_of(STLoader(NUMBERS, times(1, 2), max_samples=4, seed=1))
    assert sorted(samples_of(STLoader(NUMBERS, times(1, 2), max_samples=99))) == list(range(10))


def test_max_samples_does_not_take_the_first_class_of_sorted_data():
    data = TensorDataset(torch.rand(1000, 1), torch.arange(10).repeat_interleave(100))
    labels = torch.cat([block.labels for block in STLoader(data, times(1, 2), max_samples=100)])
    assert len(labels) == 100
    assert (labels.bincount(minlength=10) > 2).all()


def test_ranks_share_the_samples():
    shares = [samples_of(STLoader(NUMBERS, times(1, 2), rank=r, world_size=3)) for r in range(3)]
    assert sorted(map(len, shares)) == [3, 3, 4]
    assert sorted(x for share in shares for x in share) == list(range(10))
    shares = [samples_of(STLoader(Stream(10), times(1, 2), 4, max_samples=8, rank=r, world_size=3)) for r in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


@pytest.mark.parametrize(
    ("make", "label"),
    [
        (lambda i: torch.tensor([float(i)]), None),
        (lambda i: (torch.tensor([float(i)]), i % 3), True),
        (lambda i: {"image": torch.tensor([float(i)]), "label": i % 3, "id": torch.zeros(2)}, True),
        (lambda i: {"pixels": torch.tensor([float(i)])}, None),
    ],
)
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: DataLoader(d, batch_size=5, shuffle=True)])
def test_kinds_of_samples(make, label, wrap):
    block = next(iter(STLoader(wrap(Items(make)), times(1, 2))))
    assert sorted(block.inputs[:, 0, 0].tolist()) == list(range(6))
    if label:
        assert torch.equal(block.labels, block.inputs[:, 0, 0].long() % 3)
    else:
        assert block.labels is None


def test_input_fn_picks_x():
    data = Items(lambda i: {"a": torch.zeros(2), "b": torch.tensor([float(i)])})
    assert sorted(samples_of(STLoader(data, times(1, 2), input_fn=lambda batch: batch["b"]))) == list(range(6))


def test_the_collate_fn_of_a_loader_is_kept():
    loader = DataLoader(Items(lambda i: [i]), collate_fn=lambda items: torch.tensor(items, dtype=torch.float32))
    assert sorted(samples_of(STLoader(loader, times(1, 2)))) == list(range(6))


@pytest.mark.parametrize("size", [2, 3, 64])
def test_iterable_datasets_give_their_first_samples(size):
    assert samples_of(STLoader(Stream(9), times(1, 2), size, max_samples=5)) == [0, 1, 2, 3, 4]
    assert samples_of(STLoader(DataLoader(Stream(9), batch_size=4), times(1, 2), size, max_samples=7)) == list(range(7))


def test_loading_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    list(STLoader(DataLoader(TensorDataset(NUMBERS), shuffle=True), times(1, 2)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (NUMBERS[:0], {}, ValueError, "it is empty"),
        (NUMBERS, {"batch_size": 0}, ValueError, "`batch_size` .* but got 0"),
        (NUMBERS, {"max_samples": 0}, ValueError, "`max_samples` .* but got 0"),
        (Stream(3), {}, ValueError, "`max_samples` with an iterable dataset"),
        (DataLoader(Stream(3)), {}, ValueError, "`max_samples` with an iterable dataset"),
        (42, {}, TypeError, "Dataset, a DataLoader or a tensor, but got 42"),
        (Items(lambda i: i), {}, ValueError, "Pick the input with `input_fn`"),
        (
            Items(lambda i: {"a": torch.zeros(2), "b": torch.zeros(3)}),
            {},
            ValueError,
            r"'a': a tensor of shape \(6, 2\)",
        ),
        (Items(lambda i: Image.new("L", (4, 4))), {}, ValueError, "convert images"),
    ],
)
def test_bad_data(data, options, error, message):
    with pytest.raises(error, match=message):
        list(STLoader(data, times(1, 2), **options))


def test_transformations_must_be_a_set():
    with pytest.raises(TypeError, match="from_callables"):
        STLoader(NUMBERS, [torch.neg])
