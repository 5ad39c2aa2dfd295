"""Makes the parts of a run from its settings."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bhfast.config import TrainConfig
from bhfast.engines.base import HIDDEN, TrainingRun
from bhfast.engines.thermal import ThermalNoise
from bhfast.errors import ConfigError
from bhfast.experiment import experiment_metadata, machine_metadata, require_same_experiment
from bhfast.model import TiedGPT
from bhfast.optim import FusedAdam
from bhfast.recording.null import NullRecorder
from bhfast.recording.recorder import Recorder
from bhfast.recording.selection import named_params
from bhfast.tokens import Corpus, chosen_tokens, window_offsets
from bhfast.trace.format import REFERENCE_NAMES
from bhfast.version import __version__

TENSOR_NAMES = REFERENCE_NAMES | {"momentum_buffer": "momentum"}
TOKENS = "wte"  # the parameter of the token vectors


def make_optimizer(config: TrainConfig, model: TiedGPT) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    return FusedAdam(
        _param_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        rounding=config.adam_rounding,
        max_grad_norm=config.max_grad_norm,
    )


def make_run(
    config: TrainConfig,
    model: TiedGPT,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder | NullRecorder,
    corpus: Corpus,
    start: int,
) -> TrainingRun:
    """Return what the engine runs. It goes on after step ``start``."""
    seed = config.seed if config.data_seed is None else config.data_seed
    windows = config.steps * config.grad_accum * config.batch_size
    offsets = window_offsets(len(corpus.data), config.context + 1, windows, seed)
    tokens, device = model.wte.weight, model.wte.weight.device
    frozen = thermal = None
    if config.frozen_rows:
        frozen = torch.zeros(config.vocab_size, dtype=torch.bool)
        frozen[chosen_tokens("frozen_rows", config.frozen_rows, corpus.counts)] = True
    if config.thermal_noise:
        rows = chosen_tokens("thermal_rows", config.thermal_rows, corpus.counts)
        thermal = ThermalNoise(tokens, rows.to(device), config.thermal_noise, config.seed)
    return TrainingRun(
        model=model,
        optimizer=optimizer,
        recorder=recorder.slots,
        corpus=corpus.data,
        offsets=offsets.view(config.steps, config.grad_accum, config.batch_size),
        lrs=[config.learning_rate(step) for step in range(1, config.steps + 1)],
        target_offset=config.target_offset,
        max_grad_norm=config.max_grad_norm,
        hidden=config.hidden_statistics,
        frozen=None if frozen is None else frozen.to(device),
        thermal=thermal,
        start=start,
    )


def _param_groups(model: TiedGPT, weight_decay: float) -> list[dict[str, Any]]:
    """Return one group of all parameters; with weight decay, two groups, the second of which is exempt from it."""
    if not weight_decay:
        return [{"params": list(model.parameters()), "weight_decay": 0.0}]
    decayed: list[Parameter] = []
    exempt: list[Parameter] = []
    for name, param in model.named_parameters():
        (exempt if name.endswith("bias") or "ln_" in name else decayed).append(param)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def run_metadata(config: TrainConfig, corpus: Corpus, device: torch.device, engine_name: str) -> dict[str, str]:
    """Return the metadata of the trace."""
    return {
        "records": "record k: gradient (unclipped), loss and logits of step k; embeddings and moments after step k",
        **experiment_metadata(config, corpus, device, engine_name),
        "corpus": corpus.name,
        "seed": str(config.seed),
        **machine_metadata(engine_name),
        **({} if config.optimizer == "sgd" else {"adam_rounding": config.adam_rounding}),
        **({} if corpus.strings is None else {"token_strings": json.dumps(corpus.strings, ensure_ascii=False)}),
        "bhfast_version": __version__,
        "torch_version": torch.__version__,
    }


def make_recorder(
    config: TrainConfig,
    model: TiedGPT,
    optimizer: torch.optim.Optimizer,
    corpus: Corpus,
    metadata: dict[str, str],
    *,
    is_resumed: bool,
) -> Recorder | NullRecorder:
    """Return the recorder of the run.

    Raises:
        ConfigError: there is nothing to record under these names.
        StorageError: a trace of another experiment is in its place.
    """
    if not config.record_every:
        return NullRecorder()
    if config.path.is_file() and not config.overwrite and not is_resumed:
        require_same_experiment(config.path, metadata)
    params: dict[str, Tensor] = {TOKENS: model.wte.weight}
    if config.recorded_params:
        named = named_params(config.recorded_params, model)
        params = {TOKENS if param is model.wte.weight else name: param for name, param in named}
    if config.rows and TOKENS not in params:
        raise ConfigError(f"rows are those of the token vectors, which params={config.params} leave out")
    return Recorder(
        optimizer,
        params,
        steps=config.steps,
        path=config.path,
        every=config.record_every,
        keyframes=config.keyframes or None,
        storage=config.wanted_storage,
        rows={TOKENS: chosen_tokens("rows", config.rows, corpus.counts)} if config.rows else None,
        fields=config.recorded_fields,
        unclipped=config.optimizer == "sgd",
        keys={TOKENS: TENSOR_NAMES},
        metadata=metadata,
        overwrite=config.overwrite or is_resumed or config.path.is_file(),
    )


def record_start(
    recorder: Recorder | NullRecorder, config: TrainConfig, center: Tensor | None, corpus: Corpus, model: TiedGPT
) -> None:
    """Record what stays the same in all steps, and record 0: no loss yet, and zeros."""
    scalars = {
        "init_scale": config.init_scale,
        "sigma": config.sigma,
        "learning_rate": config.lr,
        "weight_decay": config.weight_decay,
        **({} if config.optimizer == "sgd" else {"adam_beta1": config.beta1, "adam_beta2": config.beta2}),
    }
    recorder.constants.update(
        **({} if center is None else {"bh_center": center}),
        **{name: torch.tensor(value, dtype=torch.float32) for name, value in scalars.items()},
        **({} if config.optimizer == "sgd" else {"adam_epsilon": torch.tensor(config.eps, dtype=torch.float64)}),
        token_counts=corpus.counts,
    )
    device, dtype = model.wte.weight.device, model.wte.weight.dtype
    zero = torch.zeros((), device=device)
    recorder.slots.log(
        losses=torch.full((), math.nan, dtype=dtype, device=device),
        logits=torch.zeros(config.vocab_size, dtype=dtype, device=device),
        **{
            HIDDEN[name]: torch.full((config.hidden_dim,), math.nan, device=device) for name in config.hidden_statistics
        },
        learning_rates=torch.zeros((), dtype=torch.float64),
        clip_coefs=zero,
        grad_norms=zero,
    )
