"""The Lightning that the tests train with: `lightning.pytorch`, or what the environment variable LIGHTNING names."""

import os
from importlib import import_module

NAME = os.environ.get("LIGHTNING", "lightning.pytorch")

pl = import_module(NAME)
callbacks, loggers, strategies = (import_module(f"{NAME}.{part}") for part in ("callbacks", "loggers", "strategies"))

EarlyStopping, ModelCheckpoint = callbacks.EarlyStopping, callbacks.ModelCheckpoint
StochasticWeightAveraging = callbacks.StochasticWeightAveraging
CSVLogger, Logger, TensorBoardLogger = loggers.CSVLogger, loggers.Logger, loggers.TensorBoardLogger
MLFlowLogger, WandbLogger = loggers.MLFlowLogger, loggers.WandbLogger
DeepSpeedStrategy, ModelParallelStrategy = strategies.DeepSpeedStrategy, strategies.ModelParallelStrategy
