"""The reference run: a small GPT trained from a black hole, recorded at every step.

    python -m bhfast.train --sigma 0

:func:`train` reads from top to bottom. Called from Python, ``bhfast.train(bhfast.TrainConfig(sigma=0.0, steps=200))``
does what the program does.
"""

from __future__ import annotations

import argparse
import gc
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bhfast.config import TrainConfig, kind_of
from bhfast.corpus import load_corpus, window_offsets
from bhfast.engines.base import TrainingRun
from bhfast.engines.choose import make_engine, select_engine
from bhfast.errors import BhfastError
from bhfast.experiment import _bits_depend_on, _describe, _require_same_settings
from bhfast.machine import select_device
from bhfast.model import TiedGPT, build_model
from bhfast.ops import extension
from bhfast.optim import FusedAdam
from bhfast.progress import PROGRESS_EVERY, _Watch, printer
from bhfast.recording.protocols import NullRecorder
from bhfast.recording.recorder import Recorder
from bhfast.signals import deferred_signals
from bhfast.summary import figures
from bhfast.trace import open_trace
from bhfast.trace.format import format_bytes
from bhfast.version import __version__

KEYS = {"param": "embeddings", "grad": "grads", "exp_avg": "momentum", "exp_avg_sq": "variance"}
BURST_SECONDS = 0.05  # between two looks at signals and progress


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        path: the trace; None if nothing was recorded.
        steps: how many were done: fewer than asked for if the run was interrupted.
        steps_per_second: over the training loop, recording included.
        losses: float32 ``[steps]``.
        model: the trained network.
        signal: what interrupted the run, SIGINT or SIGTERM; None if it ran to its end.
    """

    path: Path | None
    steps: int
    steps_per_second: float
    losses: Tensor
    model: TiedGPT
    signal: signal.Signals | None


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(config: TrainConfig | None = None, *, progress: Callable[[int, float], None] | None = None) -> TrainResult:
    """Train and record one run.

    Ctrl-C and SIGTERM end it after the steps under way, with a valid trace of the steps so far; the result's ``steps``
    says how many. Any other exception in the loop ends it likewise, and is raised. Outside the main thread, where
    Python takes no handlers, signals do what they did before.

    Args:
        progress: called many times a second with the steps done and the latest loss known, which may be of an earlier
            step and is NaN before there is one; at the end with the last of both.

    Raises:
        BhfastError: a setting is wrong, or something needed is missing; nothing was lost.
    """
    config = config or TrainConfig()
    say = printer(config.quiet)

    device, device_reason = select_device(config.device)
    engine_name, engine_reason = select_engine(config.engine, device, config.model_config())
    backend, backend_reason = extension.backend(device)
    corpus = load_corpus(config.corpus, vocab_size=config.vocab_size, window=config.context + 1)
    say(f"corpus   {corpus.name}: {len(corpus.data):,} bytes")
    if corpus.name.endswith("(built in)"):
        say("         for the reference run: python -m bhfast.corpus gatsby")
    say(f"device   {device.type} ({device_reason})")
    say(f"engine   {engine_name} ({engine_reason}); operations: {backend} ({backend_reason})")

    model, center = build_model(
        config.model_config(), sigma=config.sigma, init_scale=config.init_scale, seed=config.seed, device=device
    )
    optimizer = FusedAdam(
        _param_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        rounding=config.adam_rounding,
        max_grad_norm=config.max_grad_norm,
    )
    metadata = {
        "records": "record k: gradient (unclipped), loss and logits of step k; embeddings and moments after step k",
        **_describe(config, corpus, device, engine_name),
        "corpus": corpus.name,
        "seed": str(config.seed),
        **_bits_depend_on(engine_name),
        "adam_rounding": config.adam_rounding,
        "bhfast_version": __version__,
        "torch_version": torch.__version__,
    }
    recorder = _make_recorder(config, model, optimizer, metadata)
    offsets = window_offsets(
        len(corpus.data), config.context + 1, config.steps * config.grad_accum * config.batch_size, config.seed
    ).view(config.steps, config.grad_accum, config.batch_size)
    lrs = [config.learning_rate(step) for step in range(1, config.steps + 1)]

    with deferred_signals() as signals, recorder:
        say(f"storage  {recorder.description}")
        recorder.constants.update(_constants(config, center, corpus.data))
        zero = torch.zeros((), device=device)
        recorder.log(
            losses=torch.full((), math.nan, dtype=torch.bfloat16, device=device),
            logits=torch.zeros(config.vocab_size, dtype=torch.bfloat16, device=device),
            learning_rates=torch.zeros((), dtype=torch.float64),
            clip_coefs=zero,
            grad_norms=zero,
        )
        engine = make_engine(
            engine_name,
            TrainingRun(model, optimizer, recorder, corpus.data, offsets, lrs, config.target_offset),
        )
        step, burst = 0, 1
        start = time.perf_counter()
        with _frozen_heap(), tqdm(total=config.steps, unit="step", disable=True if config.quiet else None) as bar:
            watch = _Watch(engine, bar, progress)
            while step < config.steps and not signals:
                burst = min(burst, config.steps - step)
                begun = time.perf_counter()
                engine.run(burst)
                step += burst
                bar.update(burst)
                watch.look(step)
                if time.perf_counter() - begun < BURST_SECONDS / 2:
                    burst = min(2 * burst, PROGRESS_EVERY)
            watch.look(step, wait=True)
        elapsed = time.perf_counter() - start

    if signals:
        say(f"interrupted by {signals[0].name} at step {step:,} of {config.steps:,}")
    say(f"{step:,} steps in {elapsed:.1f} s: {step / elapsed:.1f} steps/s")
    if waits := recorder.stats().waits:
        say(f"the run had to wait for the recording {waits:,} times")
    if recorder.path is not None:
        say(f"saved steps 0 to {recorder.saved_steps:,}, {format_bytes(recorder.path.stat().st_size)}: {recorder.path}")
        say(figures(open_trace(recorder.path)))
    return TrainResult(
        path=recorder.path,
        steps=step,
        steps_per_second=step / elapsed,
        losses=engine.losses[:step].cpu(),
        model=model,
        signal=signals[0] if signals else None,
    )


def _param_groups(model: TiedGPT, weight_decay: float) -> list[dict[str, Any]]:
    if not weight_decay:
        return [{"params": list(model.parameters()), "weight_decay": 0.0}]
    params = dict(model.named_parameters())
    plain = [param for name, param in params.items() if name.endswith("bias") or "ln_" in name]
    decayed = [param for name, param in params.items() if not (name.endswith("bias") or "ln_" in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _constants(config: TrainConfig, center: Tensor, corpus: Tensor) -> dict[str, Tensor]:
    scalars = {
        "init_scale": config.init_scale,
        "sigma": config.sigma,
        "learning_rate": config.lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.beta1,
        "adam_beta2": config.beta2,
    }
    return {
        "bh_center": center,
        **{name: torch.tensor(value, dtype=torch.float32) for name, value in scalars.items()},
        "adam_epsilon": torch.tensor(config.eps, dtype=torch.float64),
        "token_counts": corpus.long().bincount(minlength=config.vocab_size),
    }


def _make_recorder(
    config: TrainConfig, model: TiedGPT, optimizer: FusedAdam, metadata: dict[str, str]
) -> Recorder | NullRecorder:
    if not config.record_every:
        return NullRecorder()
    if config.path.is_file() and not config.overwrite:
        _require_same_settings(config.path, metadata)
    return Recorder(
        optimizer,
        {"wte": model.wte.weight},
        steps=config.steps,
        path=config.path,
        every=config.record_every,
        storage=config.storage,
        keys=KEYS,
        metadata=metadata,
        overwrite=config.overwrite or config.path.is_file(),
    )


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keep the garbage collector from walking all that torch has loaded, over and over, during the loop."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ---------------------------------------------------------------------------------------------------------------------
# The program


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast train",
        description="Train a small GPT from a black hole and record every step, bit for bit.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for entry in fields(TrainConfig):
        flag, text, kind = f"--{entry.name.replace('_', '-')}", entry.metadata["help"], kind_of(entry.name)
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            default = entry.default if entry.default is not None else argparse.SUPPRESS
            parser.add_argument(flag, type=kind, default=default, choices=entry.metadata.get("choices"), help=text)
    args = parser.parse_args(argv)
    try:
        result = train(TrainConfig(**vars(args)))
    except BhfastError as error:
        print(f"bhfast train: error: {error}", file=sys.stderr)
        return 2
    return 128 + result.signal if result.signal else 0


class _CallableModule(ModuleType):
    """Lets ``bhfast.train(...)`` be both this module and the function it is named after."""

    def __call__(
        self, config: TrainConfig | None = None, *, progress: Callable[[int, float], None] | None = None
    ) -> TrainResult:
        return train(config, progress=progress)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
