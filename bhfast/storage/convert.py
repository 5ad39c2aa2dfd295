"""Traces written anew in another form, file by file: one file, the parts of a series, or the files of an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bhfast.errors import StorageError, TraceError
from bhfast.trace import Trace, open_trace
from bhfast.trace.checksums import without_checksums
from bhfast.trace.format import KEYFRAME_STEPS
from bhfast.trace.opening import open_file
from bhfast.trace.series import open_parts, part_path, series_metadata
from bhfast.trace.sharded import INDEX_FORMAT, INDEX_SUFFIX, Index, read_index

Renaming = Callable[[Trace], Mapping[str, str]]
Writer = Callable[[Trace, Path, dict[str, str]], None]


def files_of(path: Path) -> list[Trace]:
    """Open the files that a trace consists of.

    Raises:
        TraceError: one cannot be read, or ``path`` is only one of the files of an index.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return [*read_index(path).files.values()]
    files = [open_trace(path)] if path.suffix == ".partial" else open_parts(path)
    if "shard" in files[0].metadata:
        raise TraceError(f"{path} is one of several files: name their {INDEX_SUFFIX}")
    return files


def size_of(path: Path) -> int:
    """Return how many bytes the files of a trace have."""
    return sum(trace.path.stat().st_size for trace in files_of(path))


def convert(path: Path, out: Path, write: Writer, renaming: Renaming, *, overwrite: bool) -> None:
    """Write a trace anew, file by file, and at last the index, if there is one.

    Args:
        path: the trace.
        out: the new one; of an index, the new index. Only a trace of one file may replace itself.
        write: makes one file; gets the old one, the name of the new one, and its metadata without checksums.
        renaming: returns the names that tensors of a file get, by their old names.
        overwrite: whether to replace an existing index.

    Raises:
        TraceError: the trace cannot be read, or ``out`` cannot be its new name.
        StorageError: the index exists, or cannot be written; and what ``write`` raises.
    """
    is_index = path.name.endswith(INDEX_SUFFIX)
    if is_index != out.name.endswith(INDEX_SUFFIX):
        raise TraceError(
            f"{path} is {'an' if is_index else 'no'} index of several files: --out must "
            f"{'' if is_index else 'not '}end with {INDEX_SUFFIX}, got {out}"
        )
    files = files_of(path)
    if len(files) > 1 and out.resolve() == path.resolve():
        raise TraceError(f"{path} has several files, which cannot replace themselves", "choose another out=")
    if is_index:
        if out.exists() and not overwrite:
            raise StorageError(f"the index {out} exists", "pass overwrite=True to replace it, or choose another out=")
        _convert_index(read_index(path), out, write, renaming)
        return
    for number, trace in enumerate(files, start=1):
        metadata = without_checksums(trace.metadata)
        if number > 1:
            metadata |= series_metadata(out, open_file(part_path(out, number - 1)))
        write(trace, part_path(out, number), metadata)


def _convert_index(index: Index, out: Path, write: Writer, renaming: Renaming) -> None:
    if len({len(trace.steps) for trace in index.files.values()}) > 1:
        raise TraceError(f"{index.trace.path}: its files have different numbers of records")
    names = dict(zip(sorted(index.files), file_names(whole_path(out), len(index.files)), strict=True))
    renamed: dict[str, str] = {}
    for file, trace in index.files.items():
        own = renaming(trace)
        write(trace, out.with_name(names[file]), _shard_metadata(trace, out.name, own))
        renamed |= own
    written = {name: open_file(out.with_name(name)) for name in names.values()}
    weight_map = {renamed.get(name, name): names[file] for name, file in index.weight_map.items()}
    weight_map |= {KEYFRAME_STEPS: weight_map["recorded_steps"]}
    shards = {}
    for name, shard in index.shards.items():
        new = renamed.get(name, name)
        parts = [{**part, "file": names[part["file"]]} for part in shard["parts"]]
        parts = [{**part, "shape": [*written[part["file"]][new].shape]} for part in parts]
        shards[new] = {"shape": [parts[0]["shape"][0], *shard["shape"][1:]], "parts": parts}
    write_index(out, {name: file for name, file in weight_map.items() if name in written[file]}, shards)


def _shard_metadata(trace: Trace, index: str, renamed: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a new file, with what it says of its part of the whole."""
    shard = trace.json("shard") | {"index": index}
    shard["tensors"] = {renamed.get(name, name): part for name, part in shard["tensors"].items()}
    return without_checksums(trace.metadata) | {"shard": json.dumps(shard)}


# ---------------------------------------------------------------------------------------------------------------------
# Names of several files, and their index


def whole_path(index: Path) -> Path:
    """Return the path of the whole trace, without numbers, from that of its index."""
    return index.with_name(index.name.removesuffix(INDEX_SUFFIX))


def file_names(path: Path, count: int) -> list[str]:
    """Return the names of the files of a trace in ``count`` files, as Hugging Face names those of a model."""
    return [f"{path.stem}-{number:05}-of-{count:05}{path.suffix}" for number in range(1, count + 1)]


def write_index(path: Path, weight_map: Mapping[str, str], shards: Mapping[str, Any]) -> None:
    """Write an index, as a whole or not at all; see :class:`bhfast.trace.sharded.Index`.

    Raises:
        StorageError: it could not be written.
    """
    content = {"metadata": {"format": INDEX_FORMAT}, "weight_map": weight_map, "shards": shards}
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"the files are saved, but writing the index {path} failed: {error.strerror}") from error
