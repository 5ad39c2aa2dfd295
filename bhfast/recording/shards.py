"""A recording by several processes: who records what, and the index that joins their files.

The files follow the convention of Hugging Face for sharded safetensors: ``run-00001-of-00004.safetensors`` and so on,
and ``run.safetensors.index.json``, whose ``weight_map`` says which file a tensor is in. A tensor that several files
share, each with a part of its rows or columns, is further described under ``shards``: its whole shape, and file, offset
and shape of each part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from bhfast.errors import BhfastError, ConfigError, StorageError
from bhfast.recording.selection import Selection
from bhfast.trace.sharded import INDEX_FORMAT, INDEX_SUFFIX


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: of a DTensor its local part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class Piece:
    """What this process records of a parameter.

    Attributes:
        name: under which it is recorded.
        param: the parameter.
        rows: indices of the local part along axis 0; None for all of it.
        chosen: those of the whole parameter that the user asked for.
        shape: of a record of the whole.
        offset: where in it the piece starts.
    """

    name: str
    param: Tensor
    rows: Tensor | None
    chosen: Tensor | None
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class Share:
    """What this process records, and where to.

    Args:
        selections: what all processes together record.
        path: of the trace as a whole.

    Attributes:
        pieces: this process's part.
        path: of its file; final after :meth:`meet`.
        index: of the index of all files; None if there is one file.
        is_empty: whether it records nothing, and writes no file.
    """

    def __init__(self, selections: Sequence[Selection], path: Path) -> None:
        is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        self.rank, self.world = (
            (0, 1) if is_alone else (torch.distributed.get_rank(), torch.distributed.get_world_size())
        )
        self.whole_path = self.path = path
        self.is_sharded = self.world > 1 and any(_is_sharded(selection.param) for selection in selections)
        self.index = path.with_name(path.name + INDEX_SUFFIX) if self.is_sharded else None
        found = [_piece(selection, self.rank) for selection in selections]
        self.pieces = [piece for piece in found if piece is not None]
        self.is_empty = self.rank > 0 and not self.pieces
        self._parts: dict[str, list[dict[str, Any]]] = {}  # by tensor; of all processes

    def meet(self, tensors: Mapping[str, Piece], shapes: Mapping[str, Sequence[int]]) -> None:
        """Learn what the others record, if the recording is sharded.

        Args:
            tensors: by name in the file, the piece that each is of.
            shapes: of a record of each.
        """
        if not self.is_sharded:
            return
        own = {
            key: {"shape": list(piece.shape), "offset": list(piece.offset), "part": list(shapes[key])}
            for key, piece in tensors.items()
        }
        everyone: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everyone, None if self.is_empty else own)
        writers = [rank for rank, plan in enumerate(everyone) if plan is not None]
        path = self.whole_path
        files = {
            rank: f"{path.stem}-{number:05}-of-{len(writers):05}{path.suffix}"
            for number, rank in enumerate(writers, start=1)
        }
        for rank, file in files.items():
            for key, part in everyone[rank].items():
                self._parts.setdefault(key, []).append({"file": file, **part})
        if not self.is_empty:
            self.path = path.with_name(files[self.rank])

    def metadata(self) -> dict[str, str]:
        """Return what the metadata of this process's file say of the whole."""
        if self.index is None:
            return {}
        own = {
            key: {name: part[name] for name in ("shape", "offset")}
            for key, parts in self._parts.items()
            for part in parts
            if part["file"] == self.path.name
        }
        return {"shard": json.dumps({"index": self.index.name, "tensors": own})}

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

    def finish(self, path: Path, names: Sequence[str], records: int) -> Path:
        """Write the index, if there is one to write, when the file of this process is at ``path``.

        Args:
            path: of the file.
            names: of its tensors.
            records: how many it has.

        Returns:
            Where the whole trace is.
        """
        if self.index is None:
            return path
        if self.rank == 0:
            weight_map = {name: self.path.name for name in names} | {
                key: parts[0]["file"] for key, parts in self._parts.items()
            }
            shards = {
                key: {
                    "shape": [records, *parts[0]["shape"]],
                    "parts": [
                        {"file": part["file"], "offset": [0, *part["offset"]], "shape": [records, *part["part"]]}
                        for part in parts
                    ],
                }
                for key, parts in self._parts.items()
            }
            content = {"metadata": {"format": INDEX_FORMAT}, "weight_map": weight_map, "shards": shards}
            temporary = self.index.with_name(self.index.name + ".partial")
            temporary.write_text(json.dumps(content, indent=1))
            temporary.replace(self.index)
        return self.index


def _is_sharded(param: Tensor) -> bool:
    return any(not placement.is_replicate() for placement in getattr(param, "placements", ()))


def _piece(selection: Selection, rank: int) -> Piece | None:
    """Return what this process records of a selection; None if others record it."""
    name, rows = selection.name, selection.rows
    param: Any = selection.param  # a DTensor, or not
    shape, offset = list(param.shape), [0] * param.dim()
    own_rows = rows
    if not _is_sharded(param):
        if rank > 0:
            return None
    else:
        if any(placement.is_partial() for placement in param.placements):
            raise ConfigError(
                f"parameter {name} is a partial sum on each rank; only shards and replicas can be recorded"
            )
        mesh = param.device_mesh
        is_replica = any(p.is_replicate() and mesh.get_local_rank(i) for i, p in enumerate(param.placements))
        if is_replica or local(param).numel() == 0:
            return None
        chunks = param.__create_chunk_list__()  # the protocol of torch.distributed.checkpoint
        if len(chunks) != 1:
            raise ConfigError(
                f"parameter {name} has {len(chunks)} separate parts on rank {rank}; only one can be recorded"
            )
        offset = list(chunks[0].offsets)
        if rows is not None:
            first, last = offset[0], offset[0] + chunks[0].sizes[0]
            if last - first < shape[0]:
                if bool((rows[1:] <= rows[:-1]).any()):
                    raise ConfigError(f"rows[{name!r}] must be increasing, as the parameter is sharded")
                own_rows = rows[(first <= rows) & (rows < last)] - first
                offset[0] = int((rows < first).sum())
                if len(own_rows) == 0:
                    return None
    if rows is not None:
        shape[0] = len(rows)
    return Piece(name, param, own_rows, rows, tuple(shape), tuple(offset))
