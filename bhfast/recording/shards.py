"""A recording by several processes: who records what, and the index that joins their files.

The files follow the convention of Hugging Face for sharded safetensors: ``run-00001-of-00004.safetensors`` and so on,
and ``run.safetensors.index.json``, whose ``weight_map`` says which file a tensor is in. If several files share a
tensor, each with a part of its rows or columns, ``shards`` describes it: its whole shape, and the file, offset and
shape of each part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from bhfast.errors import BhfastError, ConfigError, StorageError
from bhfast.recording.fields import RecordedField, RecordedParam, local
from bhfast.storage.convert import file_names, write_index
from bhfast.trace.format import AFTER_STEP, CHANGED
from bhfast.trace.sharded import INDEX_SUFFIX


class RankPartition:
    """What this process records, and the file it writes.

    Args:
        params: what all processes together record.
        path: the path of the whole trace, without a number.

    Attributes:
        params: the part of them that this process records.
        path: the file of this process; final after :meth:`meet`.
        index: path of the index of all files; None if there is one file.
        is_sharded: whether each process writes a file of its own.
        is_empty: whether this process records nothing, and writes no file.
    """

    def __init__(self, params: Sequence[RecordedParam], path: Path) -> None:
        is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        self.rank, self.world = (
            (0, 1) if is_alone else (torch.distributed.get_rank(), torch.distributed.get_world_size())
        )
        self.whole_path = self.path = path
        self.is_sharded = self.world > 1 and any(_is_sharded(of.param) for of in params)
        self.index = path.with_name(path.name + INDEX_SUFFIX) if self.is_sharded else None
        self.params = [part for of in params if (part := _part(of, self.rank)) is not None]
        self.is_empty = self.rank > 0 and not self.params
        self._parts: dict[str, list[dict[str, Any]]] = {}  # by tensor: the parts of all processes

    def require_gradients_of(self, unclipped: bool, model: nn.Module | None) -> None:
        """Raise ConfigError if sharded parameters' gradients are wanted unclipped, but no ``model`` says when."""
        if unclipped and model is None and any(_is_sharded(of.param) for of in self.params):
            raise ConfigError("unclipped=True needs model= if parameters are sharded")

    def meet(self, fields: Mapping[str, RecordedField]) -> None:
        """If the recording is sharded, exchange with the other processes what each one records.

        Args:
            fields: by name in the file.
        """
        if not self.is_sharded:
            return
        own = {name: _describe(field) for name, field in fields.items()}
        everyone: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everyone, None if self.is_empty else own)
        writers = [rank for rank, plan in enumerate(everyone) if plan is not None]
        files = dict(zip(writers, file_names(self.whole_path, len(writers)), strict=True))
        self._first_file = files[0]
        for rank, file in files.items():
            for key, part in everyone[rank].items():
                self._parts.setdefault(key, []).append({"file": file, **part})
        if not self.is_empty:
            self.path = self.whole_path.with_name(files[self.rank])

    def add(self, field: RecordedField) -> None:
        """Add a tensor that is sharded like its parameter, in every process that records a part of that parameter.

        Rank 0 writes the index, so it must be one of these processes; else only the metadata of this process's file
        name the tensor.
        """
        for parts in [parts for parts in self._parts.values() if parts[0]["param"] == field.of.name][:1]:
            if any(part["file"] == self._first_file for part in parts):
                self._parts[field.name] = parts

    def metadata(self, names: Iterable[str] = ()) -> dict[str, str]:
        """Return the metadata of this process's file about its part of the whole.

        Args:
            names: of the tensors in the file.
        """
        if self.index is None:
            return {}
        own = {
            key: {name: part[name] for name in ("shape", "offset")}
            for key, parts in self._parts.items()
            for part in parts
            if part["file"] == self.path.name
        }
        shard: dict[str, Any] = {"index": self.index.name, "tensors": own}
        if unlisted := sorted(name for name in set(names) - own.keys() if self.rank > 0 or self._is_of_part(name)):
            shard["unlisted"] = unlisted
        return {"shard": json.dumps(shard)}

    def _is_of_part(self, name: str) -> bool:
        """Whether a tensor says what a loop changed in this process's part of another: each file has its own."""
        return name not in self._parts and name.removesuffix(CHANGED).removesuffix(AFTER_STEP) in self._parts

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Raise in every process what the block raises in one of them.

        Raises:
            StorageError: the block failed elsewhere.
        """
        error = None
        try:
            yield
        except BhfastError as raised:
            error = raised
        if self.world > 1:
            errors: list[Any] = [None] * self.world
            torch.distributed.all_gather_object(errors, error and str(error))
            for rank, text in enumerate(errors):
                if text is not None and error is None:
                    error = StorageError(f"rank {rank}: {text}")
        if error is not None:
            raise error

    def finish(self, path: Path, names: Sequence[str], records: int, frames: int) -> Path:
        """In a sharded recording, write the index, from rank 0.

        Args:
            path: the finished file of this process.
            names: the names of its tensors.
            records: how many records it has.
            frames: how many of them are key frames.

        Returns:
            Where the whole trace is.

        Raises:
            StorageError: the index could not be written.
        """
        if self.index is None:
            return path
        if self.rank == 0:
            weight_map = {name: self.path.name for name in names if not self._is_of_part(name)} | {
                key: parts[0]["file"] for key, parts in self._parts.items()
            }
            for parts in self._parts.values():
                if parts[0]["has_rows"]:
                    weight_map.setdefault(f"{parts[0]['param']}.rows", parts[0]["file"])
            shards = {}
            for key, parts in self._parts.items():
                length = frames if parts[0]["is_keyframed"] else records
                shards[key] = {
                    "shape": [length, *parts[0]["shape"]],
                    "parts": [
                        {"file": part["file"], "offset": [0, *part["offset"]], "shape": [length, *part["part"]]}
                        for part in parts
                    ],
                }
            write_index(self.index, weight_map, shards)
        return self.index


def _is_sharded(param: Tensor) -> bool:
    return any(not placement.is_replicate() for placement in getattr(param, "placements", ()))


def _describe(field: RecordedField) -> dict[str, Any]:
    """Return where this process's part of a tensor lies in the whole."""
    of = field.of
    return {
        "param": of.name,
        "has_rows": of.all_rows is not None,
        "is_keyframed": field.is_keyframed,
        "shape": list(of.shape),
        "offset": list(of.offset),
        "part": list(field.tensor.shape),
    }


def _part(of: RecordedParam, rank: int) -> RecordedParam | None:
    """Return the part of a parameter that this process records; None if only others record it."""
    if not _is_sharded(of.param):
        return of if rank == 0 else None
    param: Any = of.param  # a DTensor
    if any(placement.is_partial() for placement in param.placements):
        raise ConfigError(
            f"parameter {of.name} is a partial sum on each rank; only shards and replicas can be recorded"
        )
    is_replica = any(p.is_replicate() and param.device_mesh.get_local_rank(i) for i, p in enumerate(param.placements))
    if is_replica or local(param).numel() == 0:
        return None
    chunks = param.__create_chunk_list__()  # the protocol of torch.distributed.checkpoint
    if len(chunks) != 1:
        raise ConfigError(
            f"parameter {of.name} has {len(chunks)} separate parts on rank {rank}; only one can be recorded"
        )
    offset, rows = list(chunks[0].offsets), of.all_rows
    if rows is not None:
        first, last = offset[0], offset[0] + chunks[0].sizes[0]
        own_rows = rows
        if last - first < param.shape[0]:
            if bool((rows[1:] <= rows[:-1]).any()):
                raise ConfigError(f"rows[{of.name!r}] must be increasing, as the parameter is sharded")
            own_rows = rows[(first <= rows) & (rows < last)] - first
            offset[0] = int((rows < first).sum())
            if len(own_rows) == 0:
                return None
        return replace(of, rows=own_rows, offset=tuple(offset))
    return replace(of, offset=tuple(offset))
