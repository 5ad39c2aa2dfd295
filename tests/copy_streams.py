"""Lanes for tests: what a CUDA side stream does, done by a thread of the CPU that takes its time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from torch import Tensor


class ThreadTicket:
    """Done when its thread has said so."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def query(self) -> bool:
        return self.done.is_set()


class SlowCopyStream:
    """Copies late, and in order. On a CPU the computation is the caller, so ``hold`` blocks it.

    Attributes:
        copies: the number of copies of one tensor that were made.
        closed: whether it was closed.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self.waits = 0
        self.copies = 0
        self.closed = False
        self.delay = delay
        self.hosts: list[Tensor] = []
        self.queue: queue.Queue = queue.Queue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def add(self, host: Tensor) -> None:
        self.hosts.append(host)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> ThreadTicket:
        ticket = ThreadTicket()
        self.queue.put((pairs, ticket))
        return ticket

    def hold(self, ticket: ThreadTicket) -> None:
        self.waits += not ticket.query()
        ticket.done.wait()

    def drain(self) -> None:
        self.queue.join()

    def close(self) -> None:
        self.queue.put(None)
        self.thread.join()
        self.closed = True

    def _work(self) -> None:
        while (work := self.queue.get()) is not None:
            pairs, ticket = work
            time.sleep(self.delay)
            for host, slots in pairs:
                host.copy_(slots)
                self.copies += 1
            ticket.done.set()
            self.queue.task_done()
