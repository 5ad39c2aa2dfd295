"""Reads a trace of one file: the file is mapped into memory, and slicing a tensor reads only that slice."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bhfast.errors import DamageError, TraceError, printable
from bhfast.trace.checksums import checksums
from bhfast.trace.format import (
    DTYPE_NAMES,
    FORMAT,
    HEADER_CHECKSUM,
    MAX_SIZE,
    format_bytes,
    header_checksum,
    parse_json,
)
from bhfast.trace.lazy import LazyTensor

MAX_SHOWN = 100  # tensors


class Trace(Mapping[str, Any]):
    """A trace file, mapped into memory: a mapping from names to tensors. Slicing a tensor reads only that slice.

    A tensor stays valid when the Trace is gone. Writing to one changes a private copy in memory, never the file. A tied
    parameter is found under each of its names, and listed under the first one.

    Attributes:
        path: the file.
        metadata: the header's ``__metadata__``.
        config: the settings of a run of ``bhfast.train``; empty for other files.
        optimizer: the description of the optimizer and its parameters that :class:`bhfast.Recorder` wrote, for a
            replay; several optimizers are described as one. Empty for other files.
        rebuilt: the tensors of all steps that the file holds at key frames only, by name.
        keyframes: what is known of each parameter that the file holds at key frames only, by its name.
        logged: has the values that were recorded once per step: the trace itself, or, for one of several files, the
            trace that joins them.
    """

    def __init__(
        self, path: Path, tensors: dict[str, Any], metadata: dict[str, str], header: dict[str, Any] | None = None
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.config: dict[str, Any] = self.json("config")
        self.optimizer: dict[str, Any] = self.json("optimizer")
        self.keyframes: Mapping[str, Any] = {}
        self.logged: Mapping[str, Any] = self
        self._tied: dict[str, Any] = self.json("tied")
        self._tensors = tensors
        self.rebuilt: dict[str, LazyTensor] = {}
        self._header = header

    def add_keyframes(self, params: Mapping[str, Any]) -> None:
        """Have parameters and moments of all steps, of parameters that the file holds at key frames only.

        Args:
            params: :class:`bhfast.trace.rebuilt.KeyframedParam` by the name of the parameter.
        """
        self.keyframes = params
        self.rebuilt = {name: tensor for own in params.values() for name, tensor in own.tensors().items()}

    def json(self, key: str) -> dict[str, Any]:
        """Parse the JSON object under ``key`` of the metadata.

        Returns:
            The object; an empty one if there is none.

        Raises:
            DamageError: it is not a JSON object, in a file that bhfast wrote.
        """
        what = f"{self.path} is corrupted: the metadata's {key}"
        try:
            value = parse_json(what, self.metadata.get(key, "{}"))
            if not isinstance(value, dict):
                raise TraceError(f"{what} is not a JSON object")
        except TraceError as error:
            if self.metadata.get("format") == FORMAT:
                raise DamageError(str(error)) from None
            return {}  # another program's files may have anything there
        return value

    def __getitem__(self, name: str) -> Any:
        try:
            own = name if name in self._tensors or name in self.rebuilt else self._tied[name]
            return self._tensors[own] if own in self._tensors else self.rebuilt[own]
        except (KeyError, TypeError):
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {', '.join(self)}") from None

    def __iter__(self) -> Iterator[str]:
        yield from self.rebuilt
        yield from self._tensors

    def __len__(self) -> int:
        return len(self.rebuilt) + len(self._tensors)

    @property
    def is_live(self) -> bool:
        """Whether the run has not ended, as far as the last :meth:`refresh` has seen."""
        return False

    def refresh(self) -> int:
        """If the trace is that of a run that is still going on, show what is committed now; else change nothing.

        Returns:
            The number of records.
        """
        return len(self.steps)

    @property
    def steps(self) -> Tensor:
        """The recorded steps, int64 ``[R]``."""
        return self["recorded_steps"][:]

    def header_is_intact(self) -> bool | None:
        """Compare names, dtypes, shapes, offsets and metadata with their checksum.

        Returns:
            Whether they agree. None if the file has no checksum of its header, as in format version 1, files of other
            programs, and an index. False if it should have one: a file of bhfast, or one with checksums of records,
            that is not of version 1.
        """
        if self._header is None:
            return None
        if HEADER_CHECKSUM in self.metadata:
            return self.metadata[HEADER_CHECKSUM] == header_checksum(self._header)
        is_version_1 = self.metadata.get("format") == FORMAT and self.metadata.get("format_version") == "1"
        is_lost = "crc32" in self.metadata or self.metadata.get("format") == FORMAT
        return False if is_lost and not is_version_1 else None

    def damage(self) -> Iterator[tuple[str, int | None]]:
        """Compare all data with the checksums in the metadata; yield each damaged tensor and record.

        The record is an index along axis 0: the first of those that share the checksum. It is None for tensors of at
        most one axis. Yields nothing if the file has no checksums.

        Raises:
            DamageError: the checksums themselves are damaged, or a tensor has none.
        """
        if "crc32" not in self.metadata:
            return
        try:
            each = int(self.metadata.get("crc32_records", "1"))
            wanted = {k: np.frombuffer(base64.b64decode(v), dtype="<u4") for k, v in self.json("crc32").items()}
            fits = 0 < each < MAX_SIZE and wanted.keys() == self._tensors.keys()
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise DamageError(f"{self.path} is corrupted: its checksums cannot be read, or do not fit its tensors")
        for name, sums in wanted.items():
            tensor = self._tensors[name]
            wants = -(-len(tensor) // each) if tensor.dim() > 1 and len(tensor) else 1
            if len(sums) != wants:
                raise DamageError(f"{self.path} is corrupted: {len(sums)} checksums for {name}, wanted {wants}")
            for record in np.flatnonzero(checksums(tensor, each) != sums):
                yield name, int(record) * each if tensor.dim() > 1 else None

    # -----------------------------------------------------------------------------------------------------------------
    # How it is shown

    def _about(self) -> str:
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in self._tensors.values())
        about = [printable(self.path), *(["not ended"] if self.is_live else [])]
        steps = self._tensors.get("recorded_steps")
        if steps is not None and steps.dim() == 1 and len(steps) and steps.dtype == torch.int64:
            about.append(f"{len(steps):,} records, steps {int(steps[0]):,} to {int(steps[-1]):,}")
        return ", ".join([*about, format_bytes(size)])

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield name, dtype, shape and origin of each tensor; of very many, the first ones and how many follow."""
        for name in islice(self, MAX_SHOWN):
            origin = "rebuilt" if name in self.rebuilt else ""
            yield printable(name), DTYPE_NAMES[self[name].dtype], str(list(self[name].shape)), origin
        if len(self) > MAX_SHOWN:
            yield f"... and {len(self) - MAX_SHOWN:,} more", "", "", ""

    def __repr__(self) -> str:
        rows = [f"  {name:<16} {dtype:<5} {shape} {origin}".rstrip() for name, dtype, shape, origin in self._rows()]
        return "\n".join([f"Trace({self._about()})", *rows])

    def _repr_html_(self) -> str:
        """Return the same as a table, for notebooks."""
        head = "".join(f"<th>{text}</th>" for text in ("tensor", "dtype", "shape", ""))
        rows = ["".join(f'<td style="text-align: left">{escape(text)}</td>' for text in row) for row in self._rows()]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<p>Trace: {escape(self._about())}</p><table><tr>{head}</tr>{body}</table>"

    def _ipython_key_completions_(self) -> list[str]:
        """Return what a notebook offers after ``trace[``."""
        return list(self)
