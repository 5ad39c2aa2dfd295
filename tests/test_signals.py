"""Signals around a recording: collected, raised again, and handed back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from children import fork, status_of

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_unwind_what_they_would_just_kill(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_DFL)
    with pytest.raises(SystemExit) as leaving, terminable():
        signal.raise_signal(number)
    assert leaving.value.code == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with deferred_signals() as received, terminable():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert received == []


def test_a_child_has_the_handlers_from_before(heard: list[int]) -> None:
    """A worker that is told to end must not collect that for a recording of its parent."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def work() -> None:
        assert {number: signal.getsignal(number) for number in SIGNALS} == before | {signal.SIGTERM: signal.SIG_DFL}
        signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)

    with terminable(), deferred_signals() as received:
        assert status_of(fork(work)) == -signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]


def test_a_child_that_leaves_the_block_changes_no_handler() -> None:
    def own(number: int, frame: object) -> None: ...

    if child := os.fork():
        assert status_of(child) == 0
        return
    try:
        with deferred_signals():
            if child := os.fork():
                os._exit(status_of(child))
            signal.signal(signal.SIGTERM, own)
        os._exit(signal.getsignal(signal.SIGTERM) is not own)
    finally:
        os._exit(3)


def test_sigterm_stays_with_who_has_it_already(heard: list[int]) -> None:
    with terminable():
        signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with terminable():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
