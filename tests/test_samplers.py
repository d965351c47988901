"""Evaluations measure the samples that a DataLoader gives."""

import random

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_invariance import STLoader, TransformationSet

NUMBERS = torch.arange(40.0).view(40, 1)
DATA = TensorDataset(NUMBERS)
SETS = TransformationSet.from_callables({"same": lambda x: x, "half": lambda x: x / 2})


class Pairs(Sampler):
    """A batch sampler that gives the even numbers below 20, two at a time."""

    def __iter__(self):
        return iter([[i, i + 2] for i in range(0, 20, 4)])

    def __len__(self):
        return 5


class Backwards(BatchSampler):
    """A batch sampler of the user's around a sampler, which Lightning makes anew around a distributed one."""

    def __iter__(self):
        return iter([batch[::-1] for batch in super().__iter__()])


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield 0


def wrapped(indices):
    return DistributedSamplerWrapper(SubsetRandomSampler(indices), num_replicas=2, rank=0)


def samples_of(data, **options):
    return [int(x) for block in STLoader(data, SETS, 8, **options) for x in block.inputs[:, 0, 0]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, range(40)),
        ({"shuffle": True}, range(40)),
        ({"sampler": SequentialSampler(DATA)}, range(40)),
        ({"sampler": SubsetRandomSampler(range(10))}, range(10)),
        ({"sampler": [3, 1, 2]}, [1, 2, 3]),
        ({"batch_sampler": Pairs()}, range(0, 20, 2)),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(range(5, 9)), 3, drop_last=False)}, range(5, 9)),
        ({"sampler": DistributedSampler(DATA, 2, 0)}, range(40)),
        ({"batch_sampler": Backwards(DistributedSampler(DATA, 2, 0), 3, drop_last=False)}, range(40)),
        ({"batch_sampler": Backwards(wrapped(range(7)), 3, False)}, range(7)),
        ({"sampler": wrapped(range(7))}, range(7)),
    ],
)
def test_the_samples_come_from_the_sampler(options, expected):
    assert sorted(samples_of(DataLoader(DATA, **options))) == list(expected)
    shares = [samples_of(DataLoader(DATA, **options), rank=rank, world_size=3) for rank in range(3)]
    assert sorted(x for share in shares for x in share) == list(expected)


def test_a_random_sampler_draws_the_same_samples_at_every_call():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    for sampler in (
        RandomSampler(DATA, num_samples=6, generator=generator),
        RandomSampler(DATA, replacement=True, num_samples=30),
        WeightedRandomSampler([0.0] * 20 + [1.0] * 20, 12, generator=generator),
    ):
        found = samples_of(DataLoader(DATA, sampler=sampler))
        assert len(found) == len(sampler)
        generator.manual_seed(99)  # as a training moves on
        torch.manual_seed(99)
        assert samples_of(DataLoader(DATA, sampler=sampler)) == found
        generator.set_state(before)
    assert min(found) >= 20
    assert torch.equal(generator.get_state(), before)


def test_of_a_sampler_without_an_end_the_first_samples_are_taken():
    assert samples_of(DataLoader(DATA, 3, sampler=Endless()), max_samples=7) == [0] * 7
    with pytest.raises(ValueError, match="`max_samples` with an iterable dataset that has no length"):
        samples_of(DataLoader(DATA, sampler=Endless()))


@pytest.mark.parametrize("size", [None, 3])
def test_items_that_are_not_collated_are_shared_once(size):
    class Batches(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return NUMBERS[4 * i : 4 * i + 4]

    sampler = DistributedSamplerWrapper(SequentialSampler(Batches()), num_replicas=2, rank=1)
    loader = DataLoader(Batches(), batch_size=None, sampler=sampler)
    shares = [samples_of(loader, rank=rank, world_size=2, max_samples=size) for rank in range(2)]
    assert sorted(x for share in shares for x in share) == list(range(size or 40))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_passes_see_the_same_random_samples(workers):
    class Noisy(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return NUMBERS[i] + torch.rand(1) + random.random()

    loader = STLoader(DataLoader(Noisy(), num_workers=workers), SETS, 8)

    def one_pass():
        torch.manual_seed(0)
        random.seed(0)
        return torch.cat([block.inputs for block in loader])

    assert torch.equal(one_pass(), one_pass())
