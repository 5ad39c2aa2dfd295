"""Training loops of other people: every optimizer in every framework, recorded, beside plain copies made by hand.

:func:`record` runs one cell of the matrix. It returns, for each step, what the trace must hold: copies of gradients,
parameters and optimizer state, each made at the moment that the loop itself has it.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from children import fork, status_of
from torch import Tensor, nn

from bhfast.errors import BhfastError
from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder

STEPS = 5
OVERFLOW = 3  # the step whose gradients are infinite, where a scaler is used
SECONDS = 200  # that a process may take


class Lion(torch.optim.Optimizer):
    """An optimizer that neither torch nor bhfast knows: signs of an average, one state tensor."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.sub_((b1 * average + (1 - b1) * p.grad).sign(), alpha=group["lr"])
                average.mul_(b2).add_(p.grad, alpha=1 - b2)


class ScheduleFree(torch.optim.Optimizer):
    """SGD on a sequence ``z``, of which the parameter is a running mean; its state is float32."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                z = state.setdefault("z", p.detach().float())
                state["k"] = state.get("k", 0) + 1
                z.sub_(p.grad.float(), alpha=group["lr"])
                p.lerp_(z.to(p.dtype), 1 / (state["k"] + 1))


def _muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    adamw = torch.optim.AdamW(others, lr=0.01)
    return [torch.optim.Muon(matrices, lr=0.01), adamw] if matrices else [adamw]


def _one(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], list[Any]]:
    return lambda model: [kind(model.parameters(), **{"lr": 0.01, **options})]


OPTIMIZERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "FusedAdam": _one(FusedAdam),
    "AdamW": _one(torch.optim.AdamW, foreach=False),
    "AdamW foreach": _one(torch.optim.AdamW, foreach=True),
    "AdamW fused": _one(torch.optim.AdamW, fused=True),
    "AdamW amsgrad": _one(torch.optim.AdamW, amsgrad=True),
    "SGD": _one(torch.optim.SGD),
    "SGD momentum": _one(torch.optim.SGD, momentum=0.9),
    "RMSprop": _one(torch.optim.RMSprop, centered=True, momentum=0.5),
    "Adagrad": _one(torch.optim.Adagrad),
    "Adamax": _one(torch.optim.Adamax),
    "NAdam": _one(torch.optim.NAdam),
    "RAdam": _one(torch.optim.RAdam),
    "Adafactor": _one(torch.optim.Adafactor),
    "Lion": _one(Lion),
    "ScheduleFree": _one(ScheduleFree),
}
if hasattr(torch.optim, "Muon"):  # since 2.9
    OPTIMIZERS["Muon + AdamW"] = _muon


class Framework(NamedTuple):
    """How a loop trains: what wraps the model, and what it does between ``backward()`` and ``step()``."""

    processes: int = 1
    dtype: torch.dtype = torch.bfloat16
    micro_batches: int = 1
    autocast: torch.dtype | None = None
    scales: bool = False
    clips: bool = False
    compiles: bool = False
    wrap: str = ""
    keyframes: int | None = None


FRAMEWORKS = {
    "plain": Framework(),
    "float32": Framework(dtype=torch.float32),
    "AMP bfloat16": Framework(dtype=torch.float32, autocast=torch.bfloat16),
    "AMP float16 + GradScaler": Framework(dtype=torch.float32, autocast=torch.float16, scales=True),
    "AMP float16 + GradScaler, clipping": Framework(
        dtype=torch.float32, autocast=torch.float16, scales=True, clips=True
    ),
    "accumulation": Framework(micro_batches=3),
    "clipping": Framework(micro_batches=2, clips=True),
    "compiled step": Framework(compiles=True),
    "accelerate": Framework(wrap="accelerate", micro_batches=2, clips=True),
    "DDP": Framework(2, wrap="ddp"),
    "DDP, accumulation, clipping": Framework(2, micro_batches=2, clips=True, wrap="ddp"),
    "FSDP1": Framework(2, wrap="fsdp1"),
    "FSDP2": Framework(2, wrap="fsdp2"),
    "FSDP2, accumulation, clipping": Framework(2, micro_batches=2, clips=True, wrap="fsdp2"),
    "tensor parallel": Framework(2, wrap="tp"),
    "`keyframes=`": Framework(keyframes=2),
    "`keyframes=`, DDP": Framework(2, wrap="ddp", keyframes=2),
    "`keyframes=`, FSDP2": Framework(2, wrap="fsdp2", keyframes=2),
    "`keyframes=`, tensor parallel": Framework(2, wrap="tp", keyframes=2),
}


class Model(nn.Module):
    """Of odd sizes, with parameters of zero, one and two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.down(self.up(self.wte(tokens)).relu()) * self.scale
        return (hidden - torch.arange(6.0)).float().square().mean()


def wrapped(model: nn.Module, how: str) -> nn.Module:
    """Return the model as a framework has it."""
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    if how in ("fsdp2", "tp"):
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if how == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=mesh)
        else:
            from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

            parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


class Shard(NamedTuple):
    """This process's part of a tensor that is divided along an axis."""

    part: Tensor
    axis: int


def _copy(value: Tensor) -> Tensor | Shard:
    """Return a copy; of a DTensor that is sharded, of this process's part: gathering thousands takes half a minute."""
    value = value.detach()
    if not hasattr(value, "to_local"):
        return value.clone()
    (placement,) = value.placements
    if placement.is_shard():
        return Shard(value.to_local().clone(), placement.dim)
    return value.full_tensor().clone()


def joined(ranks: Sequence[list[dict[str, Tensor | Shard]]]) -> list[dict[str, Tensor]]:
    """Return the tensors of rank 0, those that are divided joined with the parts of the other ranks."""
    return [
        {
            name: torch.cat([own[name].part for own in step], value.axis) if isinstance(value, Shard) else value
            for name, value in step[0].items()
        }
        for step in zip(*ranks, strict=True)
    ]


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def record(optimizer: str, framework: str, path: Path, rank: int = 0) -> list[dict[str, Tensor | Shard]] | str:
    """Train some steps, recorded to ``path``.

    Returns:
        For each step, by name in the file, what the record must hold; or the error that opening the recorder raised.
    """
    how = FRAMEWORKS[framework]
    torch.manual_seed(0)
    model = wrapped(Model().to(how.dtype), how.wrap)
    try:
        optimizers = OPTIMIZERS[optimizer](model)
    except TypeError as error:
        return f"{error}"
    accelerator = None
    if how.wrap == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=how.micro_batches)
        model, *optimizers = accelerator.prepare(model, *optimizers)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if how.scales else None
    steps = [torch.compile(own.step, backend="eager") if how.compiles else own.step for own in optimizers]
    generator = torch.Generator().manual_seed(1 + rank)  # different data in every process
    options: Any = {"model": model, "steps": STEPS, "path": path, "unclipped": how.clips, "keyframes": how.keyframes}
    try:
        recorder = Recorder(optimizers, "*", **options)
        recorder.start()
    except BhfastError as error:
        return f"{error}"
    wanted = []
    try:
        for step in range(1, STEPS + 1):
            wanted.append(_step(step, how, model, optimizers, steps, scaler, accelerator, generator, recorder))
    finally:
        recorder.close()
    return wanted


def _step(
    step: int,
    how: Framework,
    model: nn.Module,
    optimizers: Sequence[Any],
    steps: Sequence[Callable[[], None]],
    scaler: torch.amp.GradScaler | None,
    accelerator: Any,
    generator: torch.Generator,
    recorder: Recorder,
) -> dict[str, Tensor | Shard]:
    """Do one step, and return copies of what it had."""
    for own in optimizers:
        own.zero_grad()
    grads: dict[str, Tensor | Shard] = {}
    for micro_batch in range(how.micro_batches):
        is_last = micro_batch == how.micro_batches - 1
        tokens = torch.randint(0, 11, (8,), generator=generator)
        with accelerator.accumulate(model) if accelerator else nullcontext():
            with torch.autocast("cpu", how.autocast) if how.autocast else nullcontext():
                loss = model(tokens) * (torch.inf if scaler and step == OVERFLOW else 1)
            (accelerator.backward if accelerator else Tensor.backward)(scaler.scale(loss) if scaler else loss)
            if is_last:
                grads = {name: _copy(p.grad) for name, p in _named(model).items()}
            if accelerator and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            if accelerator:
                for own in optimizers:
                    own.step()
                if is_last:
                    recorder.log(loss=loss)
                continue
        if not is_last:
            recorder.log(loss=loss)  # replaced by that of the last micro-batch
    if scaler:
        grads = {name: grad / scaler.get_scale() for name, grad in grads.items()}
    if not accelerator:
        if how.clips:
            for own in optimizers if scaler else ():
                scaler.unscale_(own)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for own, do_step in zip(optimizers, steps, strict=True):
            scaler.step(own) if scaler else do_step()
        if scaler:
            scaler.update()
        recorder.log({"loss": loss, "more": {"step": step}})
    values = {f"{name}.grad": grad for name, grad in grads.items()}
    for own in (getattr(x, "optimizer", x) for x in optimizers):
        for name, p in _named(model).items():
            if any(p is q for group in own.param_groups for q in group["params"]):
                values[name] = _copy(p)
                state = {key: x for key, x in own.state.get(p, {}).items() if isinstance(x, Tensor) and key != "step"}
                values |= {f"{name}.{key}": _copy(x) for key, x in state.items()}
    return {**values, "loss": loss.detach().clone()}


def _work(cells: Sequence[tuple[str, str]], folder: Path, rank: int, world: int) -> None:
    """Be one of ``world`` processes, for one cell after the other."""
    signal.alarm(SECONDS)  # if the others have died, there is nobody to wait for
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    for i, (optimizer, framework) in enumerate(cells):
        where = folder / f"{i}"
        where.mkdir(exist_ok=True)
        dist.barrier()
        try:
            found = record(optimizer, framework, where / "t.safetensors", rank)
        except Exception:
            found = f"raised {traceback.format_exc()}"  # in every process alike, so the next cell can go on
        torch.save(found, where / f"wanted-{rank}")
        dist.barrier()
    dist.destroy_process_group()


def record_distributed(cells: Sequence[tuple[str, str]], folder: Path) -> None:
    """Run cells in two processes; cell i leaves ``i/t.safetensors`` and, of each rank, ``i/wanted-RANK``."""
    import torch._dynamo  # which optimizers import
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401 - before the fork

    errors = [folder / f"error-{rank}" for rank in range(2)]
    ranks = [fork(partial(_work, cells, folder, rank, 2), errors[rank]) for rank in range(2)]
    if any([status_of(rank) for rank in ranks]):
        raise RuntimeError("\n".join(path.read_text() for path in errors if path.exists()) or "a process was killed")
