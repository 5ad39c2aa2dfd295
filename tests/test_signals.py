"""Signals around a recording: collected, raised again, and handed back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from bhfast.signals import SIGNALS, deferred_signals, terminable


@pytest.fixture(autouse=True)
def heard() -> Iterator[list[int]]:
    """The signals that come through to the handlers of the program around."""
    heard: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: heard.append(number)) for number in SIGNALS}
    yield heard
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("redeliver", [False, True])
def test_signals_are_collected_and_raised_again_if_asked_for(redeliver: bool, heard: list[int]) -> None:
    with deferred_signals(redeliver=redeliver) as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]
        assert heard == []
    assert heard == ([signal.SIGTERM, signal.SIGINT] if redeliver else [])
    signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT]
    assert heard[-1] == signal.SIGINT


def test_an_exception_hands_the_handlers_back(heard: list[int]) -> None:
    with pytest.raises(ZeroDivisionError), deferred_signals():
        raise ZeroDivisionError
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_the_inner_block_has_the_signal_and_tells_the_outer_one(heard: list[int]) -> None:
    with deferred_signals() as outer:
        with deferred_signals(redeliver=True) as inner:
            signal.raise_signal(signal.SIGINT)
            assert (inner, outer) == ([signal.SIGINT], [])
        assert outer == [signal.SIGINT]
    assert heard == []


def test_other_threads_leave_signals_alone(heard: list[int]) -> None:
    inside, leave, collected = threading.Event(), threading.Event(), []

    def work() -> None:
        with deferred_signals(redeliver=True) as received, terminable():
            inside.set()
            leave.wait()
            collected.extend(received)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    signal.raise_signal(signal.SIGTERM)
    leave.set()
    thread.join()
    assert collected == []
    assert heard == [signal.SIGTERM]


def test_sigterm_unwinds_what_it_would_just_kill() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit) as leaving, terminable():
        signal.raise_signal(signal.SIGTERM)
    assert leaving.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_stays_with_who_has_it_already(heard: list[int]) -> None:
    with terminable():
        signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with terminable():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
