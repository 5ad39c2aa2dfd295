"""Ways to run training steps. Each engine is one file; all have the members of :class:`Engine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bhfast.errors import BhfastError, ConfigError
from bhfast.model import GPTConfig, TiedGPT
from bhfast.ops import extension
from bhfast.optim import FusedAdam
from bhfast.recording.protocols import NullRecorder
from bhfast.recording.recorder import Recorder

ENGINES = ("auto", "torch", "graph", "native")


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

    def account(self, done: int, steps: int) -> None:
        """Tell the optimizer that ``steps`` were performed for it, which makes ``done`` in all."""
        self.optimizer.count(steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lrs[done - 1]


class Addresses:
    """Where the tensors lie that an engine holds on to.

    Args:
        job: whose parameters, gradients and optimizer state are meant.
        holder: since when, and who goes on with them.
    """

    def __init__(self, job: Job, holder: str) -> None:
        self.job = job
        self.holder = holder
        self._then = self._now()

    def _now(self) -> list[int | None]:
        state = self.job.optimizer.state
        return [
            None if x is None else x.data_ptr()
            for p in self.job.model.parameters()
            for x in (p, p.grad, state[p].get("exp_avg"), state[p].get("exp_avg_sq"))
        ]

    def check(self) -> None:
        """Raise BhfastError if any of them has been moved or replaced."""
        if self._now() != self._then:
            raise BhfastError(
                f"a parameter, its gradient or its optimizer state was moved or replaced {self.holder} goes on with "
                "the old one; use --engine torch to do that"
            )


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


def select_engine(name: str, device: torch.device, model: GPTConfig | None = None) -> tuple[str, str]:
    """Return the engine to use and why. ``auto`` takes graph on CUDA, native on a CPU, and torch where they cannot run.

    Args:
        model: what it is to run; None: the reference network.

    Raises:
        ConfigError: there is no such engine, or it cannot run here.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "torch":
        return name, "as asked"
    preferred = {"cuda": "graph", "cpu": "native"}.get(device.type, "torch")
    wanted = preferred if name == "auto" else name
    if wanted == "torch":
        return wanted, f"the only engine for {device.type}"
    hindrance = {"graph": _graph_hindrance, "native": _native_hindrance}[wanted](device, model or GPTConfig())
    if hindrance is None:
        return wanted, "as asked" if wanted == name else _reason_for_auto(wanted, model or GPTConfig())
    if wanted == name:
        raise ConfigError(f"engine {name} cannot run here: {hindrance}; use --engine torch")
    return "torch", hindrance


def _reason_for_auto(engine: str, model: GPTConfig) -> str:
    if engine == "native":
        return "the fastest for cpu"
    reason = "its speed is not measured yet"
    if _native_hindrance_on_cpu(model) is None:
        reason += "; --device cpu --engine native may be faster"
    return reason


def _graph_hindrance(device: torch.device, model: GPTConfig) -> str | None:
    if device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, not {device.type}"
    if extension.backend(device)[0] != "CUDA":
        return f"a CUDA graph needs the CUDA kernels: {extension.backend(device)[1]}"
    return None


def _native_hindrance(device: torch.device, model: GPTConfig) -> str | None:
    if device.type != "cpu":
        return f"the native engine runs on the CPU, not on {device.type}"
    return _native_hindrance_on_cpu(model)


def _native_hindrance_on_cpu(model: GPTConfig) -> str | None:
    if not extension.native_instruction_sets():
        return f"the native engine needs the C++ kernels: {extension.backend()[1]}"
    if model.hidden_dim % 32 or model.hidden_dim // model.heads % 16:
        return (
            "the native engine needs a hidden_dim divisible by 32, and by 16 times heads, got "
            f"{model.hidden_dim} and {model.heads}"
        )
    return None


def make_engine(name: str, job: Job) -> Engine:
    """Build the engine that :func:`select_engine` named."""
    if name == "graph":
        from bhfast.engines.graph import GraphEngine

        return GraphEngine(job)
    if name == "native":
        from bhfast.engines.native import NativeEngine

        return NativeEngine(job)
    from bhfast.engines.torch import TorchEngine

    return TorchEngine(job)
