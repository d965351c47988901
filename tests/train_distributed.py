"""Training in several processes, for test_strategies.py: ``python train_distributed.py STRATEGY FOLDER [FAIL]``."""

import sys
from pathlib import Path

import torch
from lightnings import EarlyStopping, ModelCheckpoint, ModelParallelStrategy, TensorBoardLogger, pl
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_invariance import InvarianceMonitor, rotations
from lightning_invariance.measures import Goodfellow, NormalizedDistance, NormalizedVariance

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(37, 1, 6, 6, generator=GENERATOR, dtype=torch.float64)  # processes get uneven shares
DATA = TensorDataset(IMAGES, torch.arange(37) % 2)


def measures():
    return [NormalizedVariance(), NormalizedDistance(samples=4), Goodfellow(0.1)]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 2)
        )
        self.double()

    def configure_model(self):
        if self.device_mesh is not None:  # parameters are sharded, but not the statistics of batches
            self.layers[1] = nn.GroupNorm(1, 3).double()
            for module in (self.layers[0], self.layers[4], self):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Report(pl.Callback):
    """Saves the state of each process at the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        monitor = next(c for c in trainer.callbacks if isinstance(c, InvarianceMonitor))
        found = {
            "history": [result.state_dict() for result in monitor.history],
            "weights": {name: getattr(w, "full_tensor", w.clone)() for name, w in pl_module.state_dict().items()},
            "training": [module.training for module in pl_module.modules()],
            "watched": trainer.callback_metrics["NormalizedVariance_mean"],
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def fail_on_rank_1(model, x):
    if torch.distributed.get_rank() == 1:
        raise ArithmeticError("a bad batch")
    return model(x)


def main(strategy, folder, fail=False):
    torch.set_num_threads(1)
    pl.seed_everything(1)
    callbacks = [
        InvarianceMonitor(rotations(4), measures(), batch_size=16, forward=fail_on_rank_1 if fail else None),
        EarlyStopping("NormalizedVariance_mean", patience=5),
        ModelCheckpoint(folder / "best", monitor="NormalizedVariance_mean"),
        Report(folder),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=ModelParallelStrategy(2, 1) if strategy == "sharded" else strategy,
        devices=2,
        max_epochs=2,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder, name="", version="run"),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(), DataLoader(DATA, 4, shuffle=True), DataLoader(DATA, 4))
    if strategy == "ddp_fork":  # here is the process that called it
        torch.save([result.epoch for result in callbacks[0].history], folder / "caller.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), len(sys.argv) > 3)
