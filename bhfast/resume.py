"""Finds what a run can go on from, its trace and its checkpoint, and leaves it for later."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bhfast.checkpoint import Checkpoint, checkpoint_path, read_checkpoint, remove_checkpoint
from bhfast.config import TrainConfig
from bhfast.engines.base import Engine
from bhfast.errors import MALFORMED, BhfastError, ConfigError, DamageError, StorageError, TraceError
from bhfast.experiment import RESOLVED, changed_settings
from bhfast.recording.null import NullRecorder
from bhfast.recording.recorder import Recorder
from bhfast.recover import recover
from bhfast.trace.journal import journal_path, read_journal
from bhfast.trace.opening import open_file
from bhfast.trace.reader import Trace

CHANGEABLE = {"checkpoint_every", "corpus", "quiet", "steps", "storage", "tokenizer"}  # when a run is resumed
PINNED = ("device", "engine")  # auto must choose the same again


@dataclass(frozen=True)
class EarlierRun:
    """A run that ended early, and how it goes on.

    Attributes:
        config: the settings of the whole run.
        trace: has all records up to the step of the checkpoint.
        checkpoint: the state to go on from.
    """

    config: TrainConfig
    trace: Trace
    checkpoint: Checkpoint

    def metadata(self, now: Mapping[str, str]) -> dict[str, str]:
        """Return the metadata that the trace would have if the run had not ended early.

        Args:
            now: those of the run that goes on.

        Raises:
            ConfigError: they are of another experiment, or of a machine whose bits may be others.
        """
        then = self.checkpoint.metadata
        config = json.dumps(json.loads(then["config"]) | {"steps": self.config.steps})
        wanted = {**then, "config": config}
        changed = changed_settings(wanted, now)
        keys = now.keys() - {"config", "corpus", *RESOLVED}
        changed += [f"{key} {then.get(key)!r}, now {now[key]!r}" for key in sorted(keys) if then.get(key) != now[key]]
        if changed:
            raise ConfigError(
                f"resuming {self.config.path} under other settings ({'; '.join(changed)}): its bits would be others; "
                "resume it where it was started, and as it was started"
            )
        return {**now, "config": config, "corpus": then["corpus"]}


def find_run(path: str | os.PathLike[str], given: Mapping[str, Any]) -> EarlierRun:
    """Find what is left of the run that recorded to ``path``, and check it.

    What a killed run left in ``PATH.partial`` becomes ``PATH`` if that is more than ``PATH`` has.

    Args:
        path: the trace; it need not exist if the run was killed.
        given: settings for the rest of the run. Those of the experiment must be as they were, except ``steps``, which
            may be larger if the learning rate is constant.

    Raises:
        ConfigError: a setting is not as it was, or the run is complete.
        TraceError: there is nothing to go on from, or it is damaged.
        StorageError: the run is still going on.
    """
    path = Path(path)
    own = checkpoint_path(path)
    _require_records(path)
    if not own.exists():
        raise _why_not(path)
    checkpoint = read_checkpoint(own)
    config = _settings(path, checkpoint, given)
    _recover(path, checkpoint)
    trace = _longest(path, checkpoint)
    every, usable = config.record_every, _usable_records(trace)
    if usable == len(trace.steps) and int(trace.steps[-1]) >= config.steps // every * every:
        if not config.can_grow:  # its run was killed before it had removed it
            remove_checkpoint(own)
        raise _complete(path, config)
    if checkpoint.step // every >= usable:
        last = f"step {int(trace.steps[usable - 1])}" if usable else "its start"
        if usable < len(trace.steps):
            raise DamageError(
                f"{trace.path} is damaged after {last}, before its checkpoint of step {checkpoint.step}: nothing can "
                f"go on from it; python -m bhfast.verify {trace.path} says what is damaged"
            )
        raise TraceError(
            f"{trace.path} ends at {last}, before its checkpoint of step {checkpoint.step}: the records in between are "
            "lost; start the run again"
        )
    return EarlierRun(config, trace, checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def _settings(path: Path, checkpoint: Checkpoint, given: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of the whole run."""
    metadata = checkpoint.metadata
    try:
        before = json.loads(metadata["config"]) | checkpoint.options | {"out": str(path)}
        resolved = {name: metadata[name] for name in PINNED}
        config = TrainConfig(**{**before, **resolved})
    except MALFORMED as error:
        raise TraceError(
            f"{checkpoint_path(path)} has settings that this bhfast does not know ({error}); resume with bhfast "
            f"{metadata.get('bhfast_version', 'of that version')}"
        ) from None
    changed = [
        f"{name} {value!r}, now {given[name]!r}"
        for name, value in asdict(config).items()
        if name in given.keys() - CHANGEABLE and given[name] not in (value, before.get(name, value))
    ]
    if changed:
        raise ConfigError(
            f"resuming {path} under other settings ({'; '.join(changed)}): leave these out, or start another run with "
            "--out"
        )
    steps = given.get("steps", config.steps)
    if steps < config.steps:
        raise ConfigError(f"steps can only become larger when a run is resumed: it was {config.steps}, now {steps}")
    if steps > config.steps and not config.can_grow:
        raise ConfigError(
            f"steps was {config.steps}, now {steps}: with lr_schedule {config.lr_schedule} all learning rates would be "
            "others; only a run with --lr-schedule constant can be made longer"
        )
    return TrainConfig(**{**asdict(config), **given, **resolved})


def _different_runs(file: Path, changed: Sequence[str]) -> StorageError:
    return StorageError(
        f"{file} and the checkpoint beside it are of different runs ({'; '.join(changed)}): move one of them away"
    )


def _other_settings(metadata: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    """Return which settings of a trace are not those of the checkpoint; one that can grow may have had fewer steps."""
    try:
        wanted = json.loads(metadata["config"])
        can_grow = TrainConfig(**wanted).can_grow
        changed = changed_settings(metadata, checkpoint.metadata)
    except MALFORMED:
        return ["not a trace of bhfast train"]
    return [text for text in changed if not (can_grow and text.startswith("steps "))]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _require_records(path: Path) -> None:
    """Raise TraceError if there is only what a run has left that was killed with its records in memory."""
    partial = _partial(path)
    if path.exists() or not partial.exists() or journal_path(partial).exists():
        return
    try:
        recover(partial)
    except TraceError:
        raise TraceError(
            f"{path} cannot be resumed: its run kept the records in memory, and they were lost when it was killed; "
            "start it again, with --storage stream"
        ) from None


def _why_not(path: Path) -> BhfastError:
    """Return why a run without a checkpoint cannot be resumed."""
    if not path.exists() and not _partial(path).exists():
        return TraceError(f"cannot resume {path}: there is no such trace")
    with suppress(TraceError, *MALFORMED):
        trace = open_file(path)
        config = TrainConfig(**trace.config)
        if int(trace.steps[-1]) >= config.steps // config.record_every * config.record_every:
            return _complete(path, config)
    return TraceError(
        f"{path} cannot be resumed: {checkpoint_path(path)} does not exist; a run writes checkpoints with "
        "--checkpoint-every"
    )


def _complete(path: Path, config: TrainConfig) -> ConfigError:
    more = "; to go on, pass a larger --steps" if config.can_grow else ""
    return ConfigError(f"{path} is complete: it has all of its {config.steps} steps{more}")


def _recover(path: Path, checkpoint: Checkpoint) -> None:
    """Turn what a killed run left into the trace, if it is more than there is."""
    partial = _partial(path)
    left = _left(partial)
    if left is None:
        return
    metadata, records = left
    if changed := _other_settings(metadata, checkpoint):
        raise _different_runs(partial, changed)
    if not path.exists() or len(open_file(path).steps) < records:
        recover(partial, replace=True)


def _left(partial: Path) -> tuple[Mapping[str, str], int] | None:
    """Return the metadata of what a killed run left, and how many records it has; None if it cannot be read."""
    try:
        if journal_path(partial).exists():
            state = read_journal(partial)
            return state.metadata, state.records
        trace = open_file(partial)
        return trace.metadata, len(trace.steps)
    except (TraceError, KeyError):
        return None


def _longest(path: Path, checkpoint: Checkpoint) -> Trace:
    """Return the trace of this run that has the most records; those that were recovered may be beside it."""
    found = [open_file(path)] if path.exists() else []
    if found and (changed := _other_settings(found[0].metadata, checkpoint)):
        raise _different_runs(path, changed)
    found += [trace for trace in _cut_traces(path) if not _other_settings(trace.metadata, checkpoint)]
    if not found:
        raise TraceError(f"cannot resume {path}: there is a checkpoint, but no such trace")
    return max(found, key=lambda trace: len(trace.steps))


def _cut_traces(path: Path) -> Iterator[Trace]:
    for file in sorted(path.parent.glob(f"{glob.escape(path.stem)}.cut-at-*{glob.escape(path.suffix)}")):
        with suppress(TraceError):
            yield open_file(file)


def _usable_records(trace: Trace) -> int:
    """Return how many records there are before the first damaged one."""
    if trace.header_is_intact() is not True:
        raise DamageError(f"{trace.path} is damaged: its header is not the one that was written")
    return min((record or 0 for _, record in trace.damage()), default=len(trace.steps))


# ---------------------------------------------------------------------------------------------------------------------
# For a later run


class Checkpoints:
    """Writes the checkpoints of a run. None is ever ahead of the records that are safe in the trace.

    Args:
        config: the settings of the run.
        model, optimizer, recorder, engine: of the run.
        metadata: of the trace, which identify the experiment.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recorder: Recorder | NullRecorder,
        engine: Engine,
        metadata: dict[str, str],
    ) -> None:
        self._config = config
        self._state = model, optimizer
        self._recorder = recorder
        self._engine = engine
        self._metadata = metadata
        self._path = checkpoint_path(config.path)
        # In memory, records do not outlive a killed run, so only the state at the end is of use.
        self._every = config.checkpoint_every if config.wanted_storage == "stream" else 0

    def steps_to_next(self, step: int) -> int:
        """Return how many steps may run after ``step`` until the next checkpoint is due."""
        return self._every - step % self._every if self._every else sys.maxsize

    def update(self, step: int) -> None:
        """Write a checkpoint if one is due; that of the end is written after the trace."""
        if self._every and step % self._every == 0 and step < self._config.steps:
            assert isinstance(self._recorder, Recorder)
            self._recorder.slots.commit()
            self._write(step)

    def leave(self, steps: int, earlier: EarlierRun | None) -> Path | None:
        """Once the trace is written, leave what is needed to go on with it, and nothing else; return its path.

        Args:
            steps: how many are done.
            earlier: what the run went on from.
        """
        config, path = self._config, self._recorder.path
        if earlier and path is not None and path != config.path:  # the earlier trace has these records, and more
            path.unlink()
            path = config.path
        is_final = steps == config.steps and not config.can_grow
        if config.checkpoint_every and not is_final:
            self._write(steps)
        elif path == config.path and (is_final or not earlier):
            remove_checkpoint(self._path)
        return path

    def _write(self, step: int) -> None:
        config = self._config
        options: dict[str, int | str] = {
            "keyframes": config.keyframes,
            "storage": config.wanted_storage,
            "checkpoint_every": config.checkpoint_every,
        }
        losses = self._engine.losses[:step]
        Checkpoint.of(*self._state, step=step, losses=losses, metadata=self._metadata, options=options).write(
            self._path
        )
