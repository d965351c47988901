"""Models whose parameters are sharded over processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_invariance import evaluate, rotations
from lightning_invariance.measures import Goodfellow, NormalizedVariance, VarianceSameEquivariance


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(6 * 36, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    ).double()


def images(n):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sharded(how):
    """The network in shards over all processes of the group, or whole."""
    model = network()
    if how == "fully_shard":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (model[0], model[4], model):
            fully_shard(module, mesh=mesh)
    elif how != "whole":
        about = {"device_id": torch.device("cpu"), "use_orig_params": how == "fsdp of parameters"}
        model[0], model[4] = (FullyShardedDataParallel(model[i], **about) for i in (0, 4))
        model = FullyShardedDataParallel(model, **about)
    return model


def measured(how, n, batch_size=8):
    """Values, and the losses of two training steps afterwards."""
    measures = [NormalizedVariance(response=True), VarianceSameEquivariance(), Goodfellow(0.2)]
    model = sharded(how)
    result = evaluate(model, images(n), rotations(4), measures, batch_size=batch_size, confidence=0.95)
    found = {f"{name} {layer}": v for name, layers in result.items() for layer, v in layers.items()}
    found |= {f"influence {layer}": v for layer, v in result.influences["NormalizedVariance"].items()}
    found["modes"] = torch.tensor([module.training for module in model.modules()]).all()
    optimiser, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        loss = model(images(5)).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach())
    return {**found, "losses": torch.stack(losses)}


@pytest.mark.parametrize("n", [23, 2])  # uneven shares, and a rank without samples
@pytest.mark.parametrize("how", ["fully_shard", "fsdp of parameters", "fsdp of flat parameters"])
def test_sharded_models_have_the_values_of_one_process_and_train_on(ranks, how, n):
    alone = measured("whole", n)
    for found in ranks(measured, how, n):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, equal_nan=True, msg=name)


def test_every_rank_hears_of_an_error_in_the_data_of_one(ranks):
    assert all("a bad sample" in message for message in ranks(with_bad_data, "fully_shard"))


def with_bad_data(how):
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            if i == 7:
                raise ArithmeticError("a bad sample")
            return images(12)[i]

    try:
        evaluate(sharded(how), Data(), rotations(4), batch_size=4)
    except Exception as error:
        return str(error)
    return "no error"
