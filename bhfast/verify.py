"""Proof of a recording: Adam replayed over the whole trace, every bit of moments and embeddings compared.

    python -m bhfast.verify FILE

Exits 0 if all bits agree, 1 at the first difference, naming step, tensor and index, 2 if the file cannot be checked.

Every step is replayed from the state recorded before it, so all steps of a chunk are computed at once. What a replay
cannot see (a damaged bit of a gradient that rounding hides; logits, losses) is checked against the CRC-32 that the
trace keeps of each record.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from bhfast import _ops
from bhfast.errors import BhfastError, TraceError
from bhfast.trace import Trace, open_trace

CHUNK = 1 << 19  # elements replayed at once
REPLAYED = ("momentum", "variance", "embeddings")


@dataclass(frozen=True)
class Difference:
    """The first place where a trace is not what was recorded.

    Attributes:
        tensor: its name in the file.
        record: along axis 0; -1 if the checksum that failed does not tell.
        step: of that record; None likewise.
        index: of the element within the step's record; None if found by checksum, which does not tell.
        text: one line that says all this, and what was found.
    """

    tensor: str
    record: int
    step: int | None
    index: tuple[int, ...] | None
    text: str


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        replayed: number of steps replayed; 0 if not every step was recorded, and only checksums could be compared.
        difference: None if every bit agrees.
    """

    replayed: int
    difference: Difference | None


def verify(path: str | os.PathLike[str]) -> Verification:
    """Check a trace of the reference run. It reads the file once and needs some 100 MB beside it.

    Raises:
        TraceError: the file is truncated, corrupted in its header, or not a trace that can be checked.
    """
    trace = open_trace(path)
    wanted = (*REPLAYED, "recorded_steps", "grads", "learning_rates", "clip_coefs", "adam_epsilon")
    missing = [name for name in wanted if name not in trace]
    if missing or not trace.config or "crc32" not in trace.metadata:
        lacks = ", ".join(missing) or "the run's settings and checksums in its metadata"
        raise TraceError(f"{path} cannot be verified: it is no trace that bhfast wrote, as it lacks {lacks}")
    steps = trace.steps.tolist()
    is_complete = steps == list(range(len(steps)))
    difference = (_replay(trace) if is_complete else None) or _compare_checksums(trace)
    return Verification(len(steps) - 1 if is_complete else 0, difference)


def _replay(trace: Trace) -> Difference | None:
    config = trace.config
    embeddings, grads, momentum, variance = (trace[name] for name in ("embeddings", "grads", "momentum", "variance"))
    for name in ("momentum", "variance"):
        if difference := _first_difference(trace, name, 0, trace[name][:1], torch.zeros_like(trace[name][:1])):
            return difference
    clip_coefs = trace["clip_coefs"].to(embeddings.dtype)[:, None, None]
    chunk = max(1, CHUNK // embeddings[0].numel())
    for start in range(1, len(embeddings), chunk):
        now = slice(start, min(start + chunk, len(embeddings)))
        before = slice(now.start - 1, now.stop - 1)
        coefficients = _ops.adam_coefficients(
            range(now.start, now.stop),
            trace["learning_rates"][now].tolist(),
            betas=(config["beta1"], config["beta2"]),
            eps=trace["adam_epsilon"].item(),
            weight_decay=config["weight_decay"],
        )
        param, exp_avg, exp_avg_sq = _ops.adam(
            embeddings[before],
            grads[now] * clip_coefs[now],
            momentum[before],
            variance[before],
            coefficients[:, None, None],
            config["adam_rounding"],
        )
        replayed = {"momentum": exp_avg, "variance": exp_avg_sq, "embeddings": param}
        found = [_first_difference(trace, name, start, trace[name][now], replayed[name]) for name in REPLAYED]
        differences = [difference for difference in found if difference]
        if differences:
            return min(differences, key=lambda difference: difference.record)
    return None


def _first_difference(trace: Trace, name: str, first: int, recorded: Tensor, replayed: Tensor) -> Difference | None:
    """Compare bits; two NaN are equal, as the payload of a NaN depends on the instruction that made it."""
    if torch.equal(recorded.view(torch.int16), replayed.view(torch.int16)):
        return None
    differs = recorded.view(torch.int16) != replayed.view(torch.int16)
    differs &= ~(recorded.isnan() & replayed.isnan())
    if not differs.any():
        return None
    record, *index = differs.nonzero()[0].tolist()
    at = (record, *index)
    step = int(trace.steps[first + record])
    text = (
        f"step {step}, {name}{index}: recorded {_describe(recorded[at])}, replayed {_describe(replayed[at])}; "
        "the recorded value, the state before it, or the gradient is damaged"
    )
    return Difference(name, first + record, step, tuple(index), text)


def _describe(value: Tensor) -> str:
    return f"{value.item():.8g} (0x{int(value.view(torch.int16)) & 0xFFFF:04x})"


def _compare_checksums(trace: Trace) -> Difference | None:
    for name, record in trace.damage():
        step = None if record is None else int(trace.steps[record])
        where = f"{name}, of the whole run" if step is None else f"step {step}, {name}"
        return Difference(
            name,
            -1 if record is None else record,
            step,
            None,
            f"{where}: the CRC-32 of its bytes is not the one written with them",
        )
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast verify", description="Replay Adam over a trace and compare every bit with what was recorded."
    )
    parser.add_argument("file", metavar="FILE", help="a trace of the reference run")
    args = parser.parse_args(argv)
    try:
        result = verify(args.file)
    except BhfastError as error:
        print(f"bhfast verify: error: {error}", file=sys.stderr)
        return 2
    if result.difference:
        print(f"{args.file}: DIFFERENT: {result.difference.text}")
        return 1
    if result.replayed:
        print(
            f"{args.file}: {result.replayed:,} steps replayed, all bits of moments and embeddings agree; checksums hold"
        )
        return 0
    print(f"{args.file}: checksums hold, but a replay needs every step, and this run recorded some (--record-every)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
