"""SIGINT and SIGTERM during a recording: they end it between two steps, never in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred_signals(*, redeliver: bool = False) -> Iterator[list[signal.Signals]]:
    """Collect SIGINT and SIGTERM inside the block instead of acting on them.

    Args:
        redeliver: whether to raise them again after the block.

    Yields:
        The signals received so far. Outside the main thread, where Python cannot install handlers, it stays empty.
    """
    received: list[signal.Signals] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    with _handlers(dict.fromkeys(SIGNALS, receive)):
        yield received
    if redeliver:
        for number in received:
            signal.raise_signal(number)


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM raise SystemExit inside the block if it would otherwise kill the process without cleaning up."""

    def exit_with(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    is_deadly = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with _handlers({signal.SIGTERM: exit_with} if is_deadly else {}):
        yield


@contextmanager
def _handlers(wanted: dict[signal.Signals, Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        wanted = {}
    previous = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
