"""The followers of all optimizers of a recording: what they do together, and what the trace says of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from bhfast.errors import ConfigError
from bhfast.recording.cycle import StepCycle
from bhfast.recording.fields import FieldPlan, RecordedField, local
from bhfast.recording.hooks import OptimizerFollower
from bhfast.recording.optimizer_description import joined_descriptions
from bhfast.recording.shards import RankPartition


class Followers:
    """Follow the optimizers of a recording.

    Args:
        plans: what to record of each.
        cycle: the steps of the recording.
        partition: what this process records.
        tied: for each further name of a parameter, the name it is recorded under.
        unclipped: see :class:`bhfast.recording.hooks.OptimizerFollower`.

    Attributes:
        each: one for each optimizer.
        fields: what is recorded of all, by name in the file.

    Raises:
        ConfigError: two tensors would get the same name.
    """

    def __init__(
        self,
        plans: Sequence[FieldPlan],
        cycle: StepCycle,
        partition: RankPartition,
        tied: Mapping[str, str],
        *,
        unclipped: bool,
    ) -> None:
        names = [name for plan in plans for field in plan.at_start for name in {field.name, field.key}]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"keys must give every tensor a name of its own, got {', '.join(sorted(twice))} twice")
        self.each = [
            OptimizerFollower(plan, cycle, unclipped=unclipped, on_new_field=self._take_new_field) for plan in plans
        ]
        cycle.followers += self.each
        self._cycle = cycle
        self._slots = cycle.slots
        self._partition = partition
        self._tied = tied

    @property
    def fields(self) -> dict[str, RecordedField]:
        return {name: field for follower in self.each for name, field in follower.fields.items()}

    def record_start(self) -> None:
        """Write record 0."""
        for follower in self.each:
            follower.record_start()
            follower.description.on_unknown = self._describe

    @contextmanager
    def following(self, model: nn.Module | None) -> Iterator[None]:
        """Record the optimizers' steps inside the block."""
        with ExitStack() as stack:
            for follower in self.each:
                stack.enter_context(follower.following(model))
            self._slots.on_recount = self._record_fused
            self._slots.on_by_hand = lambda: [own for follower in self.each for own in follower.by_hand()]
            self._slots.on_keyframe = self._record_keyframe
            self._slots.on_last = self._record_last_keyframe
            self._slots.on_commit = self._cycle.record_changes
            self._slots.on_carry = self._take_state
            yield

    def _take_state(self) -> dict[str, Tensor]:
        """Take parameters and state for what the last step has left; return them by the names that readers find."""
        for follower in self.each:
            follower.note_state()
        return {
            field.key: field.of.part_of(value.detach())
            for follower in self.each
            for field in follower.fields.values()
            if field.field != "grad" and (value := follower.plan.value_of(field)) is not None
        }

    def _record_fused(self) -> None:
        for follower in self.each:
            follower.record_fused()

    def _describe(self) -> None:
        self._slots.set_metadata(self.metadata())

    def _record_keyframe(self) -> None:
        for follower in self.each:
            follower.record_keyframe()

    def _record_last_keyframe(self) -> bool:
        """Write the last key frame; return False if that is too late, as something has changed since the last step."""
        if any(follower.was_changed() for follower in self.each):
            return False
        self._record_keyframe()
        return True

    def _take_new_field(self, field: RecordedField) -> bool:
        """Make room for a field that has appeared in an optimizer's state; return False if it cannot be recorded."""
        reason = None
        if field.name in self._slots.tensors:
            reason = "its name is taken"
        elif self._partition.is_sharded and field.tensor.shape != field.of.record_shape(field.of.param):
            reason = "it is not sharded like its parameter"
        if reason is not None:
            self._cycle.warn(field.name, f"{field.name} is not recorded: {reason}")
            return False
        self._slots.add(field.tensor, local(field.of.param).device)
        self._partition.add(field)
        return True

    # -----------------------------------------------------------------------------------------------------------------
    # What the trace says of them

    def metadata(self) -> dict[str, str]:
        """Return the metadata that describe the optimizers, and the further names of tied parameters."""
        keys = self.keys()
        rows = {of.name for follower in self.each for of in follower.params if of.all_rows is not None}
        names = {
            key.replace(name, other, 1): key
            for other, name in self._tied.items()
            for key in [*keys.get(name, {}).values(), *([f"{name}.rows"] if name in rows else [])]
            if key.startswith(name)
        }
        own = {"optimizer": json.dumps(self.description())}
        return {**own, "tied": json.dumps(names)} if names else own

    def description(self) -> dict[str, Any]:
        """Return what the trace says of the optimizers."""
        keys = self.keys()
        return joined_descriptions(
            [own.description.describe({of.name: of.param for of in own.params}, keys) for own in self.each]
        )

    def keys(self) -> dict[str, dict[str, str]]:
        """Return, for each parameter, under which name a reader finds each field."""
        keys: dict[str, dict[str, str]] = defaultdict(dict)
        for field in self.fields.values():
            keys[field.of.name][field.field] = field.key
        return keys
