"""Checkpoints: all that a run needs to go on from a step, beside its trace.

A checkpoint is a safetensors file: the parameters (``param.NAME``), the optimizer's state (``state.NAME.KEY``), and the
losses so far. Its metadata are those of the trace, the step, and checksums. All random numbers of a run follow from its
seeds and the step, so there is no state of a generator. A checkpoint is replaced as a whole: whenever the run is
killed, there is either the earlier one or the new one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bhfast.errors import MALFORMED, StorageError, TraceError
from bhfast.storage.files import sync_folder, write_at
from bhfast.trace.checksums import checksum_metadata, checksums, without_checksums
from bhfast.trace.format import bytes_of, encode_header, place
from bhfast.trace.opening import open_file

FORMAT = "bhfast-checkpoint"
VERSION = "1"
OWN_METADATA = ("format", "format_version", "step", "options")
WHOLE = 1 << 40  # records per checksum: a tensor has one


def checkpoint_path(trace: Path) -> Path:
    """Return where the checkpoint of a run is that records to ``trace``."""
    return trace.with_name(trace.name + ".checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        step: how many steps are done.
        tensors: on the CPU, by name; see :mod:`bhfast.checkpoint`.
        metadata: of the trace: what identifies the experiment.
        options: settings of the run that are not part of the experiment.
    """

    step: int
    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]
    options: dict[str, int | str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        losses: Tensor,
        metadata: Mapping[str, str],
        options: Mapping[str, int | str],
    ) -> Checkpoint:
        """Take a checkpoint. On a GPU this waits for all steps issued so far.

        Args:
            model, optimizer: after ``step`` steps.
            losses: float32 ``[step]``.
            metadata, options, step: see :class:`Checkpoint`.
        """
        params = dict(model.named_parameters())
        tensors: dict[str, Tensor] = {f"param.{name}": param for name, param in params.items()}
        for name, param in params.items():
            state = optimizer.state.get(param, {})
            tensors |= {f"state.{name}.{key}": value for key, value in state.items() if value is not None}
        copies = {name: x.detach().cpu().contiguous() for name, x in {**tensors, "losses": losses}.items()}
        return cls(step, copies, dict(metadata), dict(options))

    @property
    def losses(self) -> Tensor:
        """The loss of each step so far: float32 ``[step]``."""
        return self.tensors["losses"]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give a model and its optimizer this state.

        Args:
            model: gets its parameters in place.
            optimizer: of all its parameters.

        Raises:
            TraceError: the model has other parameters.
        """
        params = dict(model.named_parameters())
        wanted = {f"param.{name}": param.shape for name, param in params.items()}
        found = {name: x.shape for name, x in self.tensors.items() if name.startswith("param.")}
        if wanted != found:
            raise TraceError("the checkpoint is of another network than the one that its settings describe")
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(self.tensors[f"param.{name}"])
        groups = optimizer.state_dict()["param_groups"]
        names = {id(param): name for name, param in params.items()}
        order = [names[id(param)] for group in optimizer.param_groups for param in group["params"]]
        states = {i: self._state_of(name) for i, name in enumerate(order)}
        optimizer.load_state_dict({"state": {i: x for i, x in states.items() if x}, "param_groups": groups})

    def _state_of(self, param: str) -> dict[str, Tensor]:
        prefix = f"state.{param}."
        keys = [name for name in self.tensors if name.startswith(prefix) and "." not in name[len(prefix) :]]
        return {name[len(prefix) :]: self.tensors[name] for name in keys}

    def write(self, path: Path) -> None:
        """Write the file ``path``, or replace it at once by a complete one.

        Raises:
            StorageError: the disk is full or failed; an earlier checkpoint is still there.
        """
        unfinished = _unfinished(path)
        own = {"format": FORMAT, "format_version": VERSION, "step": str(self.step), "options": json.dumps(self.options)}
        entries = place(self.tensors)
        sums = {name: checksums(self.tensors[name], WHOLE) for name in entries}
        header = encode_header(entries, {**self.metadata, **own, **checksum_metadata(sums, WHOLE)})
        try:
            with open(unfinished, "wb", buffering=0) as file:
                write_at(file.fileno(), memoryview(header), 0)
                for name, entry in entries.items():
                    write_at(file.fileno(), bytes_of(self.tensors[name]), len(header) + entry.offset)
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink()
            raise StorageError(
                f"cannot write the checkpoint {path}: {error.strerror}; make room, then go on with --resume"
            ) from error
        sync_folder(path.parent)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        TraceError: it is missing, damaged, or not a checkpoint.
    """
    file = open_file(path)
    if file.metadata.get("format") != FORMAT:
        raise TraceError(f"{path} is not a checkpoint of bhfast")
    if file.header_is_intact() is not True or any(file.damage()):
        raise TraceError(f"the checkpoint {path} is damaged: a checksum does not match; nothing can go on from it")
    if file.metadata["format_version"] != VERSION:
        raise TraceError(f"the checkpoint {path} is not of version {VERSION}: use the bhfast that wrote it")
    try:
        metadata = without_checksums(file.metadata)
        step, options = int(metadata["step"]), json.loads(metadata["options"])
    except MALFORMED as error:
        raise TraceError(f"{path} is not a checkpoint of bhfast ({error})") from None
    tensors = {name: file[name][...].as_subclass(Tensor).clone() for name in file}
    return Checkpoint(step, tensors, {k: text for k, text in metadata.items() if k not in OWN_METADATA}, options)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint that nothing can go on from any more, if there is one."""
    for file in (path, _unfinished(path)):
        with suppress(OSError):
            file.unlink()


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".unfinished")
