"""A small network and its training, for the tests of the callback."""

import torch
from lightnings import ModelCheckpoint, TensorBoardLogger, pl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

IMAGES = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, (IMAGES.mean((1, 2, 3)) > 0.5).long())
LAYERS = ["conv", "bn", "relu", "fc"]  # dropout returns its input again


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(48, 2)

    def forward(self, x):
        return self.fc(self.drop(self.relu(self.bn(self.conv(x))).flatten(1)))

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, _):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(folder, *callbacks, epochs=1, **options):
    """A Trainer on the CPU that prints nothing, and logs and saves nothing unless it is told to."""
    pl.seed_everything(1, verbose=False)
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **{"logger": False, **options},
    )


def fit(folder, *callbacks, epochs=3, model=None, data=DATA, ckpt_path=None, **options):
    """Train; returns the Trainer."""
    trainer = trainer_of(folder, *callbacks, epochs=epochs, **options)
    model = Net() if model is None else model
    trainer.fit(model, DataLoader(data, 8, shuffle=True), DataLoader(data, 8), ckpt_path=ckpt_path)
    return trainer


def fit_with_tensorboard(folder, *callbacks, **options):
    return fit(folder, *callbacks, **{"logger": TensorBoardLogger(folder, name="", version="run"), **options})


def events(folder):
    """The logs of a training with TensorBoard."""
    accumulator = EventAccumulator(str(folder / "run"), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


class Recorder(pl.Callback):
    """Records batches, losses and random states of a training."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((batch[0].sum().item(), outputs["loss"].item(), torch.get_rng_state().sum().item()))
