"""Every block of Python in the README and in the pages of examples/ runs, with stand-ins for models and data."""

import re
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv1, self.relu1, self.layer1 = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 3))
        self.fc1, self.fc2 = nn.Linear(400, 8), nn.Linear(8, 10)

    def forward(self, x=None, pixel_values=None, label=None):
        x = self.layer1(self.relu1(self.conv1(x if pixel_values is None else pixel_values)))
        return self.fc2(self.fc1(nn.functional.adaptive_avg_pool2d(x, 10).flatten(1)))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Pairs(Dataset):
    """Images and classes, as pairs or as dicts."""

    def __init__(self, as_dict=False):
        self.images, self.as_dict = torch.rand(24, 3, 14, 14, generator=torch.Generator().manual_seed(0)), as_dict

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "label": i % 10} if self.as_dict else (self.images[i], i % 10)


def stand_ins():
    torch.manual_seed(0)
    models = {name: Net() for name in ("model", "model_a", "model_b")}
    data = {"dataset": Pairs(), "loader": DataLoader(Pairs(as_dict=True), 8), "x": Pairs().images[:4]}
    return {**models, **data, **{name: DataLoader(Pairs(), 8) for name in ("train_loader", "val_loader")}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_code_runs(page, tmp_path, monkeypatch):
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    monkeypatch.setattr(pl, "Trainer", partial(pl.Trainer, max_epochs=2, accelerator="cpu", **quiet))
    monkeypatch.chdir(tmp_path)
    names = {**stand_ins(), "__name__": page.stem}
    for code in BLOCK.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), names)  # noqa: S102
        if "monitor" in names and not names["monitor"].history:  # a page that shows the callback alone
            pl.Trainer(callbacks=names["callbacks"]).fit(Net(), names["train_loader"], names["val_loader"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1300
