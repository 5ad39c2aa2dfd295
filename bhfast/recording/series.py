"""A recording that goes on with an earlier trace: in a new part, from a state that the trace has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bhfast.errors import ConfigError, StorageError
from bhfast.recording.fields import RecordedField
from bhfast.recording.followers import Followers
from bhfast.recording.shards import RankPartition
from bhfast.recording.slots import RecordSlots
from bhfast.trace.recorded import RecordedTensor
from bhfast.trace.series import continues, joined, open_parts, part_path, series_metadata, state_that_differs


class Seam:
    """Where a recording goes on with an earlier trace.

    Args:
        path: the trace; its first part, if it has several.
        start_step: the step to go on from, which the trace must have recorded; None for its last one.

    Attributes:
        path: of the part that the recording becomes.
        step: of its record 0.
        metadata: of the part, about the series.
        logged: the tensors that the trace has besides fields, as they were recorded.

    Raises:
        ConfigError: the trace has no record of that step.
        TraceError: it cannot be read.
    """

    def __init__(self, path: Path, start_step: int | None) -> None:
        parts = open_parts(path)
        self._trace = joined(path, parts)
        self._optimizer = parts[-1].optimizer
        if not self._optimizer or not len(self._trace.get("recorded_steps", ())):
            raise ConfigError(f"append=True needs a trace of Recorder at {path}, and this file is not one")
        self.path = part_path(path, len(parts) + 1)
        self.metadata = series_metadata(path, parts[-1])
        steps = self._trace.steps.as_subclass(Tensor)
        self.step = int(steps[-1]) if start_step is None else start_step
        self._record = int(torch.searchsorted(steps, self.step))
        if self._record == len(steps) or int(steps[self._record]) != self.step:
            raise ConfigError(
                f"{path} cannot be continued from step {self.step}: it has the steps {int(steps[0])} to "
                f"{int(steps[-1])}{self._every_text}; start from one of these"
            )
        fields = {key for param in self._optimizer["params"].values() for key in param["keys"].values()}
        self.logged = {
            name: RecordedTensor(name, tuple(x.shape[1:]), x.dtype)
            for name, x in self._trace.items()
            if name not in fields and x.dim() and len(x) == len(steps)
        }

    @property
    def _every(self) -> int | None:
        steps = self._trace.steps
        return int(steps[1] - steps[0]) if len(steps) > 1 else None

    @property
    def _every_text(self) -> str:
        return f", every {self._every}" if self._every and self._every > 1 else ""

    def require_same(self, followers: Followers, rows: Mapping[str, Tensor], slots: RecordSlots) -> None:
        """Raise ConfigError unless the recording has the parameters, rows, fields and intervals of the trace."""
        trace, described = self._trace, self._optimizer
        self._require("every", self._every or slots.every, slots.every)
        self._require("keyframes", int(trace.metadata.get("keyframes", 0)) or None, slots.keyframes)
        keys = {name: dict(param["keys"]) for name, param in described["params"].items()}
        own = followers.keys()
        self._require("parameters", sorted(keys), sorted(own))
        for name, recorded in keys.items():
            self._require(f"fields of {name}", recorded, dict(own[name]))
            self._require(f"rows of {name}", _listed(trace.get(f"{name}.rows")), _listed(rows.get(name)))
        for field in followers.fields.values():
            recorded_tensor = trace[field.key]
            self._require(f"the shape of {field.key}", list(recorded_tensor.shape[1:]), list(field.tensor.shape))
            self._require(f"the dtype of {field.key}", recorded_tensor.dtype, field.tensor.dtype)
        groups = [group for follower in followers.each for group in follower.optimizer.param_groups]
        count = 1 + max(param.get("optimizer", 0) for param in described["params"].values())
        self._require("the number of optimizers", count, len(followers.each))
        self._require("the number of parameter groups", len(described["groups"]), len(groups))

    def _require(self, what: str, recorded: object, wanted: object) -> None:
        if recorded != wanted:
            raise ConfigError(
                f"append=True must record {self._trace.path} as before: {what} was {recorded}, and is {wanted} now"
            )

    def require_same_state(self, slots: RecordSlots, fields: Iterable[RecordedField]) -> None:
        """Raise ConfigError unless record 0, which is in its slots, is the state that the trace has, bit for bit."""
        values = {field.key: slots.slot(field.name).cpu() for field in fields if field.field != "grad"}
        if name := state_that_differs(self._trace, self._record, values):
            raise ConfigError(
                f"append=True must start from the state that {self._trace.path} has at step {self.step}, but {name} "
                "differs from it; load the model and the optimizer's state of that step, or pass start_step= if they "
                "are of another one"
            )


def find_seam(partition: RankPartition, start_step: int | None) -> Seam | None:
    """Return where a recording goes on with the trace at its path, and let it write the next part; None: no trace.

    Args:
        partition: what this process records.
        start_step: see :class:`Seam`.

    Raises:
        ConfigError: parameters are sharded; or see :class:`Seam`.
    """
    if partition.is_sharded:
        raise ConfigError("append=True takes parameters that are not sharded; record to a new path= instead")
    if not partition.path.exists():
        return None
    seam = Seam(partition.path, start_step)
    partition.path = seam.path
    return seam


def _listed(rows: Tensor | None) -> list[int] | None:
    return None if rows is None else rows.tolist()


def require_no_parts(path: Path) -> None:
    """Raise StorageError if a file continues the trace ``path``, which a new recording is to write."""
    second = part_path(path, 2)
    if continues(second, path):
        raise StorageError(
            f"{second} continues the trace {path}: go on with it (append=True), move all its parts away, or choose "
            "another file"
        )
