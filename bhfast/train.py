"""The reference run: a small GPT trained from a black hole, recorded at every step.

    python -m bhfast.train --sigma 0
    python -m bhfast.train --config FILE.toml
    python -m bhfast.train --resume TRACE

:func:`train` reads from top to bottom: choose, build, record the start, run, report. From Python,
``bhfast.train(bhfast.TrainConfig(sigma=0.0, steps=200))`` does the same as the program.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bhfast.assemble import make_optimizer, make_recorder, make_run, record_start, run_metadata
from bhfast.cli import run_program
from bhfast.config import TrainConfig, read_settings, setting_type
from bhfast.engines.base import Engine
from bhfast.engines.choose import make_engine, select_engine
from bhfast.engines.launches import Place
from bhfast.experiment import corpus_of
from bhfast.machine import require_threads, select_device
from bhfast.model import TiedGPT, build_model
from bhfast.ops import extension
from bhfast.progress import PROGRESS_EVERY, ProgressMonitor, status_printer
from bhfast.recording.carried import carry_over
from bhfast.recording.null import NullRecorder
from bhfast.recording.recorder import Recorder
from bhfast.resume import Checkpoints, EarlierRun, find_run
from bhfast.signals import deferred_signals
from bhfast.summary import verification_figures
from bhfast.trace import open_trace
from bhfast.trace.format import format_bytes

BURST_SECONDS = 0.05  # how long the engine runs between two checks for signals


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        path: the trace; None if nothing was recorded.
        steps: how many were done: fewer than asked for if the run was interrupted. A run that was resumed counts all.
        steps_per_second: of the training loop, recording included.
        losses: float32 ``[steps]``.
        model: the trained network.
        signal: SIGINT, SIGTERM or SIGHUP, if one of them interrupted the run; None if it ran to its end.
    """

    path: Path | None
    steps: int
    steps_per_second: float
    losses: Tensor
    model: TiedGPT
    signal: signal.Signals | None


# ---------------------------------------------------------------------------------------------------------------------
# The run


def train(
    config: TrainConfig | None = None,
    *,
    progress: Callable[[int, float], None] | None = None,
    place: Place | None = None,
) -> TrainResult:
    """Train and record one run.

    Ctrl-C, SIGTERM and SIGHUP end the run after the steps under way, with a valid trace of the steps so far; ``steps``
    of the result says how many. An exception in the loop also leaves such a trace, and is raised. Outside the main
    thread Python cannot install signal handlers, so signals have their usual effect.

    Args:
        config: the settings; None for those of the reference run.
        progress: called many times a second with the number of steps done and the latest known loss. The loss may be
            that of an earlier step, and is NaN before the first one is known. The last call has the final values.
        place: among runs that share the launches of the resident engine; a sweep uses it.

    Raises:
        BhfastError: a setting is wrong, or something needed is missing; nothing was lost.
    """
    return _train(config or TrainConfig(), progress, place, None)


def resume(
    trace: str | os.PathLike[str],
    *,
    progress: Callable[[int, float], None] | None = None,
    place: Place | None = None,
    **settings: Any,
) -> TrainResult:
    """Go on with a run that was interrupted or killed, from its last checkpoint.

    The finished trace has the bits of one that was never interrupted, in every byte. Until it is complete, or has at
    least the same records, the earlier trace stays.

    Args:
        trace: where the run recorded; its checkpoint is beside it.
        progress, place: see :func:`train`.
        settings: fields of :class:`bhfast.TrainConfig`. Only ``checkpoint_every``, ``quiet`` and ``storage`` may
            change, the path of the corpus, and ``steps``, which may be larger if the learning rate is constant.

    Raises:
        BhfastError: there is nothing to go on from, or a setting is not as it was; nothing was lost.
    """
    earlier = find_run(trace, settings)
    return _train(earlier.config, progress, place, earlier)


def _train(
    config: TrainConfig,
    progress: Callable[[int, float], None] | None,
    place: Place | None,
    earlier: EarlierRun | None,
) -> TrainResult:
    print_status = status_printer(config.quiet)

    device, device_reason = select_device(config.device)
    engine_name, engine_reason = select_engine(config.engine, device, config.demands())
    backend, backend_reason = extension.backend(device)
    corpus = corpus_of(config)
    print_status(f"corpus   {corpus.name}: {len(corpus.data):,} {corpus.unit}")
    if corpus.name.endswith("(built in)"):
        print_status("         for the reference run: python -m bhfast.corpus gatsby")
    print_status(f"device   {device.type} ({device_reason})")
    print_status(f"engine   {engine_name} ({engine_reason}); operations: {backend} ({backend_reason})")

    model, center = build_model(
        config.model_config(),
        config.start_config(),
        seed=config.seed if config.init_seed is None else config.init_seed,
        device=device,
        dtype=getattr(torch, config.dtype),
    )
    optimizer = make_optimizer(config, model)
    metadata = run_metadata(config, corpus, device, engine_name)
    metadata = earlier.metadata(metadata) if earlier else metadata
    recorder = make_recorder(config, model, optimizer, corpus, metadata, is_resumed=earlier is not None)
    start = earlier.checkpoint.step if earlier else 0

    with deferred_signals() as signals, recorder:
        print_status(f"storage  {recorder.description}")
        record_start(recorder, config, center, corpus, model)
        if earlier:
            print_status(f"resumes  after step {start:,} of {config.steps:,}")
            earlier.checkpoint.restore(model, optimizer)
            assert isinstance(recorder, Recorder)
            carry_over(recorder.slots, earlier.trace, start, lambda: bool(signals))
        engine = make_engine(engine_name, make_run(config, model, optimizer, recorder, corpus, start), place)
        if earlier:
            engine.losses[:start] = earlier.checkpoint.losses
        checkpoints = Checkpoints(config, model, optimizer, recorder, engine, metadata)
        steps, seconds = _run(engine, config, signals, progress, checkpoints)

    path = checkpoints.leave(steps, earlier)
    done = steps - start
    if signals:
        print_status(f"interrupted by {signals[0].name} at step {steps:,} of {config.steps:,}")
        if config.checkpoint_every:
            print_status(f"to go on: python -m bhfast.train --resume {config.path}")
    print_status(f"{done:,} steps in {seconds:.1f} s: {done / seconds:.1f} steps/s")
    _report_recording(recorder, path, print_status)
    return TrainResult(
        path=path,
        steps=steps,
        steps_per_second=done / seconds,
        losses=engine.losses[:steps].cpu(),
        model=model,
        signal=signals[0] if signals else None,
    )


def _run(
    engine: Engine,
    config: TrainConfig,
    signals: Sequence[signal.Signals],
    progress: Callable[[int, float], None] | None,
    checkpoints: Checkpoints,
) -> tuple[int, float]:
    """Run all steps, or stop when a signal arrives; return how many are done, and the seconds this took.

    Steps run in bursts, whose length doubles until one takes about ``BURST_SECONDS``. They end at checkpoints.
    """
    step, burst = engine.done, 1
    start = time.perf_counter()
    with (
        _frozen_heap(),
        tqdm(total=config.steps, initial=step, unit="step", disable=True if config.quiet else None) as bar,
    ):
        monitor = ProgressMonitor(engine, bar, progress)
        while step < config.steps and not signals:
            count = min(burst, config.steps - step, checkpoints.steps_to_next(step))
            begun = time.perf_counter()
            engine.run(count)
            step += count
            bar.update(count)
            monitor.update(step)
            if time.perf_counter() - begun < BURST_SECONDS / 2:
                burst = min(2 * burst, PROGRESS_EVERY)
            checkpoints.update(step)
        monitor.update(step, wait=True)
    return step, time.perf_counter() - start


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Hide everything loaded so far from the garbage collector, which would otherwise scan all of torch in the loop.

    A heap that the caller has frozen is left alone, as no part of it can be unfrozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _report_recording(
    recorder: Recorder | NullRecorder, path: Path | None, print_status: Callable[[str], None]
) -> None:
    if waits := recorder.stats().waits:
        print_status(f"times the run had to wait for the recording: {waits:,}")
    if path is not None:
        trace, size = open_trace(path), format_bytes(path.stat().st_size)
        print_status(f"saved steps 0 to {int(trace.steps[-1]):,}, {size}: {path}")
        print_status(verification_figures(trace))


# ---------------------------------------------------------------------------------------------------------------------
# The program


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast train",
        description="Train a small GPT from a black hole and record every step, bit for bit.",
        argument_default=argparse.SUPPRESS,  # to tell what is given, which an earlier run's settings must agree with
    )
    parser.add_argument(
        "--resume",
        metavar="TRACE",
        help="go on with the run that recorded this trace with --checkpoint-every, and was interrupted or killed; its "
        "settings stay as they were, and need not be given",
    )
    parser.add_argument(
        "--config", metavar="FILE.toml", help="settings by name, such as hidden-dim = 32; flags override them"
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of torch and the native engine; not part of the experiment (default: OMP_NUM_THREADS, or one per core)",
    )
    for entry in fields(TrainConfig):
        flag, text, value_type = f"--{entry.name.replace('_', '-')}", entry.metadata["help"], setting_type(entry.name)
        if value_type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            text += "" if entry.default is None else f" (default: {entry.default})"
            parser.add_argument(flag, type=value_type, choices=entry.metadata.get("choices"), help=text)
    return run_program(parser, _train_with_flags, argv)


def _train_with_flags(args: argparse.Namespace) -> int:
    given = vars(args)
    trace, file = given.pop("resume", None), given.pop("config", None)
    if (threads := given.pop("threads", None)) is not None:
        require_threads(threads)
        torch.set_num_threads(threads)
    given = {**(read_settings(file) if file is not None else {}), **given}
    result = train(TrainConfig(**given)) if trace is None else resume(trace, **given)
    return 128 + result.signal if result.signal else 0


class _CallableModule(ModuleType):
    """Makes ``bhfast.train`` both this module and the function it is named after."""

    def __call__(
        self, config: TrainConfig | None = None, *, progress: Callable[[int, float], None] | None = None
    ) -> TrainResult:
        return train(config, progress=progress)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
