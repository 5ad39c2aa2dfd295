"""Ways to run a training step. Each engine is one file; all have the same two members as :class:`Engine`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bhfast.errors import ConfigError
from bhfast.model import TiedGPT

ENGINES = ("auto", "torch")


class Engine(Protocol):
    """What ``train`` needs of an engine."""

    name: str

    def step(self, offsets: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """Run one training step, forward to optimizer.

        Args:
            offsets: ``[grad_accum, batch]`` int64 on the CPU: where in the corpus each window starts.
            lr: the learning rate of this step.

        Returns:
            The loss, a float32 scalar, and the logits of the first sequence's last position, ``[V]`` bfloat16; both on
            the engine's device, before the update.
        """
        ...


def select_engine(name: str, device: torch.device) -> tuple[str, str]:
    """Return the engine to use and why. ``auto`` takes the fastest there is."""
    if name not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    return "torch", f"the only engine for {device.type}" if name == "auto" else "as asked"


def make_engine(
    name: str,
    model: TiedGPT,
    optimizer: torch.optim.Optimizer,
    corpus: Tensor,
    *,
    target_offset: int,
) -> Engine:
    """Build the engine that :func:`select_engine` named.

    Args:
        corpus: uint8 ``[bytes]``, on any device.
    """
    from bhfast.engines.torch import TorchEngine

    return {"torch": TorchEngine}[name](model, optimizer, corpus, target_offset=target_offset)
