"""Proves a recording: replays Adam over the whole trace, and compares every bit of moments and parameters.

    python -m bhfast.verify FILE...
    python -m bhfast.verify FILE --optimizer adamw --lr 1e-3 [--betas 0.9 0.999 ...]

Prints one line for each file; with ``--json``, an object. The exit status is that of the worst file, in this order:

    0   every step was replayed, and all bits agree
    2   not replayed, for example because the optimizer's arithmetic is not known to the bit, so only checksums were
        compared; or the file cannot be read
    1   damaged: names the first difference, with step, tensor and index

It replays traces of the reference run, and those of :class:`bhfast.Recorder` if the optimizer's arithmetic is known to
the bit. Given the index of several files, it verifies all of them, and that they agree with the index.

A trace of another program does not describe its optimizer. With ``--optimizer`` and its settings it is replayed as far
as its tensors allow: the line says which bits agree, and what was assumed.

Every step is replayed from the state recorded before it, so all steps of a chunk are computed at once. A compact trace
is replayed from each key frame to the next; if they differ, checksums tell which record in between is damaged. A replay
does not see everything: rounding may hide a damaged bit of a gradient, and it does not use logits, losses, names and
metadata. So the CRC-32 of each record and of the header are checked, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bhfast.cli import run_program
from bhfast.errors import MALFORMED, BhfastError, ConfigError, DamageError, TraceError, printable
from bhfast.foreign.given import OPTIMIZERS, ROUNDINGS, SCHEDULES, GivenReplay, GivenSettings, replay_given
from bhfast.replay import Difference, replay, why_not
from bhfast.trace import Trace, open_trace
from bhfast.trace.format import KEYFRAME_STEPS, KEYFRAMES
from bhfast.trace.opening import open_file
from bhfast.trace.series import open_parts, seam_difference
from bhfast.trace.sharded import INDEX_SUFFIX, Index, disagreements, read_index

SEVERITY = (0, 2, 1)  # exit statuses, the worst last
SCHEMA = 1  # of the objects that --json prints; docs/recorder.md describes them
DAMAGED_HEADER = "the header: its CRC-32 does not match; names, dtypes, shapes or metadata were changed"


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        replayed: number of steps replayed; 0 if only checksums were compared.
        reason: why nothing was replayed; None if it was.
        difference: None if every bit agrees.
        has_header_checksum: whether names, shapes and metadata could be checked; False for format version 1, and for
            files of other programs.
        given: what the replay found, if the settings of the optimizer were given.
    """

    replayed: int
    reason: str | None
    difference: Difference | None
    has_header_checksum: bool = True
    given: GivenReplay | None = None

    @property
    def status(self) -> int:
        """The exit status of ``bhfast verify`` for this file: 0, 1 or 2."""
        return 1 if self.difference else 2 if self.reason else 0

    @property
    def checksums(self) -> str | None:
        """The word ``all``, ``data`` (none of the header) or ``none`` for those that there are, all of which match.

        None if the trace is different: then not all of them match, or not all were compared.
        """
        if self.difference:
            return None
        return "all" if self.has_header_checksum else "none" if self.given else "data"

    def __str__(self) -> str:
        if self.difference:
            return f"DIFFERENT: {self.difference.text}"
        checked = {
            "all": "all checksums match",
            "data": "all checksums match (but its header has none: format version 1)",
            "none": "the file has no checksums",
        }[self.checksums or "all"]
        if self.reason:
            return f"not replayed, because {self.reason}; {checked}"
        if self.given:
            agreed = f"with the settings given, all bits of {', '.join(self.given.tensors)} agree"
            return "; ".join([f"{self.replayed:,} steps replayed {agreed}", *self.given.remarks, checked])
        return f"{self.replayed:,} steps replayed, all bits of moments and parameters agree; {checked}"


def verify(path: str | os.PathLike[str], given: GivenSettings | None = None) -> Verification:
    """Check a trace with all its parts, or the index of several files.

    Takes about 100 MB of memory besides the mapped file.

    Args:
        path: the file.
        given: the settings of the optimizer, for one file of another program, or made of one by ``bhfast import``.

    Raises:
        TraceError: the file cannot be read, or is not a trace that can be checked.
        DamageError: it is truncated, or its header or metadata do not fit its data.
    """
    path = Path(path)
    if given:
        return _verify_given(path, given)
    if path.name.endswith(INDEX_SUFFIX):
        return _verify_index(read_index(path))
    if path.suffix != ".partial":
        return _verify_parts(path, open_parts(path))
    trace = open_trace(path)
    if trace.is_live:
        raise TraceError(
            f"{path} cannot be verified: its run has not ended; if it was killed, make a trace of it with "
            f"python -m bhfast.recover {path}"
        )
    return _verify_file(trace, trace)


def _verify_parts(path: Path, parts: Sequence[Trace]) -> Verification:
    """Check the parts of a series, and that each starts with a state of those before it."""
    if len(parts) == 1:
        return _verify_file(parts[0], parts[0])
    found = {part.path.name: _verify_file(part, part) for part in parts}
    for number in range(2, len(parts) + 1):
        if all(x.status != 1 for x in found.values()) and (text := seam_difference(path, parts[:number])):
            return Verification(0, None, Difference(None, -1, None, None, text))
    return _worst(found, sum(x.replayed for x in found.values()))


def _verify_file(trace: Trace, logged: Mapping[str, Tensor]) -> Verification:
    """Check one file; ``logged`` as for :func:`bhfast.replay.why_not`."""
    is_intact = trace.header_is_intact()
    if is_intact is False:
        return Verification(0, None, Difference(None, -1, None, None, DAMAGED_HEADER))
    lacks = [name for name in ("optimizer", "crc32") if name not in trace.metadata]
    if lacks or "recorded_steps" not in trace:
        lacking = ", ".join(lacks or ["recorded_steps"])
        raise TraceError(
            f"{trace.path} cannot be verified: bhfast did not write it, because it has no {lacking}; "
            "give its --optimizer and settings"
        )
    try:
        reason = why_not(trace, logged)
        difference = (None if reason else replay(trace, logged)) or _compare_checksums(trace)
        steps = min(len(trace.steps), len(logged["recorded_steps"])) - 1
    except TraceError:
        raise
    except MALFORMED as error:
        raise DamageError(
            f"{trace.path} is corrupted: its description of the optimizer does not fit its tensors ({error})"
        ) from None
    if reason and "shard" in trace.metadata and trace is logged:
        reason = f"it is one of several files; verify their {INDEX_SUFFIX} instead; {reason}"
    return Verification(0 if reason else steps, reason, difference, is_intact is not None)


def _verify_given(path: Path, given: GivenSettings) -> Verification:
    """Check a file of another program."""
    if path.name.endswith(INDEX_SUFFIX) or path.suffix == ".partial":
        raise TraceError(f"{path} cannot be verified with given settings: name one whole file")
    trace = open_file(path)
    if trace.header_is_intact() is False:
        return Verification(0, None, Difference(None, -1, None, None, DAMAGED_HEADER))
    try:
        found = replay_given(trace, given)
        difference = found.difference or _compare_checksums(trace)
    except TraceError:
        raise
    except MALFORMED as error:
        raise TraceError(f"{path} cannot be verified: its tensors do not fit together ({error})") from None
    return Verification(found.replayed, found.reason, difference, "crc32" in trace.metadata, found)


def _compare_checksums(trace: Trace) -> Difference | None:
    for name, record in trace.damage():
        steps = trace[KEYFRAME_STEPS] if name.endswith(KEYFRAMES) and KEYFRAME_STEPS in trace else trace.steps
        step = None if record is None else int(steps[record])
        where = name if step is None else f"step {step}, {name}"
        text = f"{where}: the CRC-32 of its bytes does not match"
        return Difference(name, -1 if record is None else record, step, None, text)
    return None


def _verify_index(index: Index) -> Verification:
    """Check all files of an index; return the result of the worst one."""
    for text in disagreements(index):
        return Verification(0, None, Difference(None, -1, None, None, text))
    found = {file: _verify_file(trace, index.trace) for file, trace in index.files.items()}
    return _worst(found, min(x.replayed for x in found.values()))


def _worst(found: Mapping[str, Verification], replayed: int) -> Verification:
    """Return the result of the worst of several files, by name.

    Args:
        replayed: number of steps replayed in all.
    """
    file, worst = max(found.items(), key=lambda item: SEVERITY.index(item[1].status))
    difference = worst.difference and replace(worst.difference, text=f"{file}: {worst.difference.text}")
    return Verification(
        0 if worst.reason else replayed,
        worst.reason,
        difference,
        all(x.has_header_checksum for x in found.values()),
    )


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="bhfast verify",
        description="Replay Adam over traces and compare every bit with what was recorded. Exit status: 0 all bits "
        "agree, 1 damaged, 2 not replayed or not readable.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help=f"a trace, or the {INDEX_SUFFIX} of several files")
    parser.add_argument(
        "--json", action="store_true", help="print an object of JSON for each file, in a line of its own"
    )
    group = parser.add_argument_group("traces of other programs, which do not describe their optimizer")
    group.add_argument("--optimizer", choices=OPTIMIZERS)
    group.add_argument("--lr", type=float, help="learning rate, if the trace has no learning_rates")
    group.add_argument("--lr-schedule", choices=SCHEDULES, help="linear decays to 0 after --steps (default: constant)")
    group.add_argument("--steps", type=int, metavar="N", help="steps in the whole run, for the linear schedule")
    group.add_argument("--betas", type=float, nargs=2, metavar="BETA", help="(default: 0.9 0.999)")
    group.add_argument("--eps", type=float, help="(default: 1e-8)")
    group.add_argument("--weight-decay", type=float, help="(default: 0)")
    group.add_argument(
        "--rounding", choices=ROUNDINGS, help="of Adam (default: per-op, torch's own in bfloat16 on a CPU)"
    )
    group.add_argument("--max-grad-norm", type=float, metavar="NORM", help="at which recorded gradients were clipped")
    return run_program(parser, _report_all, argv)


def _report_all(args: argparse.Namespace) -> int:
    given = _given_settings(args)
    return max((_report(file, given, args.json) for file in args.files), key=SEVERITY.index)


def _given_settings(args: argparse.Namespace) -> GivenSettings | None:
    """Return the settings that were given; None if none was."""
    own = {entry.name: getattr(args, entry.name) for entry in fields(GivenSettings)}
    own = {name: tuple(x) if isinstance(x, list) else x for name, x in own.items() if x is not None}
    if own and "optimizer" not in own:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in own)
        raise ConfigError(f"{flags} needs --optimizer: settings are given for traces that do not have them")
    return GivenSettings(**own) if own else None


def _report(file: str, given: GivenSettings | None, wants_json: bool) -> int:
    """Verify one file, print a line, and return its exit status."""
    try:
        found = verify(file, given)
    except BhfastError as error:
        status = 1 if isinstance(error, DamageError) else 2
        if wants_json:
            print(_json_line(file, status, None, printable(error.with_flags)))
        else:
            print(f"bhfast verify: error: {printable(error.with_flags)}", file=sys.stderr)
        return status
    print(_json_line(file, found.status, found, None) if wants_json else printable(f"{file}: {found}"))
    return found.status


def _json_line(file: str, status: int, found: Verification | None, error: str | None) -> str:
    """Return what was found as JSON, in ASCII and without control characters; ``found`` is None after an error."""
    difference = found.difference if found else None
    agreed = found if found and not difference else None
    given = agreed.given if agreed else None
    line: dict[str, Any] = {
        "schema": SCHEMA,
        "file": file,
        "status": status,
        "error": error,
        "replayed": agreed.replayed if agreed else None,
        "reason": found.reason if found else None,
        "difference": asdict(difference) if difference else None,
        "checksums": agreed.checksums if agreed else None,
        "compared": given.tensors if given else [],
        "remarks": given.remarks if given else [],
    }
    return json.dumps(line, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())
