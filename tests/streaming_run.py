"""A run of a few steps that streams, always with the same bits, and what may become of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.recording.slots import RecordSlots
from bhfast.storage.choose import open_storage
from bhfast.storage.stream import COMMIT_SECONDS
from bhfast.trace import open_trace
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES

SHAPE = 48, 24
ROWS = [1, 2, 3, 5, 8, 13, 21, 34]


def record(
    path: Path,
    steps: int,
    *,
    announced: int | None = None,
    storage: str = "stream",
    buffer_bytes: int = 1 << 19,
    commit_seconds: float = COMMIT_SECONDS,
    overwrite: bool = True,
    keyframes: int | None = None,
    after_step: Callable[[int, Recorder], None] = lambda step, recorder: None,
) -> Recorder:
    """Train ``steps`` steps of a matrix and a vector; record the first, some rows of a second one, and a loss.

    Args:
        announced: the number of steps that the recorder is told; None if it is not told.
        buffer_bytes, commit_seconds: see :class:`bhfast.storage.stream.StreamStorage`.
        overwrite, keyframes: see :class:`bhfast.Recorder`.
        after_step: called with the number of each step.
    """

    class SmallSlots(RecordSlots):
        _half_size = staticmethod(lambda record_bytes, records: 8)
        _open_storage = staticmethod(partial(open_storage, buffer_bytes=buffer_bytes, commit_seconds=commit_seconds))

    class SmallRecorder(Recorder):
        _slots_class = SmallSlots

    start = torch.linspace(-1, 1, SHAPE[0] * SHAPE[1]).view(SHAPE).bfloat16()
    first, second = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = FusedAdam([first, second], lr=0.01)
    recorder = SmallRecorder(
        optimizer,
        {"first": first, "second": second},
        rows={"second": ROWS},
        steps=announced,
        path=path,
        storage=storage,
        overwrite=overwrite,
        keyframes=keyframes,
    )
    with recorder:
        recorder.constants["answer"] = torch.tensor([42])
        for step in range(1, steps + 1):
            for scale, param in enumerate((first, second), start=1):
                param.grad = (param.detach() * scale * (step % 7 - 3)).cos()
            optimizer.step()
            recorder.log(loss=torch.tensor(float(step)))
            if step > 10 and step % 5 == 0:
                recorder.log(late=torch.full((50,), step, dtype=torch.float32))
            after_step(step, recorder)
    return recorder


def reference(folder: Path, steps: int) -> Path:
    """What the run records without streaming."""
    return record(folder / "reference.safetensors", steps, announced=steps, storage="memory").path


def assert_begins_like(shorter: Path, longer: Path, *, logged: int | None = None) -> None:
    """Each tensor of the shorter trace is the beginning of that of the longer one, byte for byte.

    The shorter one may be compact: its key frames are those records of the longer one.

    Args:
        logged: of how many records at least all values are there; None: of all.
    """
    a, b = open_trace(shorter), open_trace(longer)
    frames = {name for name in a if name.endswith(KEYFRAMES)}
    for name in frames:
        wanted = b[name.removesuffix(KEYFRAMES)][a[KEYFRAME_STEPS]]
        assert torch.equal(a[name].view(torch.uint8), wanted.view(torch.uint8)), name
    rest = set(a) - frames - {KEYFRAME_STEPS}
    assert rest <= set(b)
    for name in rest:
        records = min(len(a.steps), logged or len(a.steps)) if name in ("loss", "late") else len(a.steps)
        is_record = len(b[name]) == len(b.steps)
        x, y = (t[name][:records] if is_record else t[name] for t in (a, b))
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y))), name
    assert list(a.damage()) == []
