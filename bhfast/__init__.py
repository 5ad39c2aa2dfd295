"""bhfast: a flight recorder for training dynamics, with its reference experiment.

Names load on first use, so ``import bhfast`` alone does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bhfast.errors import BhfastError as BhfastError
    from bhfast.optim import FusedAdam as FusedAdam
    from bhfast.recorder import Recorder as Recorder
    from bhfast.trace import open_trace as open_trace
    from bhfast.train import TrainConfig as TrainConfig
    from bhfast.train import TrainResult as TrainResult
    from bhfast.train import train as train
    from bhfast.verify import verify as verify

_HOME = {
    "BhfastError": "errors",
    "FusedAdam": "optim",
    "Recorder": "recorder",
    "TrainConfig": "train",
    "TrainResult": "train",
    "open_trace": "trace",
}
_PROGRAMS = ("train", "verify")  # modules that are called like the function they are named after

__all__ = [*_HOME, *_PROGRAMS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PROGRAMS:
        return import_module(f"bhfast.{name}")
    if name in _HOME:
        return getattr(import_module(f"bhfast.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bhfast' has no attribute {name!r}")
