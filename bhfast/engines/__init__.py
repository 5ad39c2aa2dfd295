"""Ways to run training steps. Each engine is one file; all have the members of :class:`Engine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bhfast import _ops
from bhfast.errors import ConfigError
from bhfast.model import TiedGPT
from bhfast.optim import FusedAdam
from bhfast.recorder import NullRecorder, Recorder

ENGINES = ("auto", "torch", "graph")


@dataclass(frozen=True)
class Job:
    """What an engine runs.

    Attributes:
        model: on the device to train on.
        optimizer: of all its parameters.
        recorder: entered already. Each step is logged with ``losses``, ``logits``, ``learning_rates``, ``clip_coefs``
            and ``grad_norms``; embeddings and moments it takes from the optimizer.
        corpus: uint8 ``[bytes]``, on any device.
        offsets: ``[steps, grad_accum, batch]`` int64 on the CPU: where in the corpus each window starts.
        lrs: the learning rate of each step.
        target_offset: see :func:`bhfast.model.window_loss`.
    """

    model: TiedGPT
    optimizer: FusedAdam
    recorder: Recorder | NullRecorder
    corpus: Tensor
    offsets: Tensor
    lrs: Sequence[float]
    target_offset: int


class Engine(Protocol):
    """What ``train`` needs of an engine.

    Attributes:
        losses, grad_norms: float32 ``[steps]`` on the model's device; filled up to the steps done.
    """

    losses: Tensor
    grad_norms: Tensor

    def run(self, steps: int) -> None:
        """Run and record the next ``steps`` training steps; on a GPU they may still be on their way at return."""
        ...


def select_engine(name: str, device: torch.device) -> tuple[str, str]:
    """Return the engine to use and why. ``auto`` takes the fastest there is.

    Raises:
        ConfigError: there is no such engine, or it cannot run here.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "torch":
        return name, "as asked"
    if device.type != "cuda":
        hindrance = f"a CUDA graph needs a CUDA device, not {device.type}"
    elif _ops.backend(device)[0] != "CUDA":
        hindrance = f"a CUDA graph needs the CUDA kernels: {_ops.backend(device)[1]}"
    else:
        return "graph", "as asked" if name == "graph" else f"the fastest for {device.type}"
    if name == "graph":
        raise ConfigError(f"engine graph cannot run here: {hindrance}; use --engine torch")
    return "torch", hindrance if device.type == "cuda" else f"the only engine for {device.type}"


def make_engine(name: str, job: Job) -> Engine:
    """Build the engine that :func:`select_engine` named."""
    if name == "graph":
        from bhfast.engines.graph import GraphEngine

        return GraphEngine(job)
    from bhfast.engines.torch import TorchEngine

    return TorchEngine(job)
