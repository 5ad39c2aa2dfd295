"""A run of a few steps that streams, always with the same bits; for processes that are killed, and what they leave."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import torch

from bhfast import recorder as recorder_module
from bhfast import stream
from bhfast.optim import FusedAdam
from bhfast.recorder import Recorder

SHAPE = 48, 24
ROWS = [1, 2, 3, 5, 8, 13, 21, 34]


def record(
    path: Path,
    steps: int,
    *,
    announced: int | None = None,
    storage: str = "stream",
    buffer: int = 1 << 19,
    after_step: Callable[[int, Recorder], None] = lambda step, recorder: None,
) -> Recorder:
    """Train ``steps`` steps of a matrix and a vector; record the first, some rows of a second one, and a loss.

    Args:
        announced: the number of steps that the recorder is told; None if it is not told.
        buffer: bytes of records that may wait for the disk.
        after_step: called with the number of each step.
    """
    stream.BUFFER = buffer
    recorder_module.half_size = lambda record_bytes, records: 8  # small blocks
    start = torch.linspace(-1, 1, SHAPE[0] * SHAPE[1]).view(SHAPE).bfloat16()
    first, second = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = FusedAdam([first, second], lr=0.01)
    recorder = Recorder(
        optimizer,
        {"first": first, "second": second},
        rows={"second": ROWS},
        steps=announced,
        path=path,
        storage=storage,
        overwrite=True,
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


def main(path: str, steps: str) -> None:
    """Run until a signal comes, saying when the recording has begun."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    record(Path(path), int(steps), after_step=lambda step, _: print("recording", flush=True) if step == 100 else None)


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
