"""Records of an earlier trace of the same run, carried over to a new recording that goes on from there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bhfast.errors import ConfigError
from bhfast.recording.slots import RecordSlots
from bhfast.trace.format import AFTER_STEP, CHANGED
from bhfast.trace.reader import Trace
from bhfast.trace.recorded import RecordedTensor
from bhfast.trace.series import state_that_differs


def carry_over(slots: RecordSlots, trace: Trace, steps: int, is_stopped: Callable[[], bool] = lambda: False) -> None:
    """Before the first step of a recording, record steps 1 to ``steps`` as an earlier trace of the same run has them.

    The recording began with the state at the start, for record 0, and has all logged values; by now, parameters and
    optimizer state must be those after that step. A recording cut short that has at least as many records as the
    earlier trace then replaces it.

    Args:
        slots: of the recording.
        trace: the earlier trace; it may be the file that the recording will replace.
        steps: up to which step; the trace must have the records up to there.
        is_stopped: asked now and then; if it returns True, the recording has fewer records.

    Raises:
        ConfigError: the state at the start, or that after the step, is not that of the trace.
        StorageError: the disk filled up or failed.
    """
    slots.carried = len(trace.steps)
    if name := state_that_differs(trace, 0, {name: slots.slot(name).cpu() for name in slots.tensors}):
        raise ConfigError(f"{trace.path} does not start as this run does: {name} of step 0 differs")
    _add_changes(slots, trace)
    while slots.step < steps and not is_stopped():
        first = slots.step // slots.every + 1
        slots.begin(steps - slots.step)
        last = slots.step // slots.every
        for name, tensor in slots.tensors.items():
            if tensor.stride == 1:
                _copy(trace[name], slots.slots_of(name), first, last + 1)
            elif slots.is_keyframe:
                slots.slot(name).copy_(trace[name][last // tensor.stride])
        slots.end(has_keyframe=True)
    slots.commit()
    state = {name: value.cpu() for name, value in slots.on_carry().items()}
    if slots.step == steps and slots.record is not None and (name := state_that_differs(trace, slots.record, state)):
        raise ConfigError(
            f"the checkpoint of step {steps} does not fit {trace.path}, whose {name} of that step differs: they are of "
            "different runs"
        )


def _add_changes(slots: RecordSlots, trace: Trace) -> None:
    """Make room for what the earlier recording added when something other than a step first changed a tensor."""
    for name, tensor in trace.items():
        field = name.removesuffix(CHANGED).removesuffix(AFTER_STEP)
        if field != name and name not in slots.tensors:
            recorded = RecordedTensor(name, tuple(tensor.shape[1:]), tensor.dtype, fill=0.0)
            slots.add(recorded, slots.slot(field).device)


def _copy(source: Tensor, slots: Tensor, first: int, stop: int) -> None:
    """Copy the records from ``first`` up to, but not including, ``stop`` to their slots."""
    while first < stop:
        at = first % len(slots)
        count = min(stop - first, len(slots) - at)
        slots[at : at + count].copy_(source[first : first + count])
        first += count
