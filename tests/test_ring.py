"""The ring, its streams and pinned memory, with a consumer that is slow."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from pathlib import Path

import pytest
import torch
from copy_streams import SlowCopyStream
from torch import Tensor

from bhfast.ops import kernels
from bhfast.transfer.copy_stream import StallCounter, make_copy_stream
from bhfast.transfer.host_memory import MemoryPreparer, host_tensor, page_prefaulter, split
from bhfast.transfer.ring import Ring, half_size

HALF = 4


def record_all(records: int, delay: float, width: int = 3) -> tuple[list[Tensor], SlowCopyStream]:
    """Send ``records`` records of two tensors through a ring; return the hosts' tensors."""
    stream = SlowCopyStream(delay)
    the_ring = Ring(stream, HALF)
    hosts = [host_tensor((records, width), torch.int64), host_tensor((records,), torch.float32)]
    for host in hosts:
        host.fill_(-1)
    slots = [the_ring.add(host, torch.device("cpu")) for host in hosts]
    for record in range(records):
        if record == the_ring.room:
            the_ring.turn()
        values = [torch.full((width,), record), torch.tensor(float(record))]
        kernels.record_(values, slots, torch.tensor(record), 1)
    the_ring.drain(records)
    for x in slots:
        x.fill_(-7)  # what happens on the device after the end concerns nobody
    stream.close()
    return hosts, stream


@pytest.mark.parametrize("records", [1, HALF - 1, HALF, HALF + 1, 2 * HALF - 1, 2 * HALF, 2 * HALF + 1, 5 * HALF + 3])
@pytest.mark.parametrize("delay", [0.0, 0.003])
def test_every_record_arrives_whatever_the_ring_wraps_at(records: int, delay: float) -> None:
    (wide, narrow), stream = record_all(records, delay)
    assert wide.tolist() == [[r] * 3 for r in range(records)]
    assert narrow.tolist() == [float(r) for r in range(records)]
    assert stream.copies == 2 * ((records - 1) // HALF + 1)  # one for each tensor and half, the last one smaller


def test_a_full_ring_waits_and_is_counted() -> None:
    _, slow = record_all(8 * HALF, delay=0.02)
    assert slow.waits >= 5
    _, two_halves = record_all(2 * HALF, delay=0.02)
    assert two_halves.waits == 0  # it never came back to the first one


def test_what_the_host_holds_already_stays() -> None:
    """A tensor that is recorded first in the middle of a half, and has what came before on the host."""
    stream = SlowCopyStream()
    the_ring = Ring(stream, HALF)
    first = host_tensor((20,), torch.int64)
    second = torch.arange(100, 120)
    slots = the_ring.add(first, torch.device("cpu"))
    late = None
    for record in range(20):
        if record == the_ring.room:
            the_ring.turn()
        slots[record % (2 * HALF)] = record
        if record == 6:
            late = the_ring.add(second, torch.device("cpu"))
        if late is not None and record != 7:
            late[record % (2 * HALF)] = record
    the_ring.drain(20)
    stream.close()
    assert first.tolist() == list(range(20))
    assert second.tolist() == [100, 101, 102, 103, 104, 105, 6, 107, *range(8, 20)]


def test_a_ring_made_in_the_middle_takes_over_from_the_record_at_hand() -> None:
    stream = SlowCopyStream()
    host = torch.arange(100, 130)
    the_ring = Ring(stream, HALF, first=10)
    slots = the_ring.add(host, torch.device("cpu"))
    for record in range(10, 30):
        if record == the_ring.room:
            the_ring.turn()
        slots[record % (2 * HALF)] = record
    the_ring.drain(30)
    stream.close()
    assert host.tolist() == [*range(100, 110), *range(10, 30)]


def test_records_that_are_not_written_are_blank() -> None:
    stream = SlowCopyStream()
    the_ring = Ring(stream, HALF)
    host = torch.full((40,), -1)
    slots = the_ring.add(host, torch.device("cpu"), fill=-1)
    for record in range(40):
        if record == the_ring.room:
            the_ring.turn()
        if record % 10 == 0:
            slots[record % (2 * HALF)] = record
    the_ring.drain(40)
    stream.close()
    assert host.tolist() == [record if record % 10 == 0 else -1 for record in range(40)]


def test_half_size() -> None:
    assert half_size(65_536, 10_001) == 64
    assert half_size(10 << 20, 10_001) == 2
    assert half_size(1, 100) == 100
    assert half_size(0, 1) == 2


class Event:
    """Stands for a CUDA event that has happened at some time of the device, or not yet."""

    now = 0.0

    def __init__(self, at: float) -> None:
        self.at = at

    def query(self) -> bool:
        return self.at <= Event.now

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_meetings_of_the_streams_are_counted_and_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    stalls = StallCounter()
    for step in range(1000):
        monkeypatch.setattr(Event, "now", float(step - 5))  # the device is five steps behind
        copied = step + 0.25 if step % 4 == 0 else step - 0.25
        stalls.add(Event(step), Event(copied))
        assert len(stalls) <= 7
    monkeypatch.setattr(Event, "now", 2000.0)
    stalls.settle()
    assert len(stalls) == 0
    assert stalls.waits == 250


# ---------------------------------------------------------------------------------------------------------------------
# Host memory


def test_host_tensors_start_at_a_page_and_have_exactly_the_size() -> None:
    tensor = host_tensor((3, 5), torch.bfloat16)
    assert tensor.data_ptr() % mmap.PAGESIZE == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes == 30
    assert tensor.is_contiguous()
    maps = Path("/proc/self/smaps")
    if maps.exists():  # private, so that it may have huge pages
        start = f"{tensor.data_ptr():x}-"
        mapping = next(line for line in maps.read_text().splitlines() if line.startswith(start))
        assert mapping.split()[1] == "rw-p"
    assert host_tensor((0, 5), torch.float32).shape == (0, 5)


def test_copies_are_split_between_pinned_pieces() -> None:
    host = host_tensor((40, 3), torch.int32)  # 12 bytes a row: pieces end within rows
    source = torch.arange(120, dtype=torch.int32).view(40, 3)
    for first, last in ((0, 40), (0, 5), (5, 6), (3, 17), (16, 32), (39, 40), (7, 7)):
        host.fill_(-1)
        pairs = list(split(host[first:last], source[first:last], piece=64))
        for to, what in pairs:
            offset = to.storage_offset() * to.itemsize
            assert offset // 64 == max(offset, offset + to.nbytes - 1) // 64
            to.copy_(what)
        assert torch.equal(host[first:last], source[first:last])
        assert (host[:first] == -1).all()
        assert (host[last:] == -1).all()


class Driver:
    """Stands in for CUDA: registers slowly, and only what is not registered."""

    def __init__(self, delay: float = 0.0, fails: bool = False) -> None:
        self.delay = delay
        self.fails = fails
        self.sizes: dict[int, int] = {}
        self.order: list[int] = []

    def register(self, address: int, size: int) -> str | None:
        time.sleep(self.delay)
        assert address not in self.sizes
        if self.fails:
            return "out of memory"
        self.sizes[address] = size
        self.order.append(address)
        return None

    def unregister(self, address: int) -> None:
        del self.sizes[address]


def test_memory_is_prepared_piece_by_piece_exactly_and_let_go_of() -> None:
    driver = Driver()
    tensors = [host_tensor((10_000,), torch.uint8), host_tensor((5_000,), torch.uint8)]
    preparer = MemoryPreparer(lambda address, size: driver.register(address, size) if started.wait() else None,
                        driver.unregister, piece=4096)  # fmt: skip
    started = threading.Event()
    for tensor in tensors:
        preparer.add(tensor)
    started.set()
    for tensor in tensors:
        preparer.wait(tensor)
    a, b = (tensor.data_ptr() for tensor in tensors)
    order = [set(driver.order[:2]), set(driver.order[2:4]), set(driver.order[4:])]
    assert order == [{a, b}, {a + 4096, b + 4096}, {a + 8192}]  # all tensors fill at once
    assert [driver.sizes[x] for x in (a, b, a + 4096, b + 4096, a + 8192)] == [4096, 4096, 4096, 904, 1808]
    preparer.close()
    assert driver.sizes == {}


def test_copies_wait_for_their_piece_only() -> None:
    driver = Driver(delay=0.05)
    preparer = MemoryPreparer(driver.register, driver.unregister, piece=4096)
    tensor = host_tensor((40_960,), torch.uint8)
    preparer.add(tensor)
    assert preparer.wait(tensor[:100])
    assert len(driver.sizes) < 10
    assert not preparer.wait(tensor[:4096])
    start = time.perf_counter()
    preparer.close()  # in the middle of it
    assert time.perf_counter() - start < 0.3
    assert driver.sizes == {}


@pytest.mark.parametrize("raises", [False, True])
def test_memory_that_cannot_be_prepared_is_used_all_the_same(raises: bool) -> None:
    def prepare(address: int, size: int) -> str | None:
        if raises:
            raise RuntimeError("out of memory")
        return "out of memory"

    preparer = MemoryPreparer(prepare, lambda address: pytest.fail("nothing was prepared"), piece=4096)
    tensor = host_tensor((100,), torch.uint8)
    preparer.add(tensor)
    preparer.wait(tensor)
    assert preparer.error == "out of memory"
    preparer.close()


def test_preparers_end_their_threads() -> None:
    before = threading.active_count()
    for _ in range(20):
        MemoryPreparer(lambda address, size: None, lambda address: None, piece=4096).close()
    assert threading.active_count() == before


def test_populating_takes_pages_and_changes_nothing() -> None:
    preparer = page_prefaulter()
    tensor = host_tensor((3 << 20,), torch.uint8)
    tensor[:1000] = 7
    preparer.add(tensor)
    preparer.wait(tensor)
    if preparer.error is None:
        pages = tensor.nbytes // mmap.PAGESIZE
        resident = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None)
        assert libc.mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), resident) == 0
        assert sum(x & 1 for x in resident) == pages
    assert (tensor[:1000] == 7).all()
    assert not tensor[1000:].any()
    preparer.close()


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_a_lane_is_for_devices_that_have_one(device: torch.device) -> None:
    stream = make_copy_stream(device)
    assert (stream is None) == (device.type == "cpu")
    if stream is not None:
        stream.close()
