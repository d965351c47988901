"""Processes that hold the same data, parts of it, or different data."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_invariance import evaluate, rotations

IMAGES = torch.rand(12, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Stream(IterableDataset):
    """Some images: all of them, or every second."""

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


#: What each process is given, and what must come of it: the number of samples, or an error.
CASES = {
    "stream": (lambda rank: Stream(), {"max_samples": 12}, 12),
    "stream split by rank": (lambda rank: Stream(rank, 2), {"max_samples": 12}, 12),
    "some of a stream split by rank": (lambda rank: DataLoader(Stream(rank, 2), 4), {"max_samples": 7}, 7),
    "other numbers": (lambda rank: IMAGES[: 8 - 2 * rank], {}, "on every process, but they have [8, 6] samples"),
    "other samples": (lambda rank: IMAGES[6 * rank : 6 * rank + 6], {}, "but their first samples differ"),
    "none on one": (lambda rank: IMAGES[: 6 * rank], {}, "it is empty"),
    "bfloat16": (lambda rank: Half(), {}, 12),
    "random": (lambda rank: Noisy(), {}, 12),
}


def in_process(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    found = {}
    for name, (data, options, _) in CASES.items():
        try:
            model = network().bfloat16() if name == "bfloat16" else network()
            result = evaluate(model, data(rank), rotations(4), batch_size=8, progress=False, **options)
            found[name] = (result.n_samples, result["NormalizedVariance"]["0"])
        except (ValueError, RuntimeError) as error:
            found[name] = (str(error), None)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(in_process, (2, str(folder)), 2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


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
