"""Identifies the experiment of a trace, and tells whether two are the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch

from bhfast.config import TrainConfig
from bhfast.engines.choose import select_engine
from bhfast.errors import StorageError, TraceError
from bhfast.machine import select_device
from bhfast.ops import extension
from bhfast.tokens import Corpus, load_corpus
from bhfast.trace import open_trace

UNRECORDED = {
    "checkpoint_every",
    "keyframes",
    "out",
    "overwrite",
    "quiet",
    "storage",
}  # settings that do not change the experiment
RESOLVED = ("corpus_sha256", "device", "engine", "files_sha256")  # compared in place of the settings they result from
RESOLVING = ("corpus", "tokenizer")  # those settings
FILES = ("rows", "start", "thermal_rows", "frozen_rows")  # settings that may name a file


def experiment_metadata(config: TrainConfig, corpus: Corpus, device: torch.device, engine: str) -> dict[str, str]:
    """Return the metadata that identify the experiment: its settings, and the corpus, device and engine they led to."""
    settings = {name: value for name, value in asdict(config).items() if name not in UNRECORDED}
    files = {name: digest for name in FILES if (digest := _sha256(settings[name]))}
    return {
        "config": json.dumps(settings),
        "corpus_sha256": corpus.sha256,
        "device": device.type,
        "engine": engine,
        **({"files_sha256": json.dumps(files)} if files else {}),
    }


def _sha256(setting: str | None) -> str | None:
    """Return the SHA-256 of the file that a setting names, in hexadecimal; None if it names none."""
    path = Path(setting or "")
    path = path if path.is_file() else Path((setting or "").rpartition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def corpus_of(config: TrainConfig) -> Corpus:
    """Load the corpus of a run; see :func:`bhfast.tokens.load_corpus`."""
    return load_corpus(
        config.corpus, vocab_size=config.vocab_size, window=config.context + 1, tokenizer=config.tokenizer
    )


def machine_metadata(engine: str) -> dict[str, str]:
    """Return the properties of this machine that change the order of summation, and therefore bits."""
    if engine == "native":
        return {"instruction_set": extension.native_instruction_sets()[0]}
    if engine == "resident":
        return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"threads": str(torch.get_num_threads())}


def require_same_experiment(path: Path, metadata: dict[str, str]) -> None:
    """Check that the trace at ``path`` is of the experiment that ``metadata`` describes.

    Raises:
        StorageError: it is of another experiment, or was not written by :func:`bhfast.train.train`.
    """
    way_out = "pass overwrite=True to replace it, or choose another file with out="
    try:
        changed = changed_settings(open_trace(path).metadata, metadata)
    except (TraceError, KeyError, ValueError):
        raise StorageError(f"{path} exists and is not a trace of bhfast", way_out) from None
    if changed:
        raise StorageError(f"{path} holds a run with other settings ({'; '.join(changed)})", way_out)


def changed_settings(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return which settings differ between the metadata of a trace and those of another, in words.

    Raises:
        KeyError, ValueError: the first were not written by :func:`bhfast.train.train`.
    """
    defaults = {entry.name: entry.default for entry in fields(TrainConfig)}
    old, new = (
        defaults | json.loads(x["config"]) | dict.fromkeys(RESOLVING) | {key: x.get(key) for key in RESOLVED}
        for x in (before, now)
    )
    old |= {name: new[name] for name in UNRECORDED}
    return [f"{name} {old.get(name)!r}, now {value!r}" for name, value in new.items() if old.get(name) != value]


def is_run_of(path: str | os.PathLike[str], config: TrainConfig) -> bool:
    """Return whether ``path`` is a complete trace of this experiment.

    Only the header, the recorded steps and the corpus are read. The settings ``checkpoint_every``, ``keyframes``,
    ``out``, ``overwrite``, ``quiet`` and ``storage`` are not compared: they do not change what is recorded.

    Raises:
        BhfastError: the corpus, the device or the engine is not available.
    """
    device, _ = select_device(config.device)
    engine, _ = select_engine(config.engine, device, config.demands())
    corpus = corpus_of(config)
    try:
        trace = open_trace(path)
        changed = changed_settings(trace.metadata, experiment_metadata(config, corpus, device, engine))
        last = int(trace.steps[-1])
    except (TraceError, IndexError, KeyError, ValueError):
        return False
    return not changed and last == config.steps // config.record_every * config.record_every
