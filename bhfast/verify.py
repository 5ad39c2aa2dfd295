"""Proof of a recording: Adam replayed over the whole trace, every bit of moments and embeddings compared.

    python -m bhfast.verify FILE

Exits 0 if all bits agree, 1 at the first difference, naming step, tensor and index, 2 if the file cannot be checked.
Traces of the reference run can be replayed, and those of :class:`bhfast.Recorder` around an optimizer whose arithmetic
is known to the bit; of others the checksums are compared.

Every step is replayed from the state recorded before it, so all steps of a chunk are computed at once. What a replay
cannot see (a damaged bit of a gradient that rounding hides; logits, losses) is checked against the CRC-32 that the
trace keeps of each record.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bhfast.errors import BhfastError, TraceError
from bhfast.ops import arithmetic, checks
from bhfast.trace import Trace, open_trace

CHUNK = 1 << 19  # elements replayed at once
REPLAYED = ("exp_avg", "exp_avg_sq", "param")


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
        replayed: number of steps replayed; 0 if only checksums could be compared.
        hindrance: why there was no replay; None if there was.
        difference: None if every bit agrees.
    """

    replayed: int
    hindrance: str | None
    difference: Difference | None


def verify(path: str | os.PathLike[str]) -> Verification:
    """Check a trace. It reads the file once and needs some 100 MB beside it.

    Raises:
        TraceError: the file is truncated, corrupted in its header, or not a trace that can be checked.
    """
    trace = open_trace(path)
    lacks = [name for name in ("optimizer", "crc32") if name not in trace.metadata]
    if lacks or "recorded_steps" not in trace:
        lacking = ", ".join(lacks or ["recorded_steps"])
        raise TraceError(f"{path} cannot be verified: it is no single file that bhfast wrote, as it lacks {lacking}")
    try:
        hindrance = _hindrance(trace)
        difference = (None if hindrance else _replay(trace)) or _compare_checksums(trace)
        return Verification(0 if hindrance else len(trace.steps) - 1, hindrance, difference)
    except TraceError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise TraceError(
            f"{path} is corrupted: what it says of its optimizer does not fit its tensors ({error})"
        ) from None


def _hindrance(trace: Trace) -> str | None:
    """Return why the trace cannot be replayed; None if it can be."""
    optimizer, steps = trace.optimizer, trace.steps
    if not torch.equal(steps, torch.arange(len(steps))):
        return "a replay needs every step, and this run recorded some (--record-every)"
    if optimizer["arithmetic"] is None:
        return f"there is no replay: {optimizer['reason']}"
    if "learning_rates" not in trace:
        return "a replay needs learning_rates"
    for name, param in optimizer["params"].items():
        if missing := [field for field in checks.FIELDS if field not in param["keys"]]:
            return f"a replay needs {', '.join(missing)} of {name}"
    if "clip_coefs" in trace and bool(trace["clip_coefs"][1:].isnan().any()):
        return "between backward and step, gradients were changed by more than one factor"
    return None


def _replay(trace: Trace) -> Difference | None:
    """Replay all parameters; return the first difference."""
    found = [_replay_param(trace, param) for param in trace.optimizer["params"].values()]
    return min((x for x in found if x), key=lambda difference: difference.record, default=None)


def _replay_param(trace: Trace, described: dict[str, Any]) -> Difference | None:
    keys, settings = described["keys"], trace.optimizer["groups"][described["group"]]
    done = described["steps_done"]
    param, grad, exp_avg, exp_avg_sq = (trace[keys[field]] for field in checks.FIELDS)
    if not done:
        for key in (keys["exp_avg"], keys["exp_avg_sq"]):
            if difference := _first_difference(trace, key, 0, trace[key][:1], torch.zeros_like(trace[key][:1])):
                return difference
    ones = [1] * (param.dim() - 1)
    coefs = trace["clip_coefs"].to(param.dtype).view(-1, *ones) if "clip_coefs" in trace else None
    rates = trace["learning_rates"]
    rates = rates[:, described["group"]] if rates.dim() > 1 else rates
    chunk = max(1, CHUNK // max(1, param[0].numel()))
    for start in range(1, len(param), chunk):
        now = slice(start, min(start + chunk, len(param)))
        before = slice(now.start - 1, now.stop - 1)
        coefficients = arithmetic.adam_coefficients(
            range(done + now.start, done + now.stop),
            rates[now].tolist(),
            betas=tuple(settings["betas"]),
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
        )
        values = arithmetic.adam(
            param[before],
            grad[now] if coefs is None else grad[now] * coefs[now],
            exp_avg[before],
            exp_avg_sq[before],
            coefficients.view(-1, *ones, coefficients.shape[-1]),
            trace.optimizer["arithmetic"],
        )
        replayed = dict(zip(("param", "exp_avg", "exp_avg_sq"), values, strict=True))
        found = [_first_difference(trace, keys[f], start, trace[keys[f]][now], replayed[f]) for f in REPLAYED]
        differences = [difference for difference in found if difference]
        if differences:
            return min(differences, key=lambda difference: difference.record)
    return None


def _bits(values: Tensor) -> Tensor:
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])


def _first_difference(trace: Trace, name: str, first: int, recorded: Tensor, replayed: Tensor) -> Difference | None:
    """Compare bits; two NaN are equal, as the payload of a NaN depends on the instruction that made it."""
    if torch.equal(_bits(recorded), _bits(replayed)):
        return None
    differs = _bits(recorded) != _bits(replayed)
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
    digits = 2 * value.itemsize
    return f"{value.item():.8g} (0x{int(_bits(value)) & (1 << 4 * digits) - 1:0{digits}x})"


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
    parser.add_argument("file", metavar="FILE", help="a trace")
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
            f"{args.file}: {result.replayed:,} steps replayed, all bits of moments and parameters agree; checksums hold"
        )
        return 0
    print(f"{args.file}: checksums hold, but {result.hindrance}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
