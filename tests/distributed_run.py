"""What each process of a recording by several does: train a little, once for each case.

:func:`main` records every case of ``CASES`` in a folder of its name. Beside it, in ``NAME.RANK``, each process says
where the trace is, or which error entering the recorder raised.
"""

from __future__ import annotations

import signal
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from children import fork, status_of
from torch import nn

from bhfast.errors import BhfastError
from bhfast.recording.recorder import Recorder

ROWS = {"spread": [0, 3, 4, 9], "low": [1, 2], "high": [9], "unordered": [9, 0]}
SECONDS = 100  # that a process may take


class Case(NamedTuple):
    """How the model is distributed, over how many processes, and what is recorded."""

    how: str
    processes: int
    storage: str = "memory"
    rows: str = "spread"
    is_late: bool = False  # what only appears during the run: unknown state, a missing gradient
    keyframes: int | None = None


CASES = {
    "ddp": Case("ddp", 2),
    "ddp-stream": Case("ddp", 2, "stream"),
    "fsdp": Case("fsdp", 2),
    "fsdp-stream": Case("fsdp", 2, "stream", "low"),
    "fsdp-all": Case("fsdp", 2, rows="all"),
    "fsdp-unordered": Case("fsdp", 2, rows="unordered"),
    "ddp-compact": Case("ddp", 2, keyframes=6),
    "fsdp-compact": Case("fsdp", 2, "stream", keyframes=6),
    "fsdp-precious": Case("fsdp", 2),  # where one process finds a file in its way
    "fsdp-late": Case("fsdp", 2, rows="high", is_late=True),
    "hsdp": Case("hsdp", 4, rows="all"),
}


class Model(nn.Module):
    """Of odd sizes: 11 and 5 rows, and a parameter that not every process gets a part of."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return (self.head(self.wte(tokens)) * self.scale).square().sum()


SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # which fully_shard needs; torch 2.6 lacks it


def distribute(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how in ("fsdp", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        shape = (2, 2) if how == "hsdp" else (dist.get_world_size(),)
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :]))
    return model


def record(case: Case, path: Path, rank: int = 0) -> str:
    """Train 20 steps, on other batches in every process.

    Alone, the process computes the gradients of all ``case.processes`` batches, and averages them as the processes do:
    halves of halves, each sum rounded to bfloat16.
    """
    torch.manual_seed(0)
    model = distribute(Model().bfloat16(), case.how)
    kind = torch.optim.RMSprop if case.is_late else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=0.01, foreach=False)
    ranks = range(case.processes) if case.how == "alone" else [rank]
    generators = [torch.Generator().manual_seed(1 + own) for own in ranks]
    rows = {"wte.weight": ROWS[case.rows]} if case.rows != "all" else {}
    options: dict[str, Any] = {"steps": 20, "storage": case.storage, "keyframes": case.keyframes}
    try:
        recorder = Recorder(optimizer, "*", model=model, rows=rows, path=path, **options)
        with recorder:
            for step in range(20):
                losses, grads = [], []
                for generator in generators:
                    optimizer.zero_grad()
                    losses.append(model(torch.randint(0, 11, (8,), generator=generator)))
                    losses[-1].backward()
                    grads.append([p.grad for p in model.parameters()])
                while len(grads) > 1:
                    grads = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in batched(grads)]
                for p, grad in zip(model.parameters(), grads[0], strict=True):
                    p.grad = grad
                if case.is_late and step == 7:
                    model.head.bias.grad = None
                optimizer.step()
                recorder.log(loss=losses[0])
    except BhfastError as error:
        return f"error {error}"
    return f"trace {Path(recorder.path).name}"


def batched(grads: list[list[torch.Tensor]]) -> list[list[list[torch.Tensor]]]:
    """Return neighbours in pairs."""
    return [grads[i : i + 2] for i in range(0, len(grads), 2)]


def work(folder: Path, names: list[str], rank: int, world: int) -> None:
    """Be one of ``world`` processes, for one case after the other."""
    signal.alarm(SECONDS)  # if the others have died, there is nobody to wait for
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    for name in names:
        said = record(CASES[name], folder / name / "run.safetensors", rank)
        (folder / f"{name}.{rank}").write_text(said)
        dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> int:
    """Fork the processes, so that torch is imported once; return 1 if one of them failed."""
    import torch._dynamo  # which optimizers import
    import torch.distributed.fsdp  # noqa: F401 - before the fork

    statuses = []
    for world, names in groupby(CASES, key=lambda name: CASES[name].processes):
        chosen = [name for name in names if SHARDS_ON_CPU or CASES[name].how == "ddp"]
        ranks = [fork(partial(work, folder, chosen, rank, world)) for rank in range(world)]
        statuses += [status_of(rank) for rank in ranks]
    return int(any(statuses))
