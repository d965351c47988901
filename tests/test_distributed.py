"""Several processes have the values of one: with uneven shares, without samples on a process, and after an error."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import TensorDataset

from lightning_invariance import evaluate, functional, rotations
from lightning_invariance.measures import (
    Anova,
    DistanceSameEquivariance,
    Goodfellow,
    NormalizedDistance,
    NormalizedVariance,
    SampleDistance,
    SampleVariance,
    Stratified,
    TransformationDistance,
    TransformationVariance,
    VarianceSameEquivariance,
)

#: Which rows each rank adds: one has none, first or among the others.
SHARES = [(slice(0, 9), slice(0, 0), slice(9, 13)), (slice(0, 0), slice(0, 6), slice(6, 13))]
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(13, 2, 6, 6, generator=GENERATOR, dtype=torch.float64)
CUBE = torch.randn(13, 4, 3, 2, generator=GENERATOR, dtype=torch.float64)
CONSTANT_COLUMNS = torch.rand(1, 4, 1, generator=GENERATOR).expand(13, 4, 1)

BY_HAND = {
    "NV": (NormalizedVariance, functional.normalized_variance),
    "SV": (SampleVariance, functional.sample_variance),
    "TV": (TransformationVariance, functional.transformation_variance),
    "ND": (NormalizedDistance, functional.normalized_distance),
    "F": (lambda: Anova("f"), lambda st: functional.anova(st)[0]),
}


def every_measure():
    return {
        "TV": TransformationVariance(),
        "SV": SampleVariance(),
        "NV": NormalizedVariance(response=True),
        "std": NormalizedVariance(squared=False),
        "TD": TransformationDistance(),
        "SD": SampleDistance(samples=3),
        "ND": NormalizedDistance(samples=3),
        "F": Anova("f", paired=True),
        "Goodfellow": Goodfellow(0.1),
        "twice": Goodfellow(0.1, capacity=2, sign="best"),
        "quantile": Goodfellow(0.2, threshold="quantile"),
        "VSE": VarianceSameEquivariance(mask=True),
        "DSE": DistanceSameEquivariance(normalized_by="samples"),
        "Stratified": Stratified(NormalizedVariance(), 2),
    }


def model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)).double()


def everything(n):
    data = TensorDataset(IMAGES[:n], torch.arange(n) % 2)
    result = evaluate(model(), data, rotations(4), every_measure(), batch_size=8)
    values = {f"{name}/{layer}": value for name in result for layer, value in result[name].items()}
    values["two walks"] = evaluate(model(), data, rotations(4), state_budget=12_000)["NormalizedVariance"]["3"]
    floor = {f"floor/{name}": value for name, value in result.floor.items()}
    response = {f"response/{layer}": torch.tensor(parts) for layer, parts in result.response["NV"].items()}
    return {**values, **floor, **response, "dead": result.dead["1"], "n": torch.tensor(result.n_samples)}


@contextmanager
def counted_messages():
    """Sizes in bytes of the tensors that this process sends."""
    sent, send = [], dist.send

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return send(tensor, *args, **kwargs)

    dist.send = counting
    try:
        yield sent
    finally:
        dist.send = send


def computed(metric, rows):
    if len(rows):
        metric.update(rows)
    return metric.compute()


def added_by_hand(shares, dtype):
    share = shares[dist.get_rank()]
    found = {name: computed(make(), CUBE[share].to(dtype)) for name, (make, _) in BY_HAND.items()}
    return {**found, "constant": computed(NormalizedVariance(), CONSTANT_COLUMNS[share].to(dtype))}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shares", SHARES)
def test_metrics_of_ranks_merge_to_the_definition(shares, dtype, tolerance, ranks):
    for found in ranks(added_by_hand, shares, dtype):
        for name, (_, definition) in BY_HAND.items():
            torch.testing.assert_close(found[name], definition(CUBE.to(dtype).double()), rtol=tolerance, atol=0)
        assert found["constant"].item() == float("inf")


def messages_and_values():
    found, numbers = {}, []
    for network in (model(), nn.Sequential(*model(), *(nn.ELU() for _ in range(20)))):
        with counted_messages() as sent:
            result = evaluate(network, TensorDataset(IMAGES, torch.arange(13) % 2), rotations(4), every_measure())
        numbers.append((len(sent), len(result.layers)))
    found["messages"] = numbers
    with counted_messages() as sent:
        evaluate(model(), IMAGES, rotations(4))
    found["variance bytes"] = sum(sent)
    found["all"] = everything(13)
    found["few"] = everything(2)  # fewer than processes
    return found


@pytest.mark.filterwarnings("ignore:NaN")
@pytest.mark.filterwarnings("ignore:Stratified")
def test_ranks_merge_to_the_definition(ranks):
    alone = {"all": everything(13), "few": everything(2)}
    for rank, found in enumerate(ranks(messages_and_values)):
        # A header and a message to each neighbour in the chain, in each of the two passes of "twice", for any depth.
        neighbours = 1 if rank in (0, 2) else 2
        assert found["messages"] == [(2 * 2 * neighbours, 3), (2 * 2 * neighbours, 23)]
        activations = 48 + 48 + 4
        assert found["variance bytes"] < 2 * 1.5 * activations * (2 * 4 + 2) * 8  # states of m = 4 in float64
        for case, expected in alone.items():
            assert list(found[case]) == list(expected)
            for name, value in expected.items():
                torch.testing.assert_close(found[case][name], value, rtol=1e-9, atol=0, equal_nan=True, msg=name)


def fail_in_process(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)

    def forward(network, x):
        if rank == 1:
            raise ArithmeticError("a bad batch")
        return network(x)

    try:
        evaluate(model(), IMAGES, rotations(4), forward=forward)
    except Exception as error:
        torch.save(f"{type(error).__name__}: {error}", f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_an_error_on_one_process_ends_all_of_them(tmp_path):
    mp.start_processes(fail_in_process, (3, str(tmp_path)), 3, start_method="forkserver")
    told = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    assert told[1] == "ArithmeticError: a bad batch"
    assert told[0] == told[2]
    assert told[0].startswith("RuntimeError: ")
    assert "rank 1 failed: ArithmeticError('a bad batch')" in told[0]


def out_of_memory_on_rank_1(batch_size):
    def forward(network, x):
        if dist.get_rank() == 1 and len(x) > 8:
            raise torch.OutOfMemoryError("too large")
        return network(x)

    try:
        result = evaluate(model(), IMAGES, rotations(4), forward=forward, batch_size=batch_size)
    except torch.OutOfMemoryError as error:
        return str(error)
    return result["NormalizedVariance"]["3"]


def test_all_processes_take_smaller_batches_where_one_runs_out_of_memory(ranks):
    for error in ranks(out_of_memory_on_rank_1, 12):
        assert "too large" in error
    alone = evaluate(model(), IMAGES, rotations(4))["NormalizedVariance"]["3"]
    for found in ranks(out_of_memory_on_rank_1, "auto"):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=0)
