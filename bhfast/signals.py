"""SIGINT, SIGTERM and SIGHUP during a recording: they end it between two steps, never in the middle of one.

SIGHUP arrives when a terminal is closed. If it is ignored, as under ``nohup``, it stays ignored. Windows has none.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
SIGNALS = (signal.SIGINT, signal.SIGTERM, *HANGUP)


@contextmanager
def deferred_signals(*, redeliver: bool = False) -> Iterator[list[signal.Signals]]:
    """Collect the signals that arrive inside the block instead of acting on them.

    Args:
        redeliver: whether to raise them again after the block.

    Yields:
        The signals received so far. Outside the main thread, where Python cannot install handlers, it stays empty.
    """
    received: list[signal.Signals] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    ignored = [number for number in HANGUP if signal.getsignal(number) == signal.SIG_IGN]
    with _handlers({number: receive for number in SIGNALS if number not in ignored}):
        yield received
    if redeliver:
        for number in received:
            signal.raise_signal(number)


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise SystemExit inside the block if they would otherwise kill without cleaning up."""

    def exit_with(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    deadly = [number for number in (signal.SIGTERM, *HANGUP) if signal.getsignal(number) == signal.SIG_DFL]
    with _handlers(dict.fromkeys(deadly, exit_with)):
        yield


_previous: list[dict[signal.Signals, Any]] = []  # for each block that is open, the handlers it replaced


@contextmanager
def _handlers(wanted: dict[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        wanted = {}
    previous = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    _previous.append(previous)
    try:
        yield
    finally:
        if previous in _previous:  # else this is a child forked inside the block, which already restored them
            _previous.remove(previous)
            _restore(previous)


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _restore_in_child() -> None:
    """Restore a forked child's handlers from before the recording, because the child does not record."""
    while _previous:
        _restore(_previous.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_in_child)
