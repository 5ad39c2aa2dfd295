"""Which engine runs here, and why."""

from __future__ import annotations

import torch

from bhfast.engines.job import Engine, Job
from bhfast.errors import ConfigError
from bhfast.model import GPTConfig
from bhfast.ops import extension

ENGINES = ("auto", "torch", "graph", "native")


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
