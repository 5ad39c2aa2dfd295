"""The settings of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from bhfast.engines.choose import ENGINES
from bhfast.errors import ConfigError
from bhfast.model import GPTConfig
from bhfast.ops.arithmetic import ROUNDINGS
from bhfast.storage.base import STORAGES

SCHEDULES = ("linear", "constant")
DEVICES = ("auto", "cpu", "cuda", "mps")


def _setting(default: Any, help_text: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **options})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; each one is also a flag of ``python -m bhfast.train``.

    Raises:
        ConfigError: a value is out of range.
    """

    sigma: float = _setting(0.0, "initial spread of the tokens around the black hole")
    steps: int = _setting(10_000, "optimizer steps")
    seed: int = _setting(42, "seed of the initial weights and of the order of windows")
    lr: float = _setting(1e-3, "learning rate at step 1")
    weight_decay: float = _setting(0.0, "decoupled weight decay; not applied to biases and layer norms")
    beta1: float = _setting(0.9, "decay rate of the first moment")
    beta2: float = _setting(0.999, "decay rate of the second moment")
    eps: float = _setting(1e-8, "added to Adam's denominator")
    batch_size: int = _setting(1, "windows per micro-batch")
    grad_accum: int = _setting(1, "micro-batches per step")
    record_every: int = _setting(1, "record every step that is a multiple of this; 0 records nothing")
    keyframes: int = _setting(
        0,
        "record embeddings and moments at every step that is a multiple of this only; readers rebuild the others from "
        "the gradients; 0 records them at every step",
    )
    init_scale: float = _setting(0.02, "spread of the black hole's center")
    vocab_size: int = _setting(128, "number of tokens; every byte of the corpus must be below it")
    hidden_dim: int = _setting(64, "dimensions of a token vector")
    layers: int = _setting(2, "transformer blocks")
    heads: int = _setting(2, "attention heads")
    context: int = _setting(128, "bytes of a window that the network sees")
    target_offset: int = _setting(
        2, "position t predicts byte t + this: 2 as in the reference experiment, 1 for next-byte training"
    )
    max_grad_norm: float = _setting(1.0, "clip the global gradient norm to this; inf for no clipping")
    lr_schedule: str = _setting("linear", "linear decays to 0 at the end", choices=SCHEDULES)
    adam_rounding: str = _setting(
        "per-op", "round to bfloat16 after every operation, or once per output", choices=ROUNDINGS
    )
    corpus: str | None = _setting(
        None, "text file (default: data/gatsby_clean.txt if it exists, else the built-in corpus)"
    )
    out: str | None = _setting(
        None, "trace file (default: tensors/Lil_Gatsby/1.12b_training_data_sigmaSIGMA.safetensors)"
    )
    device: str = _setting("auto", "auto takes cuda, then mps, then cpu", choices=DEVICES)
    engine: str = _setting(
        "auto", "how steps are run; auto takes graph on cuda, native on a cpu, else torch", choices=ENGINES
    )
    storage: str = _setting(
        "auto",
        "keep the recording in memory, or stream it to the file; auto streams if it needs over half of free memory",
        choices=STORAGES,
    )
    overwrite: bool = _setting(False, "replace a trace of another run")
    quiet: bool = _setting(False, "print nothing but errors")

    def __post_init__(self) -> None:
        for name in ("sigma", "lr", "weight_decay", "eps", "init_scale"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be finite and at least 0, got {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("steps", "batch_size", "grad_accum"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.record_every <= self.steps:
            raise ConfigError(f"record_every must be 0 to steps ({self.steps}), got {self.record_every}")
        if self.keyframes < 0 or self.keyframes == 1:
            raise ConfigError(f"keyframes must be 0, or at least 2, got {self.keyframes}")
        if self.keyframes and self.record_every > 1:
            raise ConfigError(f"keyframes need the gradients of every step, got record_every={self.record_every}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be 0 to 2^63 - 1, got {self.seed}")
        if not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm must be above 0, got {self.max_grad_norm}; inf means no clipping")
        if not 1 <= self.target_offset <= self.context:
            raise ConfigError(f"target_offset must be 1 to context ({self.context}), got {self.target_offset}")
        for entry in fields(self):
            choices = entry.metadata.get("choices")
            if choices and getattr(self, entry.name) not in choices:
                raise ConfigError(
                    f"{entry.name} must be one of {', '.join(choices)}, got {getattr(self, entry.name)!r}"
                )
        self.model_config()

    def model_config(self) -> GPTConfig:
        """Return the settings of the network."""
        return GPTConfig(**{entry.name: getattr(self, entry.name) for entry in fields(GPTConfig)})

    @property
    def path(self) -> Path:
        """The trace file."""
        return Path(self.out or f"tensors/Lil_Gatsby/1.12b_training_data_sigma{self.sigma:.0e}.safetensors")

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 1."""
        return self.lr * (1 - (step - 1) / self.steps) if self.lr_schedule == "linear" else self.lr


def setting_type(name: str) -> type:
    """Return the type of a setting of :class:`TrainConfig`: bool, int, float or str (also for ``str | None``)."""
    annotated = get_type_hints(TrainConfig)[name]
    return annotated if annotated in (bool, int, float) else str
