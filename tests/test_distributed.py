"""The same values from several processes: uneven shares, and a process that has no sample."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lightning_invariance import evaluate, functional, rotations
from lightning_invariance.measures import NormalizedVariance, SampleVariance, TransformationVariance

SHARES = {2: (slice(0, 9), slice(9, 13)), 3: (slice(0, 9), slice(0, 0), slice(9, 13))}
IMAGES = torch.rand(13, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

CONSTANT_COLUMNS = torch.rand(1, 4, 1, generator=torch.Generator().manual_seed(3)).expand(13, 4, 1)
MEASURES = (
    (NormalizedVariance, functional.normalized_variance),
    (SampleVariance, functional.sample_variance),
    (TransformationVariance, functional.transformation_variance),
)


def cube():
    return torch.randn(13, 4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()


def in_process(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    share = SHARES[world_size][rank]
    found = {}
    for dtype in (torch.float64, torch.float32):
        for measure, _ in MEASURES:
            metric = measure()
            if cube()[share].numel():
                metric.update(cube()[share].to(dtype))
            found[f"{measure.__name__} {dtype}"] = metric.compute()
        constant = NormalizedVariance()
        if cube()[share].numel():
            constant.update(CONSTANT_COLUMNS[share].to(dtype))
        found[f"constant {dtype}"] = constant.compute()
    result = evaluate(model(), IMAGES, rotations(4))
    found["evaluate"] = result["NormalizedVariance"]["3"]
    found["dead"] = result.dead["1"]
    found["n"] = torch.tensor(result.n_samples)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_merge_to_the_definition(tmp_path, world_size):
    mp.start_processes(in_process, (world_size, str(tmp_path)), world_size, start_method="spawn")
    alone = evaluate(model(), IMAGES, rotations(4))
    for rank in range(world_size):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            for measure, definition in MEASURES:
                expected = definition(cube().to(dtype).double())
                torch.testing.assert_close(found[f"{measure.__name__} {dtype}"], expected, rtol=tolerance, atol=0)
            assert found[f"constant {dtype}"].item() == float("inf")
        torch.testing.assert_close(found["evaluate"], alone["NormalizedVariance"]["3"], rtol=1e-9, atol=0)
        assert torch.equal(found["dead"], alone.dead["1"])
        assert found["n"] == 13
