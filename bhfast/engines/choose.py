"""Chooses the engine, and says why."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bhfast.engines.base import Engine, TrainingRun
from bhfast.engines.launches import Place
from bhfast.errors import ConfigError
from bhfast.model import GPTConfig
from bhfast.ops import extension

ENGINES = ("auto", "torch", "graph", "native", "resident")


@dataclass(frozen=True)
class Demands:
    """What a run demands of an engine; by default, what the reference run does.

    Attributes:
        model: the architecture of the network.
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        dtype: of the parameters.
        has_thermal_noise: whether token vectors are changed between steps.
    """

    model: GPTConfig = field(default_factory=GPTConfig)
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    has_thermal_noise: bool = False


def select_engine(name: str, device: torch.device, demands: Demands | None = None) -> tuple[str, str]:
    """Return the engine to use, and why.

    ``auto`` takes graph on CUDA and native on a CPU; it takes torch elsewhere, or if these cannot run.

    Args:
        name: one of ``ENGINES``.
        device: where the model is.
        demands: what the run demands; None: what the reference run does.

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
    demands = demands or Demands()
    obstacle = obstacle_to(wanted, device, demands)
    if obstacle is None:
        return wanted, _reason_as_asked(wanted) if wanted == name else _reason_for_auto(wanted, demands)
    if wanted == name:
        raise ConfigError(f"engine {name} cannot run here: {obstacle}; use --engine torch")
    return "torch", obstacle


def obstacle_to(engine: str, device: torch.device, demands: Demands) -> str | None:
    """Return why ``graph``, ``native`` or ``resident`` cannot run here; None if it can."""
    obstacles = {"graph": _graph_obstacle, "native": _native_obstacle, "resident": _resident_obstacle}
    return obstacles[engine](device, demands)


def _reason_as_asked(engine: str) -> str:
    return "as asked; not measured on a GPU yet" if engine == "resident" else "as asked"


def _reason_for_auto(engine: str, demands: Demands) -> str:
    if engine == "native":
        return "the fastest for cpu"
    reason = "its speed is not measured yet"
    if _native_obstacle(torch.device("cpu"), demands) is None:
        reason += "; --device cpu --engine native may be faster"
    return reason


def _graph_obstacle(device: torch.device, demands: Demands) -> str | None:
    if device.type != "cuda":
        return f"a CUDA graph needs a CUDA device, not {device.type}"
    if extension.backend(device)[0] != "CUDA":
        return f"a CUDA graph needs the CUDA kernels: {extension.backend(device)[1]}"
    return _common_obstacle("graph", demands)


def _common_obstacle(engine: str, demands: Demands) -> str | None:
    """Return what only the torch engine does."""
    if demands.optimizer == "sgd":
        return f"the {engine} engine runs Adam, not {demands.optimizer}"
    return f"the {engine} engine adds no thermal noise" if demands.has_thermal_noise else None


def _compiled_obstacle(engine: str, demands: Demands) -> str | None:
    """Return what the engines without torch do not do."""
    model = demands.model
    if demands.dtype != "bfloat16":
        return f"the {engine} engine trains in bfloat16, not in {demands.dtype}"
    if model.untied:
        return f"the {engine} engine needs tied embeddings"
    if model.norm != "layernorm":
        return f"the {engine} engine has layer normalization, not {model.norm}"
    return _common_obstacle(engine, demands)


def _native_obstacle(device: torch.device, demands: Demands) -> str | None:
    if device.type != "cpu":
        return f"the native engine runs on the CPU, not on {device.type}"
    model = demands.model
    return _compiled_obstacle("native", demands) or extension.native_unsupported(
        model.hidden_dim, model.heads, model.mlp_width
    )


def _resident_obstacle(device: torch.device, demands: Demands) -> str | None:
    model = demands.model
    reason = extension.resident_unavailable(device) or _compiled_obstacle("resident", demands)
    return reason or extension.resident_unsupported(
        vocab_size=model.vocab_size,
        hidden_dim=model.hidden_dim,
        mlp_dim=model.mlp_width,
        layers=model.layers,
        heads=model.heads,
        context=model.context,
        blocks=1,
        shared_bytes=0,
    )


def make_engine(name: str, run: TrainingRun, place: Place | None = None) -> Engine:
    """Build the engine that :func:`select_engine` chose.

    Args:
        name, run: of the engine; what it runs.
        place: for the resident engine, among runs that share launches; None: none are shared.
    """
    if name == "graph":
        from bhfast.engines.graph import GraphEngine

        return GraphEngine(run)
    if name == "native":
        from bhfast.engines.native import NativeEngine

        return NativeEngine(run)
    if name == "resident":
        from bhfast.engines.resident import ResidentEngine

        return ResidentEngine(run, place=place)
    from bhfast.engines.torch import TorchEngine

    return TorchEngine(run)
