"""What each process of a recording by several does: train a little, in the way the first argument names.

Prints where the trace is, or the error that entering the recorder raised.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from bhfast.errors import BhfastError
from bhfast.recorder import Recorder

ROWS = {"spread": [0, 3, 4, 9], "low": [1, 2], "unordered": [9, 0]}


class Model(nn.Module):
    """Of odd sizes: 11 and 5 rows, and a parameter that not every process gets a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return (self.head(self.wte(tokens)) * self.scale).square().sum()


def distribute(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how in ("fsdp", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shape = (2, 2) if how == "hsdp" else (dist.get_world_size(),)
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :]))
    return model


def main(how: str, path: str, storage: str, rows: str) -> None:
    """Train 20 steps on the same batches in every process, so that averaging gradients changes no bit."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = distribute(Model().bfloat16(), how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    generator = torch.Generator().manual_seed(1)
    chosen = {"wte.weight": ROWS[rows]} if rows != "all" else {}
    try:
        recorder = Recorder(optimizer, "*", model=model, rows=chosen, steps=20, path=path, storage=storage)
        with recorder:
            for _ in range(20):
                optimizer.zero_grad()
                loss = model(torch.randint(0, 11, (8,), generator=generator))
                loss.backward()
                optimizer.step()
                recorder.log(loss=loss)
        said = f"trace {Path(recorder.path).name}"
    except BhfastError as error:
        said = f"error {error}"
    os.write(sys.stdout.fileno(), f"{said}\n".encode())  # at once: the processes share the pipe
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
