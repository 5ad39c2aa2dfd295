"""Runs and recoveries in which one system call fails, and what must hold afterwards.

    LD_PRELOAD=INJECTOR.so python faults.py INJECTOR.so FOLDER [--most N] [--only SCENARIO] [--verbose]

Each scenario is tried undisturbed first, to count its calls under its folder. Then each call in turn fails, once or
from then on, in a forked child of this process. Prints JSON: how many faults were tried, and the rules they broke.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import torch
from children import fork, status_of
from streaming_run import assert_begins_like, record, reference

from bhfast import recover
from bhfast.errors import BhfastError, TraceError
from bhfast.recording.recorder import Recorder
from bhfast.storage import finish as finishing
from bhfast.trace import open_trace
from bhfast.trace.journal import read_journal
from bhfast.verify import verify

STEPS = 24
FUNCTIONS = (
    *("open", "flock", "pread", "read", "pwrite", "ftruncate", "fallocate", "posix_fallocate", "fsync", "fdatasync"),
    *("rename", "unlink"),
)
SHORT = -1
NOT_RETRIED = ("fallocate", "rename", "unlink")  # Python repeats the others after EINTR, for ever if it must
FILE = "t.safetensors"
LARGEST_FILE = 16 << 20  # bytes: a run of unknown length makes room for half of that
PATIENCE = 30  # seconds, for a child


@dataclass(frozen=True)
class Fault:
    """Call number ``call`` of ``function``, from 1, fails with ``error``, or writes half of what it is given."""

    function: str
    call: int
    error: int
    lasts: bool

    def __str__(self) -> str:
        error = "short" if self.error == SHORT else errno.errorcode[self.error]
        return f"{self.function} {self.call} {error}{' for good' if self.lasts else ''}"


def faults(function: str, calls: int) -> Iterator[Fault]:
    """Yield each fault of a function that is called ``calls`` times."""
    errors = [(errno.EIO, False), (errno.EIO, True), (errno.ENOSPC, False), (errno.EINTR, False)]
    errors += [(errno.EINTR, True)] if function in NOT_RETRIED else []
    errors += [(SHORT, False), (SHORT, True)] if function == "pwrite" else []
    for call in range(1, calls + 1):
        for error, lasts in errors:
            yield Fault(function, call, error, lasts)


# ---------------------------------------------------------------------------------------------------------------------
# Scenarios


@dataclass(frozen=True)
class Scenario:
    """What is disturbed, in a child.

    Attributes:
        run: the same command as always; called with the path of the trace.
        prepare: makes what is there before; called with the folder.
        disturbed: what is disturbed, if not ``run``.
        is_recovery: whether that recovers what ``prepare`` has made.
        without: functions of :mod:`bhfast.storage.finish` that return False.
    """

    run: Callable[..., object]
    prepare: Callable[[Path], object] = lambda folder: None
    is_recovery: bool = False
    without: tuple[str, ...] = ()


def run(path: Path, **options: object) -> None:
    """Record a run with a buffer of few steps."""
    record(path, STEPS, **{"buffer_bytes": 1 << 16, "commit_seconds": 1e9, "overwrite": False, **options})


def kill(folder: Path, *, step: int = STEPS, damage: bool = False, in_tail: bool = False, **options: object) -> None:
    """Leave what a run leaves that is killed after a step, or while its trace is being finished."""

    def die(number: int, recorder: Recorder | None = None) -> None:
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        if in_tail:
            finishing._write_rest = lambda fd, state: die(step)
        run(folder / FILE, after_step=(lambda *_: None) if in_tail else die, **options)

    assert status_of(fork(work)) == -signal.SIGKILL
    partial = folder / f"{FILE}.partial"
    if damage:
        state = read_journal(partial)
        own = state.tensors["second.grad"]
        with open(partial, "r+b") as file:
            file.seek(state.start["header"] + own.offset + 5 * own.nbytes)
            file.write(b"damage")


COPY, PADDING = ("_collapse_range",), ("_collapse_range", "_has_room")
SCENARIOS = {
    "memory": Scenario(partial(run, announced=STEPS, storage="memory")),
    "memory, shorter": Scenario(partial(run, announced=60, storage="memory")),
    "stream": Scenario(partial(run, announced=STEPS)),
    "stream, shorter": Scenario(partial(run, announced=400)),
    "stream, shorter, copy": Scenario(partial(run, announced=400), without=COPY),
    "stream, shorter, padding": Scenario(partial(run, announced=400), without=PADDING),
    "stream, unknown length": Scenario(partial(run, announced=None)),
    "stream, unknown length, copy": Scenario(partial(run, announced=None), without=COPY),
    "stream, compact": Scenario(partial(run, announced=400, keyframes=7)),
    **{
        f"recover, {name}": Scenario(
            partial(run, announced=options["announced"]), partial(kill, **options), is_recovery=True, without=without
        )
        for name, without, options in [
            ("whole", (), {"announced": STEPS}),
            ("shorter", (), {"announced": 400}),
            ("shorter, copy", COPY, {"announced": 400}),
            ("shorter, padding", PADDING, {"announced": 400}),
            ("unknown length", (), {"announced": None}),
            ("unknown length, copy", COPY, {"announced": None}),
            ("before the first commit", (), {"announced": 400, "step": 2}),
            ("damaged", (), {"announced": 400, "damage": True}),
            ("compact", (), {"announced": 400, "keyframes": 7}),
            ("damaged, copy", COPY, {"announced": 400, "damage": True}),
            ("killed at the end", (), {"announced": 400, "in_tail": True}),
        ]
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# The rules


@dataclass(frozen=True)
class Outcome:
    """How a child has ended: its status, what it said, and how many records it had seen committed."""

    status: int
    text: str
    committed: int


class Broken(AssertionError):
    """A rule does not hold."""


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise Broken(rule)


class Trial:
    """Tries faults of a scenario, each in a folder of its own under ``base``."""

    def __init__(self, injector: ctypes.CDLL, base: Path, scenario: Scenario, whole: Path) -> None:
        self.injector = injector
        self.base = base
        self.scenario = scenario
        self.whole = whole  # the trace of an undisturbed run
        self.folder = base / "work"
        self.path = self.folder / FILE
        self.partial = self.folder / f"{FILE}.partial"
        self.counts = mmap.mmap(-1, 8 * len(FUNCTIONS))  # shared with children
        self.committed = mmap.mmap(-1, 8)
        self.made = base / "made"
        self.made.mkdir(parents=True)
        scenario.prepare(self.made)
        state = read_journal(self.made / self.partial.name) if scenario.is_recovery else None
        self.recoverable = finishing.check_records(self.made / self.partial.name, state) if state else 0

    def child(self, fault: Fault | None) -> Outcome:
        """Run the scenario in a child, with a fault."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.made, self.folder)
        self.committed[:] = bytes(8)
        said, errors = self.base / "said", self.base / "errors"
        said.write_text("")
        errors.write_text("")

        def note(step: int, recorder: Recorder) -> None:
            self.committed[:] = recorder.stats().committed.to_bytes(8, "little")

        def work() -> None:
            signal.alarm(PATIENCE)
            for name in self.scenario.without:
                setattr(finishing, name, lambda *_: False)
            call, error, lasts = (fault.call, fault.error, fault.lasts) if fault else (0, 0, False)
            function = fault.function if fault else FUNCTIONS[0]
            self.injector.arm(os.fsencode(self.base), function.encode(), call, error, lasts)
            text, status = StringIO(), 0
            with redirect_stdout(text), redirect_stderr(text):
                if self.scenario.is_recovery:
                    status = recover.main([str(self.partial)])
                else:
                    try:
                        self.scenario.run(self.path, after_step=note)
                    except BhfastError as error:
                        print(f"bhfast: error: {error}", file=sys.stderr)
                        status = 2
            counts = [self.injector.calls_of(name.encode()) for name in FUNCTIONS]
            self.counts[:] = b"".join(count.to_bytes(8, "little") for count in counts)
            self.injector.arm(b"", FUNCTIONS[0].encode(), 0, 0, 0)
            said.write_text(text.getvalue())
            raise SystemExit(status)

        status = status_of(fork(work, errors))
        return Outcome(status, said.read_text() + errors.read_text(), int.from_bytes(self.committed[:], "little"))

    def calls(self) -> dict[str, int]:
        """Return how often the undisturbed scenario calls each function."""
        outcome = self.child(None)
        require(outcome.status in (0, 2), f"undisturbed, it fails: {outcome.text}")
        self.check(outcome)
        counts = [int.from_bytes(self.counts[8 * i : 8 * i + 8], "little") for i in range(len(FUNCTIONS))]
        return dict(zip(FUNCTIONS, counts, strict=True))

    def check(self, outcome: Outcome) -> None:
        """Raise Broken if what a child has said is not what lies in its folder."""
        text, status = outcome.text, outcome.status
        require("Traceback" not in text, f"there is a traceback: {text}")
        require(status in (0, 2), f"exit status {status}: {text}")
        lines = [line for line in text.splitlines() if "error:" in line]
        require(status == 0 or len(lines) == 1, f"a failure is one line of error: {text}")
        records = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            require(verify(path).difference is None, f"{path.name} does not verify")
            assert_begins_like(path, self.whole)
            records = max(records, len(open_trace(path).steps))
        if self.scenario.is_recovery:
            wanted = self.recoverable
            require(status != 0 or records == wanted, f"status 0 with {records} of {wanted} records")
        else:
            wanted = outcome.committed
            require(status != 0 or records == STEPS + 1, f"status 0 with {records} records")
        if saved := re.search(r"steps 0 to (\d+) of \d+ were saved", text):
            require(records == int(saved[1]) + 1, f"{records} records in the file, but: {text}")
        if "nothing was saved" in text:
            require(records == 0 and not self.partial.exists(), f"something is there, but: {text}")
        safe = re.search(r"([\d,]+) records? (?:is|are) safe in (\S+\.partial)\b", text)
        if safe and "become a shorter trace" not in text:
            require(self.partial.exists(), f"no {self.partial.name}, but: {text}")
            wanted = max(wanted, int(safe[1].replace(",", "")))
        if self.partial.exists() and self.partial.stat().st_size:
            require(str(self.partial) in text or self.scenario.is_recovery, f"nothing is said of the .partial: {text}")
            try:
                records = max(records, recover.recover(self.partial).records)
            except TraceError as error:
                require("holds no committed record" in str(error), f"what is left cannot be recovered: {error}; {text}")
            for path in self.folder.glob("*.safetensors"):
                require(verify(path).difference is None, f"{path.name} does not verify after recovery")
                assert_begins_like(path, self.whole)
        require(records >= wanted, f"{wanted} records were committed, {records} are left: {text}")
        for path in self.folder.glob("*.safetensors"):
            path.unlink()
        try:
            self.scenario.run(self.path)
        except BhfastError as error:
            raise Broken(f"the next run is refused: {error}; after: {text}") from None
        left = sorted(path.name for path in self.folder.iterdir())
        require(left == [FILE], f"after the next run there is {left}")

    def broken_rule(self, fault: Fault) -> str | None:
        """Return which rule a fault breaks, or None."""
        try:
            self.check(self.child(fault))
        except Broken as broken:
            return str(broken)
        except Exception:
            return traceback.format_exc()
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("injector")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, help="faults of each scenario, chosen at random; default: all")
    parser.add_argument("--only", help="scenarios whose name begins like this")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    injector = ctypes.CDLL(args.injector)
    injector.arm.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    injector.calls_of.argtypes = (ctypes.c_char_p,)
    injector.calls_of.restype = ctypes.c_long
    args.folder.mkdir(parents=True, exist_ok=True)
    whole = reference(args.folder, STEPS)
    tried, broken = {}, []
    for name, scenario in SCENARIOS.items():
        if args.only and not name.startswith(args.only):
            continue
        trial = Trial(injector, args.folder / name.replace(", ", "-").replace(" ", "-"), scenario, whole)
        chosen = [fault for function, calls in trial.calls().items() for fault in faults(function, calls)]
        if args.most is not None:
            chosen = random.Random(name).sample(chosen, min(args.most, len(chosen)))
        for fault in chosen:
            if rule := trial.broken_rule(fault):
                broken.append(f"{name}: {fault}: {rule}")
                if args.verbose:
                    print(broken[-1], file=sys.stderr, flush=True)
        tried[name] = len(chosen)
        if args.verbose:
            print(f"{name}: {len(chosen)} faults tried, {len(broken)} broken so far", file=sys.stderr, flush=True)
    json.dump({"tried": tried, "broken": broken}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
