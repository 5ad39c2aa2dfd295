"""Which experiment a trace is of, and whether two are the same."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from bhfast.config import TrainConfig
from bhfast.corpus import Corpus, load_corpus
from bhfast.engines.choose import select_engine
from bhfast.errors import StorageError, TraceError
from bhfast.machine import select_device
from bhfast.ops import extension
from bhfast.trace import Trace, open_trace

# What may differ between two runs of one experiment, and is not recorded; corpus, device and engine are compared as the
# run resolved them.
NOT_SETTINGS = {"out", "overwrite", "quiet", "storage"}
RESOLVED = ("corpus_sha256", "device", "engine")


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
        return {"instruction_set": extension.native_instruction_sets()[0]}
    return {"threads": str(torch.get_num_threads())}


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
