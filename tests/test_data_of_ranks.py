"""Processes that hold the same data, parts of it, or different data."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_invariance import evaluate, rotations

IMAGES = torch.rand(12, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Stream(IterableDataset):
    """All images, or the share of one of several ranks."""

    def __init__(self, first=0, step=1):
        self.first, self.step = first, step

    def __iter__(self):
        return iter(IMAGES[self.first :: self.step])


class Noisy(Dataset):
    """Random numbers that no seed of torch reaches."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return IMAGES[i] + 1e-9 * torch.rand(1, generator=torch.Generator().manual_seed(torch.seed() % 1000))


class Half(Dataset):
    """Samples of a type that numpy does not have."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return IMAGES[i].bfloat16()


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()).double()


#: Data of each process, arguments of evaluate, and the expected number of samples or error.
CASES = {
    "stream": (lambda rank: Stream(), {"max_samples": 12}, 12),
    "stream split by rank": (lambda rank: Stream(rank, 3), {"max_samples": 12}, 12),
    "some of a stream split by rank": (lambda rank: DataLoader(Stream(rank, 3), 4), {"max_samples": 7}, 7),
    "other numbers": (lambda rank: IMAGES[: 8 - 2 * rank], {}, "on every process, but they have [8, 6, 4] samples"),
    "other samples": (lambda rank: IMAGES[4 * rank : 4 * rank + 4], {}, "but their first samples differ"),
    "none on one": (lambda rank: IMAGES[: 6 * rank], {}, "it is empty"),
    "bfloat16": (lambda rank: Half(), {}, 12),
    "random": (lambda rank: Noisy(), {}, 12),
}


def on_a_rank():
    found = {}
    for name, (data, options, _) in CASES.items():
        try:
            model = network().bfloat16() if name == "bfloat16" else network()
            result = evaluate(model, data(dist.get_rank()), rotations(4), batch_size=8, progress=False, **options)
            found[name] = (result.n_samples, result["NormalizedVariance"]["0"])
        except (ValueError, RuntimeError) as error:
            found[name] = (str(error), None)
    return found


@pytest.fixture(scope="module")
def found(ranks):
    return ranks(on_a_rank)


@pytest.mark.parametrize("case", CASES)
def test_every_sample_counts_once_or_all_processes_end_with_an_error(found, case):
    expected = CASES[case][2]
    for told, values in (each[case] for each in found):
        if isinstance(expected, str):
            assert expected in told
            assert values is None
        else:
            assert told == expected
    if case in ("stream", "stream split by rank"):
        alone = evaluate(network(), TensorDataset(IMAGES), rotations(4), progress=False)["NormalizedVariance"]["0"]
        for each in found:
            torch.testing.assert_close(each[case][1], alone, rtol=1e-9, atol=1e-12)
