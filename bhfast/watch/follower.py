"""Follows a run by the journal of its recording, and computes what the player shows of it. Writes nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bhfast import lattice
from bhfast.errors import MALFORMED, BhfastError, TraceError
from bhfast.locks import is_locked
from bhfast.report.names import token_names
from bhfast.report.player import player_data
from bhfast.summary import find_vectors
from bhfast.trace import Trace, open_trace
from bhfast.trace.journal import journal_path

MAX_SHARE = 0.01  # of a core, spent on computing data while the run goes on

WAITING = "waiting"
GOING_ON = "going on"
ENDED = "ended"
KILLED = "killed"
GONE = "gone"


@dataclass(frozen=True)
class State:
    """What is known of the run.

    Attributes:
        state: ``waiting`` for it to begin; ``going on``; ``ended``; ``killed``; ``gone``, if its file was deleted or
            given to another run.
        records: how many are committed.
        last_step: of these; None if there are none.
        version: changes with what the player can show.
        note: what is wrong, or what to do; empty for nothing.
    """

    state: str
    records: int
    last_step: int | None
    version: str
    note: str


class Data(NamedTuple):
    """What the player shows.

    Attributes:
        version: see :class:`State`.
        packed: see :meth:`bhfast.report.player.PlayerData.pack`.
    """

    version: str
    packed: bytes


class Follower:
    """Follows the run that records to a file. Its methods may be called from several threads.

    Args:
        path: the name that the trace has when the run has ended.
        param: the parameter whose rows to show; None if there is but one.
        tokens: file with their names; see :func:`bhfast.report.names.token_names`.
    """

    def __init__(self, path: Path, param: str | None = None, tokens: Path | None = None) -> None:
        self._partial = path.with_name(path.name + ".partial")
        self._path = path
        self._param = param
        self._tokens = tokens
        self._lock = threading.Lock()
        self._trace: Trace | None = None
        self._gone: State | None = None  # the last state of a trace that cannot be read any more
        self._opened = 0  # how many traces
        self._data: Data | None = None
        self._due = 0.0  # when data may be computed again

    def look(self) -> State:
        """Look what the run has committed."""
        with self._lock:
            return self._look()

    def data(self, have: str) -> Data | None:
        """Return what the player shows, newer than version ``have``; None if there is nothing newer, or not yet.

        Raises:
            BhfastError: the trace has no vectors.
        """
        with self._lock:
            state = self._look()
            is_new = self._data is None or self._data.version != state.version
            if self._trace is not None and state.records and is_new and self._is_due(state):
                begin = time.thread_time()
                self._data = Data(state.version, self._compute(self._trace))
                self._due = time.monotonic() + (time.thread_time() - begin) * (1 / MAX_SHARE - 1)
            return self._data if self._data and self._data.version != have else None

    def _is_due(self, state: State) -> bool:
        return state.state != GOING_ON or time.monotonic() >= self._due

    def _compute(self, trace: Trace) -> bytes:
        try:
            found = find_vectors(trace, self._param)
            life = None if trace.is_live else lattice.life(found.vectors, found.steps)
            return player_data(found, token_names(found, self._tokens), life).pack()
        except BhfastError:
            raise
        except MALFORMED as error:
            raise TraceError(f"{trace.path} cannot be shown: its tensors do not fit together ({error})") from None

    # -----------------------------------------------------------------------------------------------------------------
    # What becomes of the run

    def _look(self) -> State:
        if self._trace is None or (not self._trace.is_live and journal_path(self._partial).exists()):
            try:
                self._open()  # the first time, and when another run has begun, or has gone on with this one
            except (BhfastError, *MALFORMED, OSError) as error:
                if self._trace is None:
                    is_there = self._partial.exists() or self._path.exists()
                    return self._gone or State(WAITING, 0, None, "", str(error) if is_there else "")
        try:
            assert self._trace is not None
            self._trace.refresh()
        except (BhfastError, *MALFORMED, OSError) as error:
            self._gone, self._trace = self._state(GONE, str(error)), None
            return self._gone
        return self._state(*self._what_became())

    def _open(self) -> None:
        is_begun = self._partial.exists() or not self._path.exists()
        self._trace = open_trace(self._partial if is_begun else self._path)
        self._opened += 1
        self._gone = None

    def _what_became(self) -> tuple[str, str]:
        """Return the state of the trace that is open, and a note."""
        assert self._trace is not None
        if not self._trace.is_live:
            return (ENDED, "") if self._path.exists() or self._trace.path.exists() else (GONE, "its trace was deleted")
        if not self._partial.exists():
            return GONE, f"{self._partial.name} was deleted"
        if is_locked(self._partial):
            return GOING_ON, ""
        return KILLED, f"bhfast recover {self._partial.name} makes a trace of its committed steps"

    def _state(self, state: str, note: str) -> State:
        assert self._trace is not None
        steps = self._trace["recorded_steps"]
        version = f"{self._opened}-{len(steps)}-{'live' if self._trace.is_live else 'whole'}"
        return State(state, len(steps), int(steps[-1]) if len(steps) else None, version, note)
