"""Curves and pictures in whatever loggers a trainer has."""

import pytest
from lightnings import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from trainings import events, fit

from lightning_invariance import InvarianceMonitor, rotations


def monitor():
    return InvarianceMonitor(rotations(4))


class Plain(Logger):
    """A logger that can do no more than it must."""

    name, version, save_dir, log_dir = "plain", 0, None, None

    def __init__(self):
        super().__init__()
        self.scalars = []

    def log_metrics(self, metrics, step=None):
        self.scalars.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        """Nothing to keep."""


def test_several_loggers_one_of_which_takes_no_pictures(tmp_path):
    plain = Plain()
    loggers = [TensorBoardLogger(tmp_path, name="", version="run"), CSVLogger(tmp_path, "", "csv"), plain]
    with pytest.warns(UserWarning, match="cannot log pictures to Plain") as caught:
        fit(tmp_path, monitor(), epochs=2, logger=loggers)
    assert sum("cannot log pictures" in str(w.message) for w in caught) == 1
    assert sum("NormalizedVariance_mean" in metrics for _, metrics in plain.scalars) == 3
    assert len(events(tmp_path).Images("NormalizedVariance/heatmap")) == 3
    assert len(list((tmp_path / "csv").rglob("*.png"))) == 9


def test_mlflow_keeps_curves_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow would rather have a database
    logger = MLFlowLogger("digits", tracking_uri=(tmp_path / "mlruns").as_uri())
    fit(tmp_path, monitor(), epochs=1, logger=logger)
    curve = logger.experiment.get_metric_history(logger.run_id, "NormalizedVariance/fc")
    assert [point.step for point in curve] == [0, 4]
    pictures = sorted(tmp_path.glob("mlruns/**/artifacts/NormalizedVariance/*.png"))
    assert [path.name for path in pictures] == [
        f"{kind}_step={step}.png" for kind in ("evolution", "heatmap", "response") for step in (0, 4)
    ]
    assert Image.open(pictures[0]).size[0] > 300


def test_wandb_keeps_curves_and_pictures(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    logger = WandbLogger("digits", save_dir=tmp_path, offline=True)
    keep = logger.experiment.log
    monkeypatch.setattr(
        logger.experiment, "log", lambda values, **options: (logged.append(values), keep(values, **options))
    )
    fit(tmp_path, monitor(), epochs=1, logger=logger)
    wandb.finish()
    curve = [values for values in logged if "NormalizedVariance/fc" in values]
    assert [values["trainer/global_step"] for values in curve] == [0, 4]
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/NormalizedVariance/*.png"))
    assert sorted(path.name.split("_")[0] for path in pictures) == sorted(["evolution", "heatmap", "response"] * 2)
