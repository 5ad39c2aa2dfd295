"""bhfast: a flight recorder for training dynamics, with its reference experiment.

Names load on first use, so ``import bhfast`` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bhfast.version import __version__ as __version__

if TYPE_CHECKING:
    from bhfast.config import TrainConfig as TrainConfig
    from bhfast.errors import BhfastError as BhfastError
    from bhfast.errors import ConfigError as ConfigError
    from bhfast.errors import CorpusError as CorpusError
    from bhfast.errors import DamageError as DamageError
    from bhfast.errors import RecordingWarning as RecordingWarning
    from bhfast.errors import StorageError as StorageError
    from bhfast.errors import TraceError as TraceError
    from bhfast.optim import FusedAdam as FusedAdam
    from bhfast.recording.recorder import Recorder as Recorder
    from bhfast.trace import open_trace as open_trace
    from bhfast.train import TrainResult as TrainResult
    from bhfast.train import train as train

_HOME = {
    "BhfastError": "errors",
    "ConfigError": "errors",
    "CorpusError": "errors",
    "DamageError": "errors",
    "FusedAdam": "optim",
    "Recorder": "recording.recorder",
    "RecordingWarning": "errors",
    "StorageError": "errors",
    "TraceError": "errors",
    "TrainConfig": "config",
    "TrainResult": "train",
    "open_trace": "trace",
}

__all__ = [*_HOME, "__version__", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("bhfast.train")  # the module can be called like its function of the same name
    if name in _HOME:
        return getattr(import_module(f"bhfast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bhfast' has no attribute {name!r}")
