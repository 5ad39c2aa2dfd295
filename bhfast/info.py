"""Says what is in a trace, and of which run it is, without reading its data.

    python -m bhfast.info FILE [--json]

FILE is a trace, the first file of one in parts, the ``.index.json`` of several files, the ``.partial`` of a run that
goes on or was killed, or any other safetensors file. Exits with 0, or with 2 if it cannot be read or is damaged as far
as its header shows; ``bhfast verify`` checks the data.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from bhfast.cli import run_program
from bhfast.config import TrainConfig
from bhfast.errors import MALFORMED, DamageError, TraceError, printable
from bhfast.locks import is_locked
from bhfast.trace import Trace, open_trace
from bhfast.trace.format import DTYPE_NAMES, FORMAT, format_bytes
from bhfast.trace.lazy import LazyTensor
from bhfast.trace.series import joined, open_parts
from bhfast.trace.sharded import INDEX_SUFFIX, read_index

SCHEMA = 1  # of the JSON; a change that could break a reader raises it
MAIN_SETTINGS = ("sigma", "seed", "steps", "optimizer", "lr", "batch_size", "vocab_size", "hidden_dim", "layers")
MADE_BY = ("engine", "device", "instruction_set", "gpu", "threads", "adam_rounding")  # keys of the metadata
VERSIONS = {"bhfast": "bhfast_version", "torch": "torch_version"}
MAX_SCALARS = 100
MAX_DEPTH = 20  # of the settings
MAX_TEXT = 80  # characters of one value in the text


@dataclass(frozen=True)
class FileInfo:
    """One of the files of a trace.

    Attributes:
        path: the file.
        bytes: its size; of a run that goes on, this includes the room that is reserved for later records.
        records: how many records it has; None if it has no ``recorded_steps``.
    """

    path: str
    bytes: int
    records: int | None


@dataclass(frozen=True)
class TensorInfo:
    """One tensor.

    Attributes:
        name: in the file.
        dtype: as safetensors calls it, such as ``BF16``.
        shape: of all records.
        bytes: of all records; those of a rebuilt tensor are not in the file.
        rows: how many chosen rows of the parameter were recorded; None if all were.
        rebuilt: whether the file has it at key frames only, and readers rebuild the rest.
    """

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    rows: int | None
    rebuilt: bool


@dataclass(frozen=True)
class Info:
    """What is in a trace; the object that ``bhfast info --json`` prints.

    What the trace does not say is None or empty. A number that is not finite is a string: ``inf``, ``-inf`` or ``nan``.

    Attributes:
        schema: version of this object.
        path: what was asked for.
        kind: ``file``, ``index`` (of several files), ``series`` (a trace in parts) or ``partial``.
        state: ``complete``; ``cut short``: it ends before the last step that was planned; ``ended``: it is not known
            how many steps were planned; ``going on``; ``killed``. None for files of other programs.
        written_by: ``bhfast train``, ``bhfast.Recorder`` or ``bhfast import``; None for another program.
        format_version: of the trace format.
        files: in their order.
        bytes: of all tensors that are in the files.
        records: how many there are.
        first_step, last_step: recorded.
        planned_steps: the last step that the run was to record.
        every: how many steps records are apart; None if that varies.
        keyframes: how many records key frames of a compact trace are apart; None for a full trace.
        record_checksums: whether there is a CRC-32 of every record, or every few. They are not compared.
        header_checksum: whether there is a CRC-32 of the header. It holds, or reading the file were an error.
        settings: of a run of ``bhfast train``.
        scalars: the values of tensors without axes.
        made_by: engine, device and what else bits depend on.
        versions: of ``bhfast`` and ``torch``.
        corpus, corpus_sha256: what the run was trained on.
        optimizer: its ``name``, ``arithmetic`` (None if it is not known to the bit) and the ``reason``.
        tensors: in the order of the trace.
        metadata: the keys of all metadata.
        missing: what other programs' files lack that a trace has, one sentence each.
    """

    schema: int
    path: str
    kind: str
    state: str | None
    written_by: str | None
    format_version: str | None
    files: list[FileInfo]
    bytes: int
    records: int | None
    first_step: int | None
    last_step: int | None
    planned_steps: int | None
    every: int | None
    keyframes: int | None
    record_checksums: bool
    header_checksum: bool
    settings: dict[str, Any]
    scalars: dict[str, Any]
    made_by: dict[str, str]
    versions: dict[str, str]
    corpus: str | None
    corpus_sha256: str | None
    optimizer: dict[str, Any]
    tensors: list[TensorInfo]
    metadata: list[str]
    missing: list[str]


# ---------------------------------------------------------------------------------------------------------------------
# What is in it


def inspect(path: Path) -> Info:
    """Return what is in a trace, or in any other safetensors file.

    Raises:
        TraceError: it cannot be read.
        DamageError: it is truncated, or its header was changed. (A kind of TraceError.)
    """
    kind, trace, files = _open(path)
    for file in files:
        if file.header_is_intact() is False:
            raise DamageError(f"{file.path} is corrupted: its header is not the one that was written")
    try:
        return _info(path, kind, trace, files)
    except TraceError:
        raise
    except OSError as error:
        raise TraceError(f"cannot read {error.filename}: {error.strerror}") from None
    except MALFORMED as error:
        raise DamageError(f"{path} is corrupted: its metadata do not fit its tensors ({error})") from None


def _open(path: Path) -> tuple[str, Trace, list[Trace]]:
    """Return the kind of a trace, the trace, and its files."""
    if path.suffix == ".partial":
        trace = open_trace(path)
        return "partial", trace, [trace]
    if path.name.endswith(INDEX_SUFFIX):
        index = read_index(path)
        return "index", index.trace, [*index.files.values()]
    parts = open_parts(path)
    return "file" if len(parts) == 1 else "series", joined(path, parts), parts


def _info(path: Path, kind: str, trace: Trace, files: Sequence[Trace]) -> Info:
    metadata, ends = trace.metadata, [own.metadata for own in files]
    is_trace = metadata.get("format") == FORMAT
    optimizer = (trace.optimizer or files[-1].optimizer) if is_trace else {}
    settings = trace.config if is_trace else {}
    state = _state_of_partial(path, trace) if kind == "partial" else None
    steps = _steps(trace)
    gaps = set() if steps is None else set(steps.diff().tolist())
    last = None if steps is None else int(steps[-1])
    planned = _planned(settings)
    return Info(
        schema=SCHEMA,
        path=str(path),
        kind=kind,
        state=state or (_state(last, planned) if is_trace else None),
        written_by=_written_by(metadata) if is_trace else None,
        format_version=metadata.get("format_version") if is_trace else None,
        files=[_file(own) for own in files],
        bytes=sum(_bytes(x) for own in files for name, x in own.items() if name not in own.rebuilt),
        records=None if steps is None else len(steps),
        first_step=None if steps is None else int(steps[0]),
        last_step=last,
        planned_steps=planned,
        every=gaps.pop() if len(gaps) == 1 else None,
        keyframes=int(metadata["keyframes"]) if is_trace and "keyframes" in metadata else None,
        record_checksums=all("crc32" in own for own in ends),
        header_checksum=all("header_crc32" in own for own in ends),
        settings=_plain(settings),
        scalars=_plain(_scalars(trace)),
        made_by={key: metadata[key] for key in MADE_BY if key in metadata},
        versions={name: metadata[key] for name, key in VERSIONS.items() if key in metadata},
        corpus=metadata.get("corpus"),
        corpus_sha256=metadata.get("corpus_sha256"),
        optimizer=_plain({key: optimizer.get(key) for key in ("name", "arithmetic", "reason")} if optimizer else {}),
        tensors=[*_tensors(trace, optimizer)],
        metadata=sorted(metadata),
        missing=[] if is_trace else [*_missing(trace, steps)],
    )


def _state_of_partial(path: Path, trace: Trace) -> str | None:
    """Return whether the run of a ``.partial`` goes on or was killed; None if it has ended in the meantime."""
    is_written = is_locked(path)
    trace.refresh()
    if trace.path != path:
        return None
    return "going on" if is_written else "killed"


def _state(last: int | None, planned: int | None) -> str:
    if planned is None or last is None:
        return "ended"
    return "complete" if last >= planned else "cut short"


def _planned(config: Mapping[str, Any]) -> int | None:
    steps, every = config.get("steps"), config.get("record_every")
    return steps // every * every if isinstance(steps, int) and isinstance(every, int) and every > 0 else None


def _written_by(metadata: Mapping[str, str]) -> str:
    return "bhfast train" if "config" in metadata else "bhfast import" if "imported" in metadata else "bhfast.Recorder"


def _steps(trace: Trace) -> torch.Tensor | None:
    """Return the recorded steps, if there are any."""
    steps = trace.get("recorded_steps")
    fits = steps is not None and steps.dim() == 1 and len(steps) and steps.dtype == torch.int64
    return trace.steps.as_subclass(torch.Tensor) if fits else None


def _file(trace: Trace) -> FileInfo:
    steps = _steps(trace)
    return FileInfo(str(trace.path), trace.path.stat().st_size, None if steps is None else len(steps))


def _bytes(tensor: Any) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _scalars(trace: Trace) -> dict[str, Any]:
    names = [name for name, x in trace.items() if not isinstance(x, LazyTensor) and not x.dim() and not x.is_complex()]
    return {name: trace[name].item() for name in names[:MAX_SCALARS]}


def _plain(value: Any, depth: int = 0) -> Any:
    """Return JSON that any program can read: without numbers that are not finite, and not nested too deep."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, dict):
        return {name: _plain(x, depth + 1) for name, x in value.items()}
    if isinstance(value, list):
        return [_plain(x, depth + 1) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _tensors(trace: Trace, optimizer: Mapping[str, Any]) -> Iterator[TensorInfo]:
    rows: dict[str, int] = {}
    for param, own in optimizer.get("params", {}).items():
        if f"{param}.rows" in trace:
            rows |= dict.fromkeys(own["keys"].values(), math.prod(trace[f"{param}.rows"].shape))
    for name, x in trace.items():
        own_rows = rows.get(name.removesuffix(".keyframes"))
        yield TensorInfo(name, DTYPE_NAMES[x.dtype], list(x.shape), _bytes(x), own_rows, name in trace.rebuilt)


def _missing(trace: Trace, steps: torch.Tensor | None) -> Iterator[str]:
    if steps is None:
        yield "no recorded_steps: it is not known which steps it holds"
    yield "no description of the optimizer: bhfast verify needs --optimizer and its settings"
    if "crc32" not in trace.metadata:
        yield "no checksums: damaged data cannot be found"
    said = {"settings": "config", "engine": "engine", "versions": "torch_version", "corpus": "corpus_sha256"}
    lacks = [what for what, key in said.items() if key not in trace.metadata]
    if lacks:
        yield f"no {', '.join(lacks)}: it is not known how to run it again"


# ---------------------------------------------------------------------------------------------------------------------
# How it is said


def text_lines(info: Info) -> Iterator[str]:
    """Yield what is in a trace as lines of text, safe to print."""
    yield _shown(info.path, None) + ": " + _headline(info)
    rows = {
        "steps": _said_steps(info),
        "size": _said_size(info),
        "form": _said_form(info),
        "run": _said_settings(info),
        "made by": _said({**info.made_by, **info.versions}),
        "corpus": " ".join(filter(None, [info.corpus, info.corpus_sha256 and f"SHA-256 {info.corpus_sha256}"])),
        "optimizer": _said_optimizer(info.optimizer),
        "checksums": _said_checksums(info),
    }
    for name, text in rows.items():
        if text:
            yield f"{name:<10} {_shown(text, None)}"
    for text in info.missing:
        yield f"{'missing':<10} {text}"
    if info.kind != "file":
        for file in info.files:
            records = "" if file.records is None else f", {file.records:,} records"
            yield f"{'file':<10} {_shown(file.path, None)}, {_size(file.bytes)}{records}"
    if info.tensors:
        yield ""
        yield from _table(info.tensors)


def _headline(info: Info) -> str:
    form = {"index": f"{len(info.files)} files, ", "series": f"{len(info.files)} parts, "}.get(info.kind, "")
    if info.written_by is None:
        return f"{form}a safetensors file of another program"
    state = {
        "ended": "ended; how many steps were planned is not recorded",
        "cut short": f"cut short: {info.planned_steps or 0:,} steps were planned",
        "going on": "its run is going on",
        "killed": f"its run was killed; bhfast recover {_shown(info.path, None)} makes a trace of it",
    }.get(str(info.state), str(info.state))
    return f"{form}a trace of {info.written_by}, {state}"


def _said_steps(info: Info) -> str:
    if info.records is None:
        return ""
    each = {None: "", 1: ""}.get(info.every, f", every {info.every or 0:,}")
    return f"{info.first_step:,} to {info.last_step:,}{each}; {info.records:,} records"


def _said_size(info: Info) -> str:
    size, disk = info.bytes, sum(file.bytes for file in info.files)
    what = "with the room for later records" if info.kind == "partial" else "with headers"
    return f"{_size(size)} of tensors, {_size(disk)} {what}"


def _size(count: int) -> str:
    return format_bytes(count) if count >= 1e6 else f"{count:,} bytes"


def _said_form(info: Info) -> str:
    if info.written_by is None:
        return ""
    if info.keyframes is None:
        return "full: what is recorded is there at every record"
    return f"compact: parameters and moments at every {info.keyframes:,}th record, the others are rebuilt"


def _said_settings(info: Info) -> str:
    if not info.settings:
        return _said(info.scalars)
    usual = {entry.name: entry.default for entry in fields(TrainConfig)}
    main = {name: info.settings[name] for name in MAIN_SETTINGS if name in info.settings}
    apart = {
        name: x
        for name, x in info.settings.items()
        if name not in (*main, "corpus", "device", "engine") and x != usual.get(name)
    }
    return _said({**main, **apart})


def _said_optimizer(optimizer: Mapping[str, Any]) -> str:
    if not optimizer:
        return ""
    known = optimizer["arithmetic"]
    replay = f"arithmetic {known}, can be replayed" if known else f"cannot be replayed: {optimizer['reason']}"
    return f"{optimizer['name']}, {replay}"


def _said_checksums(info: Info) -> str:
    if info.kind == "partial" and info.state in ("going on", "killed"):
        return "in the journal"
    found = ["of the records"] * info.record_checksums + ["of the header"] * info.header_checksum
    return " and ".join(found) or ("" if info.missing else "none")


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{_shown(name)} {_shown(x)}" for name, x in values.items())


def _shown(value: Any, most: int | None = MAX_TEXT) -> str:
    """Return a value from a file as text that is safe to print, and not too long."""
    text = printable(f"{value:g}" if isinstance(value, float) else str(value))
    return text if most is None or len(text) <= most else f"{text[:most]}…"


def _table(tensors: Iterable[TensorInfo]) -> Iterator[str]:
    cells = [("tensor", "dtype", "shape", "bytes", "")]
    for x in tensors:
        notes = ["" if x.rows is None else f"{x.rows:,} chosen rows", "rebuilt" if x.rebuilt else ""]
        shape = " × ".join(f"{size:,}" for size in x.shape) or "scalar"
        cells.append((_shown(x.name), x.dtype, shape, f"{x.bytes:,}", ", ".join(filter(None, notes))))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, dtype, shape, size, note in cells:
        line = f"{name:<{widths[0]}}  {dtype:<{widths[1]}}  {shape:<{widths[2]}}  {size:>{widths[3]}}  {note}"
        yield line.rstrip()


def as_json(info: Info) -> str:
    """Return everything as JSON, in ASCII and without control characters."""
    return json.dumps(asdict(info), allow_nan=False)


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast info", description="Say what is in a trace, and of which run it is, without reading its data."
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help=f"a trace, the {INDEX_SUFFIX} of several files, or a .partial"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return run_program(parser, _say, argv)


def _say(args: argparse.Namespace) -> int:
    info = inspect(args.file)
    print(as_json(info) if args.json else "\n".join(text_lines(info)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
