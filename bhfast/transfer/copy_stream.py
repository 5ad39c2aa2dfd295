"""Copies from a device to the host while it computes: a side stream, and pinned memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bhfast.transfer.host_memory import PIN_PIECE, MemoryPreparer, split


class Ticket(Protocol):
    """Stands for a group of copies under way. torch's CUDA events are tickets."""

    def query(self) -> bool:
        """Return whether the copies are done."""
        ...


class CopyStream(Protocol):
    """Copies from a device to the host while the device computes, in the order of the calls."""

    @property
    def waits(self) -> int:
        """How often the computation had to wait: until a slot it needs was copied, or until memory was pinned.

        Complete after :meth:`drain`.
        """
        ...

    def add(self, host: Tensor) -> None:
        """Make a tensor of :func:`host_tensor` ready to be copied to."""
        ...

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Ticket:
        """Copy the second tensor of each pair to the first, after all the computation issued so far."""
        ...

    def hold(self, ticket: Ticket) -> None:
        """Let the computation issued from now on wait until the ticket's copies are done."""
        ...

    def drain(self) -> None:
        """Wait, on the host, until the computation and all copies are done."""
        ...

    def close(self) -> None:
        """Release the host tensors. Nothing may be copying any more."""
        ...


class StallCounter:
    """Counts how often the computation had to wait for a copy.

    The host runs far ahead of the device, so it can tell which event of a pair came first only when both are over.
    """

    def __init__(self) -> None:
        self.waits = 0
        self._ahead: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def add(self, arrived: torch.cuda.Event, copied: torch.cuda.Event) -> None:
        """Add a pair of future events, and count the pairs that are over."""
        self.settle()
        self._ahead.append((arrived, copied))

    def settle(self) -> None:
        while self._ahead and all(event.query() for event in self._ahead[0]):
            arrived, copied = self._ahead.popleft()
            self.waits += arrived.elapsed_time(copied) > 0

    def __len__(self) -> int:
        return len(self._ahead)


class CudaCopyStream:
    """A side stream, and host memory that is pinned in the background."""

    def __init__(self, device: torch.device) -> None:
        self._waits_for_memory = 0
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._stalls = StallCounter()
        self.pinner = MemoryPreparer(_cuda_register, torch.cuda.cudart().cudaHostUnregister, PIN_PIECE)

    def add(self, host: Tensor) -> None:
        self.pinner.add(host)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Ticket:
        for host, _ in pairs:
            self._waits_for_memory += self.pinner.wait(host)
        self.stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.stream):
            for pair in pairs:
                for host, slots in split(*pair):
                    host.copy_(slots, non_blocking=True)
        return self.stream.record_event(torch.cuda.Event(enable_timing=True))

    def hold(self, ticket: Ticket) -> None:
        assert isinstance(ticket, torch.cuda.Event)
        stream = torch.cuda.current_stream(self.device)
        self._stalls.add(stream.record_event(torch.cuda.Event(enable_timing=True)), ticket)
        stream.wait_event(ticket)

    @property
    def waits(self) -> int:
        return self._waits_for_memory + self._stalls.waits

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)
        self._stalls.settle()

    def close(self) -> None:
        self.pinner.close()


def make_copy_stream(device: torch.device) -> CopyStream | None:
    """Return a new copy stream from ``device``; None if the host reads its memory directly."""
    return CudaCopyStream(device) if device.type == "cuda" else None


def _cuda_register(address: int, size: int) -> str | None:
    portable = 1
    error = torch.cuda.cudart().cudaHostRegister(address, size, portable)
    return None if int(error) == 0 else f"cudaHostRegister of {size} bytes: {error}"
