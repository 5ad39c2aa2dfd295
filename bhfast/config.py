"""The settings of a run."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from bhfast.engines.base import HIDDEN
from bhfast.engines.choose import ENGINES, Demands
from bhfast.errors import ConfigError
from bhfast.model import NORMS, GPTConfig
from bhfast.ops.arithmetic import ROUNDINGS
from bhfast.start import ROUNDINGS as START_ROUNDINGS
from bhfast.start import Start
from bhfast.storage.base import STORAGES
from bhfast.trace.format import REFERENCE_NAMES

SCHEDULES = ("linear", "constant")
DEVICES = ("auto", "cpu", "cuda", "mps")
OPTIMIZERS = ("adamw", "adam", "sgd")
DTYPES = ("bfloat16", "float32")
TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
LARGEST = 2**1023  # an integer below it has a float
FIELDS = {name: field for field, name in REFERENCE_NAMES.items()}


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
    seed: int = _setting(42, "seed of the initial weights, of the order of windows, and of the noise")
    init_seed: int | None = _setting(None, "seed of the initial weights alone (default: --seed)")
    data_seed: int | None = _setting(None, "seed of the order of windows alone (default: --seed)")
    optimizer: str = _setting("adamw", "adam is adamw without weight decay; sgd has --momentum", choices=OPTIMIZERS)
    lr: float = _setting(1e-3, "learning rate at step 1")
    momentum: float = _setting(0.0, "of sgd")
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
    checkpoint_every: int = _setting(
        0, "write a checkpoint beside the trace every so many steps, for --resume; 0 writes none; streams the recording"
    )
    rows: str | None = _setting(
        None,
        "record only these rows of the token vectors: dead, live, ids and ranges such as 1,2,5-9, or a file (default: "
        "all)",
    )
    fields: str | None = _setting(None, f"record only some of {','.join(FIELDS)} (default: all)")
    params: str | None = _setting(
        None, 'names or patterns of the parameters to record, such as "wte,h.*.attn" (default: wte, the token vectors)'
    )
    hidden: str | None = _setting(
        None, f"also record {' and '.join(HIDDEN)} of the final hidden state: {','.join(HIDDEN)}"
    )
    start: str = _setting(
        "black-hole",
        "where the tokens start: black-hole (at one center, plus noise), gaussian (noise around 0), sphere (around the "
        "center, at the distance sigma), or FILE.safetensors[:NAME]",
    )
    start_rounding: str = _setting(
        "per-op",
        "of center plus noise: round both to the parameters' dtype and add, or add in float32 and round once",
        choices=START_ROUNDINGS,
    )
    init_scale: float = _setting(0.02, "spread of the black hole's center")
    center_norm: float = _setting(0.0, "scale the center to this norm; 0 leaves it as it is")
    thermal_noise: float = _setting(0.0, "after each step, add noise of this spread to token vectors")
    thermal_rows: str = _setting("all", "the tokens that get the noise, as for --rows")
    frozen_rows: str | None = _setting(None, "tokens whose vectors get no gradient, as for --rows")
    dtype: str = _setting("bfloat16", "of parameters, gradients and optimizer state", choices=DTYPES)
    vocab_size: int = _setting(128, "number of tokens; every token of the corpus must be below it")
    hidden_dim: int = _setting(64, "dimensions of a token vector")
    layers: int = _setting(2, "transformer blocks")
    heads: int = _setting(2, "attention heads")
    mlp_dim: int = _setting(0, "width of the hidden layer of an MLP; 0: 4 times hidden_dim")
    norm: str = _setting("layernorm", "normalization", choices=tuple(NORMS))
    untied: bool = _setting(False, "give the output layer weights of its own")
    context: int = _setting(128, "tokens of a window that the network sees")
    target_offset: int = _setting(
        2, "position t predicts token t + this: 2 as in the reference experiment, 1 for next-token training"
    )
    max_grad_norm: float = _setting(1.0, "clip the global gradient norm to this; inf for no clipping")
    lr_schedule: str = _setting("linear", "linear decays to 0 at the end", choices=SCHEDULES)
    adam_rounding: str = _setting(
        "per-op", "round to bfloat16 after every operation, or once per output", choices=ROUNDINGS
    )
    corpus: str | None = _setting(
        None,
        "a text, or token ids as .npy, .bin or .safetensors (default: data/gatsby_clean.txt if it exists, else the "
        "built-in corpus)",
    )
    tokenizer: str | None = _setting(
        None, "tokenizer.json for the corpus (default: the bytes of a text are its tokens)"
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
        for name in ("sigma", "lr", "weight_decay", "eps", "init_scale", "center_norm", "thermal_noise", "momentum"):
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
        if self.checkpoint_every < 0:
            raise ConfigError(f"checkpoint_every must be at least 0, got {self.checkpoint_every}")
        if self.checkpoint_every and not self.record_every:
            raise ConfigError("checkpoint_every needs a recording to go on with, got record_every=0")
        for name in ("seed", "init_seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**63:
                raise ConfigError(f"{name} must be 0 to 2^63 - 1, got {getattr(self, name)}")
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
        self._check_optimizer()
        for name, known in (("hidden", HIDDEN), ("fields", FIELDS)):
            if unknown := [part for part in _parts(getattr(self, name)) if part not in known]:
                raise ConfigError(f"{name} must be some of {','.join(known)}, got {unknown[0]!r}")
        self.model_config()
        self.start_config()

    def _check_optimizer(self) -> None:
        if self.weight_decay and self.optimizer != "adamw":
            raise ConfigError(f"weight_decay is for the optimizer adamw, not for {self.optimizer}")
        if self.weight_decay and self.frozen_rows:
            raise ConfigError("weight_decay would move frozen_rows; use one of them")
        if self.momentum and self.optimizer != "sgd":
            raise ConfigError(f"momentum is for the optimizer sgd; {self.optimizer} has beta1 and beta2")
        if self.keyframes and self.optimizer == "sgd":
            raise ConfigError("keyframes need an optimizer that can be replayed: adam or adamw, not sgd")
        if self.keyframes and self.thermal_noise:
            raise ConfigError("keyframes need steps that lead from one state to the next, which thermal_noise changes")
        if self.keyframes and self.fields:
            raise ConfigError("keyframes need all fields; leave out fields")

    def model_config(self) -> GPTConfig:
        """Return the settings of the network."""
        return GPTConfig(**{entry.name: getattr(self, entry.name) for entry in fields(GPTConfig)})

    def start_config(self) -> Start:
        """Return where the token vectors start."""
        return Start(self.start, self.sigma, self.init_scale, self.center_norm, self.start_rounding)

    def demands(self) -> Demands:
        """Return what the run demands of an engine."""
        return Demands(self.model_config(), self.optimizer, self.dtype, has_thermal_noise=bool(self.thermal_noise))

    @property
    def hidden_statistics(self) -> list[str]:
        """What to record of the final hidden state: names among ``bhfast.engines.base.HIDDEN``."""
        return _parts(self.hidden)

    @property
    def recorded_fields(self) -> list[str] | None:
        """The fields to record, as :class:`bhfast.Recorder` calls them; None for all."""
        renamed = {"exp_avg": "momentum_buffer"} if self.optimizer == "sgd" else {}
        return [renamed.get(FIELDS[name], FIELDS[name]) for name in _parts(self.fields)] or None

    @property
    def recorded_params(self) -> list[str] | None:
        """Names or patterns of the parameters to record; None for the token vectors alone."""
        return _parts(self.params) or None

    @property
    def path(self) -> Path:
        """The trace file."""
        return Path(self.out or f"tensors/Lil_Gatsby/1.12b_training_data_sigma{self.sigma:.0e}.safetensors")

    @property
    def wanted_storage(self) -> str:
        """The storage to ask for: with checkpoints, one that outlives a killed run, unless another is set."""
        return "stream" if self.checkpoint_every and self.storage == "auto" else self.storage

    @property
    def can_grow(self) -> bool:
        """Whether the first steps would be the same with a larger ``steps``."""
        return self.lr_schedule == "constant"

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 1."""
        return self.lr * (1 - (step - 1) / self.steps) if self.lr_schedule == "linear" else self.lr


def setting_type(name: str) -> type:
    """Return the type of a setting of :class:`TrainConfig`: bool, int, float or str, also if it may be None."""
    annotated = get_type_hints(TrainConfig)[name]
    kinds = [kind for kind in get_args(annotated) or (annotated,) if kind is not type(None)]
    return kinds[0]


def has_setting_type(name: str, value: Any) -> bool:
    """Return whether a value from a file has the type of a setting. A number may be an integer, within limits."""
    wanted = setting_type(name)
    if isinstance(value, bool) or wanted is not float:
        return isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool)
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < LARGEST)


def by_setting(given: Mapping[str, Any], settings: Collection[str], source: str) -> dict[str, Any]:
    """Return values by the names of their settings.

    Args:
        given: the names may have ``-`` in place of ``_``.
        settings: the names that there are.
        source: where the values come from, for error messages.

    Raises:
        ConfigError: there is no such setting, or it is given twice.
    """
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in settings:
            raise ConfigError(f"{source}: there is no setting {key!r}; there are {', '.join(settings)}")
        if name in found:
            raise ConfigError(f"{source}: {name} is given twice")
        found[name] = value
    return found


def read_toml(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: the file.
        what: it has, for error messages.

    Raises:
        ConfigError: the file is missing, or is not TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError included
        raise ConfigError(f"the {what} {path} is not TOML: {error}") from None


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read settings of :class:`TrainConfig` from a TOML file; the names may have ``-`` in place of ``_``.

    Raises:
        ConfigError: the file is missing or is not TOML, a setting is unknown, or a value has the wrong type.
    """
    names = [entry.name for entry in fields(TrainConfig)]
    found = by_setting(read_toml(path, "config"), names, str(path))
    for name, value in found.items():
        if not has_setting_type(name, value):
            raise ConfigError(f"{path}: {name} must be {TYPE_NAMES[setting_type(name)]}, got {value!r}")
    return {name: setting_type(name)(value) for name, value in found.items()}


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]
