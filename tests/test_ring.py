"""The ring, its lanes and pinned memory, with a consumer that is slow."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from lanes import SlowLane
from torch import Tensor

from bhfast import _ops, ring
from bhfast.ring import Pinner, Ring, half_size, host_tensor, split

HALF = 4


def record_all(records: int, delay: float, width: int = 3) -> tuple[list[Tensor], Ring, SlowLane]:
    """Send ``records`` records of two tensors through a ring; return the hosts' tensors."""
    lane = SlowLane(delay)
    the_ring = Ring(lane, HALF)
    hosts = [host_tensor((records, width), torch.int64), host_tensor((records,), torch.float32)]
    for host in hosts:
        host.fill_(-1)
    slots = [the_ring.add(host, torch.device("cpu")) for host in hosts]
    for record in range(records):
        if record == the_ring.room:
            the_ring.turn()
        values = [torch.full((width,), record), torch.tensor(float(record))]
        _ops.record_(values, slots, torch.tensor(record), 1)
    the_ring.drain(records)
    for x in slots:
        x.fill_(-7)  # what happens on the device after the end concerns nobody
    lane.close()
    return hosts, the_ring, lane


@pytest.mark.parametrize("records", [1, HALF - 1, HALF, HALF + 1, 2 * HALF - 1, 2 * HALF, 2 * HALF + 1, 5 * HALF + 3])
@pytest.mark.parametrize("delay", [0.0, 0.003])
def test_every_record_arrives_whatever_the_ring_wraps_at(records: int, delay: float) -> None:
    (wide, narrow), _, lane = record_all(records, delay)
    assert wide.tolist() == [[r] * 3 for r in range(records)]
    assert narrow.tolist() == [float(r) for r in range(records)]
    assert lane.copies == 2 * ((records - 1) // HALF + 1)  # one for each tensor and half, the last one smaller


def test_a_full_ring_waits_and_is_counted() -> None:
    _, slow, _ = record_all(8 * HALF, delay=0.02)
    assert slow.stalls >= 5
    _, one_half, _ = record_all(2 * HALF, delay=0.02)
    assert one_half.stalls == 0  # it never came back to a half


def test_what_the_host_holds_already_stays() -> None:
    """A tensor that is recorded first in the middle of a half, and has what came before on the host."""
    lane = SlowLane()
    the_ring = Ring(lane, HALF)
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
    lane.close()
    assert first.tolist() == list(range(20))
    assert second.tolist() == [100, 101, 102, 103, 104, 105, 6, 107, *range(8, 20)]


def test_half_size() -> None:
    assert half_size(65_536, 10_001) == 64
    assert half_size(10 << 20, 10_001) == 2
    assert half_size(1, 100) == 100
    assert half_size(0, 1) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Host memory


def test_host_tensors_start_at_a_page_and_have_exactly_the_size() -> None:
    tensor = host_tensor((3, 5), torch.bfloat16)
    assert tensor.data_ptr() % ring.PAGE == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes == 30
    assert tensor.is_contiguous()
    assert host_tensor((0, 5), torch.float32).shape == (0, 5)


def test_copies_are_split_between_pinned_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "PIN_PIECE", 64)
    host = host_tensor((40, 3), torch.int32)  # 12 bytes a row: pieces end within rows
    source = torch.arange(120, dtype=torch.int32).view(40, 3)
    for first, last in ((0, 40), (0, 5), (5, 6), (3, 17), (16, 32), (39, 40), (7, 7)):
        host.fill_(-1)
        pairs = list(split(host[first:last], source[first:last]))
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


def test_memory_is_pinned_piece_by_piece_exactly_and_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "PIN_PIECE", 4096)
    driver = Driver()
    pinner = Pinner(driver.register, driver.unregister)
    tensors = [host_tensor((10_000,), torch.uint8), host_tensor((5_000,), torch.uint8)]
    pinner.add(tensors)
    for tensor in tensors:
        pinner.wait(tensor)
    a, b = (tensor.data_ptr() for tensor in tensors)
    assert sorted(driver.sizes.values()) == [904, 1808, 4096, 4096, 4096]
    assert set(driver.order[:2]) == {a, b}  # the first piece of each comes first: all tensors fill at once
    assert sum(driver.sizes.values()) == 15_000
    pinner.close()
    assert driver.sizes == {}


def test_copies_wait_for_their_piece_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "PIN_PIECE", 4096)
    driver = Driver(delay=0.05)
    pinner = Pinner(driver.register, driver.unregister)
    tensor = host_tensor((40_960,), torch.uint8)
    pinner.add([tensor])
    assert pinner.wait(tensor[:100])
    assert len(driver.sizes) < 10
    assert not pinner.wait(tensor[:4096])
    start = time.perf_counter()
    pinner.close()  # in the middle of it
    assert time.perf_counter() - start < 0.3
    assert driver.sizes == {}


@pytest.mark.parametrize("raises", [False, True])
def test_memory_that_cannot_be_pinned_is_used_all_the_same(raises: bool) -> None:
    def register(address: int, size: int) -> str | None:
        if raises:
            raise RuntimeError("out of memory")
        return "out of memory"

    pinner = Pinner(register, lambda address: pytest.fail("nothing was pinned"))
    tensor = host_tensor((100,), torch.uint8)
    pinner.add([tensor])
    pinner.wait(tensor)
    assert pinner.error == "out of memory"
    pinner.close()


def test_pinners_end_their_threads() -> None:
    before = threading.active_count()
    for _ in range(20):
        Pinner(lambda address, size: None, lambda address: None).close()
    assert threading.active_count() == before


@pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)
def test_a_lane_is_for_devices_that_have_one(device: torch.device) -> None:
    lane = ring.make_lane(device)
    assert (lane is None) == (device.type == "cpu")
    if lane is not None:
        lane.close()
