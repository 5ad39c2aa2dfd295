"""The reference run: a small GPT trained from a black hole, recorded at every step.

    python -m bhfast.train --sigma 0

:func:`train` reads from top to bottom. Called from Python, ``bhfast.train(bhfast.TrainConfig(sigma=0.0, steps=200))``
does what the program does.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor
from tqdm import tqdm

import bhfast
from bhfast import _ops
from bhfast.corpus import Corpus, load_corpus, window_offsets
from bhfast.engines import ENGINES, Engine, Job, make_engine, select_engine
from bhfast.errors import BhfastError, ConfigError, StorageError, TraceError
from bhfast.model import GPTConfig, TiedGPT, build_model
from bhfast.optim import FusedAdam
from bhfast.recorder import NullRecorder, Recorder
from bhfast.report.figures import figures
from bhfast.signals import deferred_signals
from bhfast.storage import STORAGES
from bhfast.trace import Trace, format_bytes, open_trace

SCHEDULES = ("linear", "constant")
DEVICES = ("auto", "cpu", "cuda", "mps")
KEYS = {"param": "embeddings", "grad": "grads", "exp_avg": "momentum", "exp_avg_sq": "variance"}
# What may differ between two runs of one experiment, and is not recorded; corpus, device and engine are compared as the
# run resolved them.
NOT_SETTINGS = {"out", "overwrite", "quiet", "storage"}
RESOLVED = ("corpus_sha256", "device", "engine")
PROGRESS_EVERY = 100  # steps
BURST_SECONDS = 0.05  # between two looks at signals and progress

# ---------------------------------------------------------------------------------------------------------------------
# Settings


def _flag(default: Any, text: str, **options: Any) -> Any:
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; each is a flag of ``python -m bhfast.train`` by the same name.

    Raises:
        ConfigError: a value is out of range.
    """

    sigma: float = _flag(0.0, "spread of the tokens around the black hole at the start")
    steps: int = _flag(10_000, "optimizer steps")
    seed: int = _flag(42, "seed of the start and of the order of windows")
    lr: float = _flag(1e-3, "learning rate at step 1")
    weight_decay: float = _flag(0.0, "decoupled; not applied to biases and layer norms")
    beta1: float = _flag(0.9, "decay rate of the first moment")
    beta2: float = _flag(0.999, "decay rate of the second moment")
    eps: float = _flag(1e-8, "added to Adam's denominator")
    batch_size: int = _flag(1, "windows per micro-batch")
    grad_accum: int = _flag(1, "micro-batches per step")
    record_every: int = _flag(1, "record each step that is a multiple of this; 0 records nothing")
    init_scale: float = _flag(0.02, "spread of the black hole's centre")
    vocab_size: int = _flag(128, "tokens: bytes below this")
    hidden_dim: int = _flag(64, "dimensions of a token")
    layers: int = _flag(2, "transformer blocks")
    heads: int = _flag(2, "attention heads")
    context: int = _flag(128, "bytes a window shows the network")
    target_offset: int = _flag(
        2, "position t predicts byte t + this: 2 is the reference experiment, 1 next-byte training"
    )
    max_grad_norm: float = _flag(1.0, "clip the global gradient norm to this; inf for no clipping")
    lr_schedule: str = _flag("linear", "linear falls to 0 at the end", choices=SCHEDULES)
    adam_rounding: str = _flag("per-op", "bfloat16 after every operation, or once per output", choices=_ops.ROUNDINGS)
    corpus: str | None = _flag(None, "text file (default: data/gatsby_clean.txt if there, else the built-in corpus)")
    out: str | None = _flag(None, "trace file (default: tensors/Lil_Gatsby/1.12b_training_data_sigmaSIGMA.safetensors)")
    device: str = _flag("auto", "auto takes cuda, then mps, then cpu", choices=DEVICES)
    engine: str = _flag(
        "auto", "how a step is run; auto takes graph on cuda, native on a cpu, else torch", choices=ENGINES
    )
    storage: str = _flag(
        "auto",
        "where the recording grows: in memory, or straight in the file; auto streams if it is more than half of memory",
        choices=STORAGES,
    )
    overwrite: bool = _flag(False, "replace a trace of another run")
    quiet: bool = _flag(False, "print nothing but errors")

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
        return GPTConfig(**{entry.name: getattr(self, entry.name) for entry in fields(GPTConfig)})

    @property
    def path(self) -> Path:
        """The trace file."""
        return Path(self.out or f"tensors/Lil_Gatsby/1.12b_training_data_sigma{self.sigma:.0e}.safetensors")

    def learning_rate(self, step: int) -> float:
        """Return the rate of ``step``, counted from 1."""
        return self.lr * (1 - (step - 1) / self.steps) if self.lr_schedule == "linear" else self.lr


def kind_of(setting: str) -> type:
    """Return the type of a field of :class:`TrainConfig`: bool, int, float or str."""
    kind = get_type_hints(TrainConfig)[setting]
    return kind if kind in (bool, int, float) else str


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
    backend, backend_reason = _ops.backend(device)
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
        "bhfast_version": bhfast.__version__,
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
            engine_name, Job(model, optimizer, recorder, corpus.data, offsets, lrs, config.target_offset)
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


class _Watch:
    """Shows the latest loss, and notes the first gradient that is not finite, without waiting for a GPU."""

    def __init__(self, engine: Engine, bar: tqdm, progress: Callable[[int, float], None] | None) -> None:
        self.engine = engine
        self.bar = bar
        self.progress = progress
        self.loss = math.nan
        self.first = self.seen = 0  # the steps that were asked for last: from first to before seen
        self.answer: Tensor | None = None  # loss, and the index of the first bad norm or -1; maybe on its way
        self.arrived: torch.cuda.Event | None = None
        self.is_finite = True

    def look(self, step: int, wait: bool = False) -> None:
        """Show what has arrived; ask for more if it is time. ``wait`` for all of it at the end of a run."""
        if self.answer is not None and (wait or self.arrived is None or self.arrived.query()):
            self._show(self.answer)
        if self.answer is None and step > self.seen and (wait or step - self.seen >= PROGRESS_EVERY):
            self._ask(step)
            if wait and self.answer is not None:
                self._show(self.answer)
        if self.progress is not None:
            self.progress(step, self.loss)

    def _ask(self, step: int) -> None:
        bad = ~self.engine.grad_norms[self.seen : step].isfinite()
        first_bad = torch.where(bad.any(), bad.float().argmax(), -1)
        answer = torch.stack([self.engine.losses[step - 1], first_bad.float()])
        self.answer = answer.to("cpu", non_blocking=answer.is_cuda)
        self.arrived = torch.cuda.current_stream().record_event() if answer.is_cuda else None
        self.first, self.seen = self.seen, step

    def _show(self, answer: Tensor) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()
        self.loss, first_bad = answer.tolist()
        self.answer = None
        self.bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
        if self.is_finite and first_bad >= 0:
            self.is_finite = False
            step = self.first + int(first_bad) + 1
            self.bar.write(f"note: gradients are not finite since step {step}; they are recorded as they are")


def printer(quiet: bool) -> Callable[[str], None]:
    """Return what prints a line at once; a reader that has gone away (``bhfast train | head``) must not end the run."""

    def say(text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")

    return (lambda text: None) if quiet else say


def select_device(name: str) -> tuple[torch.device, str]:
    """Return the device to train on, and why.

    Raises:
        ConfigError: the device asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        first = next(device for device, ready in there.items() if ready)
        return torch.device(first), "the first there is of cuda, mps and cpu"
    if not there[name]:
        raise ConfigError(
            f"device {name} is not available here; use --device {' or '.join(d for d in there if there[d])}"
        )
    return torch.device(name), "as asked"


def _describe(config: TrainConfig, corpus: Corpus, device: torch.device, engine: str) -> dict[str, str]:
    """Return what the metadata say of the experiment itself."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}
    return {
        "config": json.dumps(settings),
        "corpus_sha256": corpus.sha256,
        "device": device.type,
        "engine": engine,
    }


def _bits_depend_on(engine: str) -> dict[str, str]:
    """Return what else of this machine the metadata must name, as sums are ordered by it."""
    if engine == "native":
        return {"instruction_set": _ops.native_instruction_sets()[0]}
    return {"threads": str(torch.get_num_threads())}


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


def _require_same_settings(path: Path, metadata: dict[str, str]) -> None:
    """Raise StorageError if the trace at ``path`` is of another experiment than ``metadata`` describes."""
    way_out = "pass --overwrite to replace it, or choose another file with --out"
    try:
        changed = _changed_settings(open_trace(path), metadata)
    except (TraceError, KeyError, ValueError):
        raise StorageError(f"{path} exists and is no trace of bhfast; {way_out}") from None
    if changed:
        raise StorageError(f"{path} holds a run with other settings ({'; '.join(changed)}); {way_out}")


def _changed_settings(trace: Trace, metadata: dict[str, str]) -> list[str]:
    """Return in words what differs between the experiment of a trace and the one that ``metadata`` describes.

    Raises:
        KeyError, ValueError: the trace is not one of :func:`train`.
    """
    old, new = (
        json.loads(x["config"]) | {"corpus": None} | {key: x[key] for key in RESOLVED}
        for x in (trace.metadata, metadata)
    )
    return [f"{name} {old.get(name)!r}, now {value!r}" for name, value in new.items() if old.get(name) != value]


def is_run_of(path: str | os.PathLike[str], config: TrainConfig) -> bool:
    """Return whether there is a trace of this very experiment, from its first step to its last.

    Only the header and the recorded steps are read, and the corpus. Where the trace lies, and what recorded it, does
    not matter: ``out``, ``overwrite``, ``quiet`` and ``storage`` are not compared.

    Raises:
        BhfastError: the corpus, the device or the engine is not there.
    """
    device, _ = select_device(config.device)
    engine, _ = select_engine(config.engine, device, config.model_config())
    corpus = load_corpus(config.corpus, vocab_size=config.vocab_size, window=config.context + 1)
    try:
        trace = open_trace(path)
        changed = _changed_settings(trace, _describe(config, corpus, device, engine))
        last = int(trace.steps[-1])
    except (TraceError, IndexError, KeyError, ValueError):
        return False
    return not changed and last == config.steps // config.record_every * config.record_every


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
