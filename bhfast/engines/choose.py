"""Chooses the engine, and says why."""

from __future__ import annotations

import torch

from bhfast.engines.base import Engine, TrainingRun
from bhfast.errors import ConfigError
from bhfast.model import GPTConfig
from bhfast.ops import extension

ENGINES = ("auto", "torch", "graph", "native")


def select_engine(name: str, device: torch.device, model: GPTConfig | None = None) -> tuple[str, str]:
    """Return the engine to use, and why.

    ``auto`` takes graph on CUDA and native on a CPU; it takes torch elsewhere, or if these cannot run.

    Args:
        name: one of ``ENGINES``.
        device: where the model is.
        model: the sizes of the network; None for those of the reference run.

    Raises:
        ConfigError: there is no such engine, or it was asked for by name and cannot run here.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {name!r}")
    if name == "torch":
        return name, "as asked"
    preferred = {"cuda": "graph", "cpu": "native"}.get(device.type, "torch")
    wanted = preferred if name == "auto" else name
    if wanted == "torch":
        return wanted, f"the only engine for {device.type}"
    obstacle = {"graph": _graph_obstacle, "native": _native_obstacle}[wanted](device, model or GPTConfig())
    if obstacle is None:
        return wanted, "as asked" if wanted == name else _reason_for_auto(wanted, model or GPTConfig())
    if wanted == name:
        raise ConfigError(f"engine {name} cannot run here: {obstacle}; use --engine torch")
    return "torch", obstacle


def _reason_for_auto(engine: str, model: GPTConfig) -> str:
    if engine == "native":
        return "the fastest for cpu"
    reason = "its speed is not measured yet"
    if extension.native_unsupported(model.hidden_dim, model.heads) is None:
        reason += "; --device cpu --engine native may be faster"
    return reason


def _graph_obstacle(device: torch.device, model: GPTConfig) -> str | None:
    if device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, not {device.type}"
    if extension.backend(device)[0] != "CUDA":
        return f"a CUDA graph needs the CUDA kernels: {extension.backend(device)[1]}"
    return None


def _native_obstacle(device: torch.device, model: GPTConfig) -> str | None:
    if device.type != "cpu":
        return f"the native engine runs on the CPU, not on {device.type}"
    return extension.native_unsupported(model.hidden_dim, model.heads)


def make_engine(name: str, run: TrainingRun) -> Engine:
    """Build the engine that :func:`select_engine` chose."""
    if name == "graph":
        from bhfast.engines.graph import GraphEngine

        return GraphEngine(run)
    if name == "native":
        from bhfast.engines.native import NativeEngine

        return NativeEngine(run)
    from bhfast.engines.torch import TorchEngine

    return TorchEngine(run)
