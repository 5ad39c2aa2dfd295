"""Replays Adam over a trace: each step starts from the state recorded before it, and every bit is compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from bhfast.ops import checks, torch_adam
from bhfast.trace import Trace
from bhfast.trace.format import KEYFRAMES
from bhfast.trace.updates import MOMENTS, STATE, Updates, bits, differing, left_by_steps, why_unknown

CHUNK = 1 << 19  # elements replayed at once


@dataclass(frozen=True)
class Difference:
    """The first place where a trace differs from what was recorded.

    Attributes:
        tensor: its name in the file; None for the header.
        record: the index along axis 0; for key frames, the record that they are of; -1 if a checksum failed that covers
            no single record.
        step: the step of that record; None if ``record`` is -1.
        index: the element within the record; None if a checksum found the difference.
        text: all this in one line, with the values found.
    """

    tensor: str | None
    record: int
    step: int | None
    index: tuple[int, ...] | None
    text: str


def why_not(trace: Trace, logged: Mapping[str, Tensor]) -> str | None:
    """Return why a trace cannot be replayed; None if it can be.

    Args:
        trace, logged: see :func:`bhfast.trace.updates.why_unknown`.
    """
    if reason := why_unknown(trace, logged):
        return reason
    if not trace.optimizer["params"]:
        return "no parameter was recorded"
    for name, param in trace.optimizer["params"].items():
        if missing := [field for field in checks.FIELDS if field not in param["keys"]]:
            return f"a replay needs {', '.join(missing)} of {name}"
        if reason := _why_not_param(trace, Updates(trace, logged, name)):
            return reason
    return None


def _why_not_param(trace: Trace, updates: Updates) -> str | None:
    name, keys = updates.name, updates.keys
    tensors = [trace[keys[field]] for field in checks.FIELDS]
    if dtypes := {str(x.dtype) for x in tensors if x.dtype != tensors[0].dtype}:
        return f"{name} is {tensors[0].dtype}, but its gradient or moments are {', '.join(sorted(dtypes))}"
    if any(x.shape != tensors[0].shape or len(x) != len(trace.steps) for x in tensors):
        raise ValueError(f"the fields of {name} have different shapes, or not one record for each step")
    for flag, values in updates.flags.items():
        if values.dim() != 1:
            return f"{flag} is not one value for each step"
    if updates.rounding == torch_adam.FUSED:
        size = updates.described["numel"]
        if math.prod(tensors[0].shape[1:]) != size and size % torch_adam.FUSED_BLOCK:
            return (
                f"only some rows of {name} were recorded, but the bits of torch's fused AdamW depend on where in the "
                "parameter an element is"
            )
    gone = updates.flags.get(f"{name}.has_grad", torch.ones(0)) == 0
    for record in gone.nonzero().flatten().tolist() if name not in trace.keyframes else ():
        if 0 < record < len(trace.steps) and any(_changes(trace, keys[field], record) for field in STATE):
            return f"{name} changed in step {int(trace.steps[record])}, in which it had no gradient"
    if not updates.has_one_factor.all():
        return "between backward and step, gradients were changed by something other than one common factor"
    return None


def _changes(trace: Trace, key: str, record: int) -> bool:
    after = left_by_steps(trace, key, slice(record, record + 1))[0]
    return not torch.equal(bits(after), bits(trace[key].as_subclass(Tensor)[record - 1]))


def replay(trace: Trace, logged: Mapping[str, Tensor]) -> Difference | None:
    """Replay all parameters; return the first difference. Only for traces that :func:`why_not` returns None for."""
    found = [_replay_param(trace, Updates(trace, logged, name)) for name in trace.optimizer["params"]]
    first = min((x for x in found if x), key=lambda difference: difference.record, default=None)
    if first is None or (first.tensor or "").endswith(KEYFRAMES):
        return first
    if "crc32" not in trace.metadata or any(trace.damage()):
        return first
    text = (
        f"{first.text.partition(';')[0]}; all checksums match, so the state before this step was changed by something "
        "other than the optimizer, such as a write through .data"
    )
    return replace(first, text=text)


def _replay_param(trace: Trace, updates: Updates) -> Difference | None:
    keys = updates.keys
    if not updates.described["steps_done"]:
        ending = KEYFRAMES if updates.name in trace.keyframes else ""
        for key in (f"{keys[field]}{ending}" for field in MOMENTS):
            if difference := first_difference(trace, key, 0, trace[key][:1], torch.zeros_like(trace[key][:1])):
                return difference
    if updates.name in trace.keyframes:
        return _replay_keyframes(trace, updates)
    tensors = [trace[keys[field]].as_subclass(Tensor) for field in STATE]
    grads = trace[keys["grad"]].as_subclass(Tensor)
    chunk = max(1, CHUNK // max(1, grads[0].numel()))
    for start in range(1, updates.records, chunk):
        now = slice(start, min(start + chunk, updates.records))
        states = [x[now.start - 1 : now.stop - 1] for x in tensors]
        values = updates.next_states(states, grads[now], now)
        found = [
            first_difference(trace, keys[field], start, left_by_steps(trace, keys[field], now), value)
            for field, value in zip(STATE, values, strict=True)
        ]
        if differences := [difference for difference in found if difference]:
            return min(reversed(differences), key=lambda difference: difference.record)  # of moments first
    return None


def _replay_keyframes(trace: Trace, updates: Updates) -> Difference | None:
    """Replay a parameter from each key frame to the next, and compare them."""
    records = trace.keyframes[updates.name].records.tolist()
    for frame, (before, record) in enumerate(pairwise(records), start=1):
        if record >= updates.records:
            break  # another of several files, which has the learning rates, is shorter
        states = trace.keyframes[updates.name].rebuilt_frame(frame)
        for field, value in zip(STATE, states, strict=True):
            key = f"{updates.keys[field]}{KEYFRAMES}"
            recorded = trace[key].as_subclass(Tensor)[frame : frame + 1]
            if difference := first_difference(trace, key, record, recorded, value[None]):
                return _cause(trace, updates, difference, frame, before, record)
    return None


def _cause(trace: Trace, updates: Updates, found: Difference, frame: int, before: int, record: int) -> Difference:
    """Return what was damaged if a key frame is not the one that the steps since the last one lead to.

    Args:
        found: the difference from the key frame.
        frame: which key frame.
        before, record: the records of the key frame before, and of this one.
    """
    spans = dict.fromkeys([updates.keys["grad"], *updates.flags, "learning_rates", "clip_coefs"], (before + 1, record))
    spans |= {f"{updates.keys[field]}{KEYFRAMES}": (frame - 1, frame) for field in STATE}
    each = int(trace.metadata.get("crc32_records", "1"))
    where = f"found by replaying {found.tensor}{list(found.index or ())} of step {found.step}"
    for name, own in trace.damage():
        first, last = spans.get(name, (0, -1))
        if own is None and first <= last:
            text = f"steps {int(trace.steps[before]) + 1} to {found.step}, {name}: its CRC-32 does not match; {where}"
            return replace(found, tensor=name, text=text)
        if own is not None and first - each < own <= last:
            own = max(own, first)
            at = (before, record)[own - first] if name.endswith(KEYFRAMES) else own
            text = f"step {int(trace.steps[at])}, {name}: the CRC-32 of its bytes does not match; {where}"
            return replace(found, tensor=name, record=at, step=int(trace.steps[at]), text=text)
    text = (
        f"{found.text.partition(';')[0]}; all checksums of {trace.path.name} match, so it was changed after step "
        f"{int(trace.steps[before])} by something other than the optimizer's steps"
    )
    return replace(found, text=text)


def first_difference(trace: Trace, name: str, first: int, recorded: Tensor, replayed: Tensor) -> Difference | None:
    """Return where records of a tensor differ from those replayed; None if they do not.

    Args:
        trace: for its steps.
        name: of the tensor.
        first: the number of the first record.
        recorded, replayed: ``[n, ...]``.
    """
    if torch.equal(bits(recorded), bits(replayed)):
        return None
    differs = differing(recorded, replayed)
    if not differs.any():
        return None
    record, *index = differs.nonzero()[0].tolist()
    at = (record, *index)
    step = int(trace.steps[first + record])
    text = (
        f"step {step}, {name}{index}: recorded {describe(recorded[at])}, replayed {describe(replayed[at])}; "
        "the recorded value, the state before it, or the gradient is damaged"
    )
    return Difference(name, first + record, step, tuple(index), text)


def describe(value: Tensor) -> str:
    """Return one value as text, with its bits."""
    digits = 2 * value.itemsize
    number = f"{value.item():.8g}" if value.is_floating_point() else f"{value.item()}"
    return f"{number} (0x{int(bits(value)) & (1 << 4 * digits) - 1:0{digits}x})"
