"""Checkpoints: any model and optimizer go on from one with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bhfast.checkpoint import Checkpoint, read_checkpoint
from bhfast.errors import TraceError
from bhfast.optim import FusedAdam

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "FusedAdam": lambda params: FusedAdam(params, lr=0.1),
}


class Loop:
    """A training loop."""

    def __init__(self, make: Callable, dtype: torch.dtype = torch.bfloat16, width: int = 3) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 2)).to(dtype)
        first, *others = self.model.parameters()
        self.optimizer = make([{"params": others}, {"params": [first], "lr": 0.01}])

    def run(self, steps: int, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            self.optimizer.zero_grad()
            x = torch.randn(4, 5, generator=generator).to(self.model[0].weight.dtype)
            self.model(x).square().sum().backward()
            self.optimizer.step()
        return [param.detach() for param in self.model.parameters()]

    def checkpoint(self) -> Checkpoint:
        own = {"metadata": {"of": "π"}, "options": {"storage": "memory"}}
        return Checkpoint.of(self.model, self.optimizer, step=3, losses=torch.ones(3), **own)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_goes_on_with_the_same_bits(make, dtype: torch.dtype, tmp_path: Path) -> None:
    loop, other = Loop(make, dtype), Loop(make, dtype)
    loop.run(3)
    loop.checkpoint().write(tmp_path / "c")
    found = read_checkpoint(tmp_path / "c")
    assert (found.step, found.metadata["of"], found.options) == (3, "π", {"storage": "memory"})
    assert torch.equal(found.losses, torch.ones(3))
    found.restore(other.model, other.optimizer)
    assert all(map(torch.equal, loop.run(4, seed=1), other.run(4, seed=1)))


def test_refuses_another_network() -> None:
    checkpoint = Loop(OPTIMIZERS["SGD"]).checkpoint()
    other = Loop(OPTIMIZERS["SGD"], width=4)
    with pytest.raises(TraceError, match="the checkpoint is of another network"):
        checkpoint.restore(other.model, other.optimizer)


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c"
    Loop(OPTIMIZERS["FusedAdam"]).checkpoint().write(path)
    whole = path.read_bytes()
    read_checkpoint(path)
    for at in range(0, len(whole), 7):
        if whole[at] != 0x20:  # the header's padding
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(TraceError):
                read_checkpoint(path)


def test_loaded_state_is_as_fast_as_new_state() -> None:
    """Step counts that lie side by side are read and counted in one go."""
    loop = Loop(OPTIMIZERS["FusedAdam"])
    loop.run(2)
    saved = loop.optimizer.state_dict()
    apart = {i: {key: value.clone() for key, value in own.items()} for i, own in saved["state"].items()}
    loop.optimizer.load_state_dict({**saved, "state": apart})
    assert all(batch._row is not None for batch in loop.optimizer._batches())
