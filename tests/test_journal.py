"""The journal: written line by line, read up to the first bad one; and the trace that is made of what it says."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import CHANGES, JUNK, fuzzed, mutated

from bhfast.errors import StorageError, TraceError
from bhfast.recover import recover
from bhfast.storage.files import sync_folder, write_at
from bhfast.storage.finish import check_records, finish
from bhfast.storage.journal import Journal, encode
from bhfast.trace import open_trace
from bhfast.trace.checksums import checksums
from bhfast.trace.format import ALIGNMENT, FORMAT, bytes_of
from bhfast.trace.journal import VERSION, State, journal_path, read_journal

# ---------------------------------------------------------------------------------------------------------------------
# Writing


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line[9:]) for line in path.read_bytes().rstrip(b"\0").split(b"\n")[:-1]]


def test_the_journal_lies_beside_its_file() -> None:
    assert journal_path(Path("folder/t.safetensors.partial")) == Path("folder/t.safetensors.partial.journal")


def test_each_line_has_its_checksum(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.append({"keep": 2})
    journal.release()
    journal.close()
    assert (tmp_path / "j").read_bytes() == b'%08x {"keep":2}\n' % zlib.crc32(b'{"keep":2}')
    assert journal.end == (tmp_path / "j").stat().st_size


def test_a_journal_has_disk_in_hand_until_it_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bhfast.storage.journal.AHEAD", 10_000)
    journal = Journal(tmp_path / "j")
    for record in range(1000):
        journal.append({"records": record})
        assert (tmp_path / "j").stat().st_size >= journal.end + 10_000
    journal.release()
    journal.close()
    assert (tmp_path / "j").stat().st_size == journal.end > 10_000
    assert lines_of(tmp_path / "j")[-1] == {"records": 999}


def test_a_journal_goes_on_where_it_ended(tmp_path: Path) -> None:
    """What lies behind was not written whole, and is written over."""
    journal = Journal(tmp_path / "j")
    journal.append({"keep": 1})
    end = journal.end
    journal.append({"keep": 2})
    journal.close()
    again = Journal(tmp_path / "j", end)
    again.append({"keep": 3})
    again.release()
    again.close()
    assert lines_of(tmp_path / "j") == [{"keep": 1}, {"keep": 3}]
    anew = Journal(tmp_path / "j")
    anew.release()
    anew.close()
    assert (tmp_path / "j").read_bytes() == b""


def test_writes_go_on_however_little_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bhfast.storage.files.CHUNK", 1000)
    real, sizes = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return real(fd, data[:300], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = bytes(range(256)) * 10
    with open(tmp_path / "x", "wb") as file:
        write_at(file.fileno(), memoryview(data), 5)
    assert (tmp_path / "x").read_bytes() == b"\0" * 5 + data
    assert max(sizes) == 1000


def test_a_folder_is_synced_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, synced = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((fd, os.fstat(fd).st_ino)) or real(fd))
    sync_folder(tmp_path)
    ((fd, inode),) = synced
    assert inode == tmp_path.stat().st_ino
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# ---------------------------------------------------------------------------------------------------------------------
# Finishing

RECORDS, ROOM = 7, 5000  # committed, and made room for
WIDE = torch.arange(RECORDS * 1022).view(RECORDS, 1022).bfloat16()  # whose records end anywhere in a line
LONG = torch.arange(RECORDS * 640, dtype=torch.float32).view(RECORDS, 10, 64)
SMALL = torch.arange(RECORDS, dtype=torch.float64)


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """Two tensors of which most records are missing, one in the journal, and a constant; as a killed run leaves it."""
    partial, header = tmp_path / "t.safetensors.partial", 8192
    room = ROOM * WIDE[0].nbytes
    with open(partial, "wb") as file:
        file.truncate(header + room + ROOM * LONG[0].nbytes)
        write_at(file.fileno(), bytes_of(WIDE), header)
        write_at(file.fileno(), bytes_of(LONG), header + room)
    journal = Journal(journal_path(partial))
    none = {"blank": 0.0}
    metadata = {"format": FORMAT, "of": "π"}
    start = {"version": VERSION, "every": 3, "records": None, "header": header, "metadata": metadata}
    sums = {"wide": encode(checksums(WIDE).tobytes()), "long": encode(checksums(LONG).tobytes())}
    for event in (
        {"start": start},
        {"tensor": "wide", "dtype": "BF16", "shape": [1022], "offset": 0, **none},
        {"tensor": "long", "dtype": "F32", "shape": [10, 64], "offset": room, **none},
        {"tensor": "small", "dtype": "F64", "shape": [], "offset": None, **none},
        {"constant": "rows", "dtype": "I64", "shape": [2], "data": encode(bytes_of(torch.tensor([5, -6])))},
        {"records": RECORDS, "crc32": sums, "values": {"small": encode(bytes_of(SMALL))}},
    ):
        journal.append(event)
    journal.close()
    return partial


def assert_is_whole(path: Path, records: int = RECORDS) -> None:
    opened = open_trace(path)
    assert opened.metadata["of"] == "π"
    assert opened.keys() == {"recorded_steps", "small", "rows", "wide", "long"}
    assert opened.steps.tolist() == list(range(0, 3 * records, 3))
    for name, wanted in (("wide", WIDE), ("long", LONG), ("small", SMALL)):
        assert torch.equal(opened[name], wanted[:records]), name
    assert opened["rows"].tolist() == [5, -6]
    assert list(opened.damage()) == []


def test_a_journal_says_what_is_committed(partial: Path) -> None:
    state = read_journal(partial)
    assert (state.records, state.start["every"], state.collapse) == (RECORDS, 3, None)
    assert [(own.tensor.name, at) for own, at in state.in_file] == [("wide", 0), ("long", ROOM * 2044)]
    assert [own.nbytes for own in state.tensors.values()] == [2044, 2560, 8]
    assert state.constants["rows"].tolist() == [5, -6]
    assert check_records(partial, state) == RECORDS


WAYS = {"as it is": [], "by a copy": ["_collapse_range"], "with padding": ["_collapse_range", "_has_room"]}


@pytest.mark.parametrize("broken", WAYS.values(), ids=WAYS)
def test_finishing_closes_the_gaps(broken: list[str], partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in broken:
        monkeypatch.setattr(f"bhfast.storage.finish.{name}", lambda *_: False)
    path = partial.with_suffix("")
    finish(partial, path)
    assert_is_whole(path)
    assert (path.stat().st_size < 8192 + WIDE.nbytes + LONG.nbytes + 2 * 4096) == ("_has_room" not in broken)
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    if WAYS["by a copy"] == broken:  # which is free to align it
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert header["long"]["data_offsets"][0] % ALIGNMENT == 0


def test_only_the_records_that_are_to_be_kept(partial: Path) -> None:
    journal = Journal(journal_path(partial), read_journal(partial).end)
    journal.append({"keep": 4})
    journal.close()
    finish(partial, partial.with_suffix(""))
    assert_is_whole(partial.with_suffix(""), 4)


def test_a_finish_that_fails_can_be_recovered_from(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: os.stat("/nowhere"))
        with pytest.raises(
            StorageError, match=r"finishing the trace .* failed: No such file .*; 7 records are safe in"
        ):
            finish(partial, partial.with_suffix(""))
    assert [path.name for path in partial.parent.iterdir()] == [partial.name]
    recover(partial)
    assert_is_whole(partial.with_suffix(""))


@pytest.mark.parametrize(("at", "good"), [(0, 0), (3 * 2044 + 5, 3), (ROOM * 2044 + 2560, 1), (7 * 2044, 7)])
def test_the_first_damaged_record_is_found(at: int, good: int, partial: Path) -> None:
    with open(partial, "r+b") as file:
        file.seek(8192 + at)
        file.write(b"damage")
    assert check_records(partial, read_journal(partial)) == good


def test_records_that_were_cut_off_are_damaged(partial: Path) -> None:
    os.truncate(partial, 8192 + ROOM * 2044 + 2 * 2560 + 100)
    assert check_records(partial, read_journal(partial)) == 2


def test_before_the_first_commit_there_is_no_record(partial: Path) -> None:
    path = journal_path(partial)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\n", 0, whole.index(b'{"records"')) + 1])
    state = read_journal(partial)
    assert state.tensors.keys() == {"wide", "long", "small"}
    assert check_records(partial, state) == state.records == 0


def test_a_missing_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot read the journal .*gone\.partial\.journal: No such file"):
        read_journal(tmp_path / "gone.partial")


# ---------------------------------------------------------------------------------------------------------------------
# Journals that were damaged

EVENTS: list[dict[str, Any]] = [
    {"start": {"version": VERSION, "every": 1, "records": 9, "header": 4096, "metadata": {"format": FORMAT}}},
    {"tensor": "w", "dtype": "F32", "shape": [4, 8], "blank": 0.0, "offset": 0},
    {"tensor": "loss", "dtype": "F32", "shape": [], "blank": float("nan"), "offset": None},
    {"constant": "rows", "dtype": "I64", "shape": [1], "data": "BQAAAAAAAAA="},
    {"records": 2, "crc32": {"w": "AAAAAAEAAAA="}, "values": {"loss": "AAAAAAAAAAA="}},
    {"metadata": {"more": "of it"}},
    {"records": 3, "crc32": {"w": "AgAAAA=="}, "values": {"loss": "AAAAAA=="}},
    {"keep": 2},
    {"collapse": [8192, 4096], "size": 65536},
    {"tail": True},
]


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The file that is streamed into, and the journal beside it."""
    partial = tmp_path_factory.mktemp("journal") / "j.safetensors.partial"
    partial.write_bytes(b"\0" * 100)
    writer = Journal(journal_path(partial))
    for event in EVENTS:
        writer.append(event)
    writer.release()
    writer.close()
    return partial, journal_path(partial).read_bytes()


def read(partial: Path, content: bytes) -> State | None:
    journal_path(partial).write_bytes(content)
    try:
        return read_journal(partial)
    except TraceError:
        return None


def test_a_journal_is_read_up_to_its_first_bad_line(journal: tuple[Path, bytes]) -> None:
    partial, content = journal
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == len(EVENTS)
    for cut in range(0, len(content), 3):
        state = read(partial, content[:cut])
        whole = [end for end in ends if end <= cut]
        if not whole:
            assert state is None
        else:
            assert state is not None
            assert state.end == whole[-1]
            assert state.records == [0, 0, 0, 0, 2, 2, 3, 2, 2, 2][len(whole) - 1]


@fuzzed(400)
@given(changes=CHANGES)
def test_damaged_journals(journal: tuple[Path, bytes], changes: list[tuple[str, int, bytes]]) -> None:
    partial, content = journal
    state = read(partial, mutated(content, changes))
    if state is not None:
        assert state.start == EVENTS[0]["start"]
        assert 0 <= state.records <= 3
        assert state.tensors.keys() <= {"w", "loss"}


@fuzzed(400)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(range(len(EVENTS))), st.sampled_from(sorted({k for e in EVENTS for k in e})), JUNK),
        min_size=1,
        max_size=2,
    )
)
def test_journals_of_anything(journal: tuple[Path, bytes], changes: list[tuple[int, str, Any]]) -> None:
    events = [dict(event) for event in EVENTS]
    for line, key, junk in changes:
        events[line][key] = junk
    read(journal[0], lines(*(json.dumps(event).encode() for event in events)))


def lines(*texts: bytes) -> bytes:
    return b"".join(b"%08x %s\n" % (zlib.crc32(text), text) for text in texts)


@pytest.mark.parametrize(
    "text", [b"", b"{x}", b"\xff", b"[" * 100_000, b"[]", b'"tensor"', b"{}"], ids=lambda x: str(x)[:20]
)
def test_peculiar_lines_of_journals(journal: tuple[Path, bytes], text: bytes) -> None:
    assert read(journal[0], lines(text)) is None
    assert read(journal[0], lines(json.dumps(EVENTS[0]).encode(), text)) is None


def test_a_journal_of_a_file_that_is_gone(journal: tuple[Path, bytes]) -> None:
    gone = journal[0].with_name("gone.partial")
    journal_path(gone).write_bytes(lines(*(json.dumps(event).encode() for event in EVENTS[:-1])))
    with pytest.raises(TraceError, match=r"cannot open .*gone\.partial"):
        read_journal(gone)
