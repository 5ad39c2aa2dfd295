"""The page that follows a run: what it says of the run, what it serves, and to whom."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Program, fork, status_of
from chromium import Chromium, find_chromium
from safetensors.torch import load
from streaming_run import record
from traces import rewrite

from bhfast import watch
from bhfast.recording.recorder import Recorder
from bhfast.recover import recover
from bhfast.trace.journal import journal_path
from bhfast.train import TrainResult
from bhfast.watch import follower as module
from bhfast.watch.follower import Follower
from bhfast.watch.server import WatchServer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bhfast.trace.live.PATIENCE", 0.1)
    monkeypatch.setattr(module, "MAX_SHARE", 1.0)


class Client:
    """What a browser may ask."""

    def __init__(self, server: WatchServer) -> None:
        self.port = server.server_port

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()

    def state(self) -> dict[str, Any]:
        return json.loads(self.get("/state")[2])

    def data(self, have: str = "") -> tuple[str, dict[str, torch.Tensor]]:
        status, headers, body = self.get(f"/data?have={have}")
        assert status == 200, body
        return headers["X-Version"], load(gzip.decompress(body))


@contextmanager
def watching(path: Path, param: str | None = "first") -> Iterator[Client]:
    with WatchServer(Follower(path, param), f"bhfast: {path.name}") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()


def kill_at(step: int, recorder: Recorder) -> None:
    if step > 40 and recorder.stats().committed > 20:
        os.kill(os.getpid(), signal.SIGKILL)


def leave_killed(path: Path) -> None:
    work = partial(record, path, 9999, commit_seconds=0.0, after_step=kill_at)
    assert status_of(fork(work)) == -signal.SIGKILL


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of a run


def test_a_run_that_begins_grows_and_ends(tmp_path: Path) -> None:
    path, seen = tmp_path / "t", []

    def look(step: int, recorder: Recorder) -> None:
        if step in (30, 60):
            while recorder.stats().committed < step - 10:
                time.sleep(0.001)
            state = client.state()
            version, data = client.data(seen[-1][1] if seen else "")
            seen.append((state, version, data))
            assert journal_path(path.with_name("t.partial")).exists()

    with watching(path) as client:
        assert client.state() == {"state": "waiting", "records": 0, "last_step": None, "version": "", "note": ""}
        assert client.get("/data")[0] == 204
        record(path, 80, commit_seconds=0.0, after_step=look)
        assert client.state() == {"state": "ended", "records": 81, "last_step": 80, "version": "1-81-whole", "note": ""}
        version, whole = client.data(seen[-1][1])
        assert version == "1-81-whole"
        assert client.get(f"/data?have={version}")[0] == 204
        os.remove(path)
        assert client.state()["state"] == "gone"
    for step, (state, version, data) in zip((30, 60), seen, strict=True):
        assert state["state"] == "going on"
        assert state["last_step"] == state["records"] - 1 >= step - 11
        assert int(version.split("-")[1]) == len(data["steps"]) >= state["records"]
        assert "life" not in data
        for name in ("steps", "displacement", "distinct"):
            assert torch.equal(data[name], whole[name][: len(data[name])]) or data[name].isnan().any(), name
    assert whole["steps"].tolist() == list(range(81))
    assert "life" in whole
    assert len(seen[0][2]["steps"]) < len(seen[1][2]["steps"])


def test_a_killed_run_and_its_recovery_and_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "t"
    leave_killed(path)
    with watching(path) as client:
        state = client.state()
        assert (state["state"], state["note"]) == (
            "killed",
            "bhfast recover t.partial makes a trace of its committed steps",
        )
        assert len(client.data()[1]["steps"]) == state["records"] > 20
        recover(tmp_path / "t.partial")
        assert client.state() == {**state, "state": "ended", "version": f"1-{state['records']}-whole", "note": ""}
        states = []

        def look(step: int, recorder: Recorder) -> None:
            if step == 20:
                while not recorder.stats().committed:
                    time.sleep(0.001)
                states.append(client.state())

        record(path, 25, commit_seconds=0.0, after_step=look)
        assert states[0]["state"] == "going on"
        assert states[0]["version"].startswith("2-")
        assert client.state()["records"] == 26


def test_files_that_are_deleted(tmp_path: Path) -> None:
    path, partial_ = tmp_path / "t", tmp_path / "t.partial"
    leave_killed(path)
    with watching(path) as client:
        records = client.state()["records"]
        version, _ = client.data()
        os.remove(partial_)
        assert client.state() == {
            **{"state": "gone", "records": records, "last_step": records - 1, "version": version},
            "note": "t.partial was deleted",
        }
        os.remove(journal_path(partial_))
        for _ in range(2):
            state = client.state()
            assert (state["state"], state["records"]) == ("gone", records)
            assert "its trace is not in" in state["note"]
        assert client.get(f"/data?have={version}")[0] == 204  # what was shown stays
        assert client.data()[0] == version


def test_a_run_that_keeps_its_records_in_memory(tmp_path: Path) -> None:
    states = []
    with watching(tmp_path / "t") as client:
        record(
            *(tmp_path / "t", 3),
            announced=3,
            storage="memory",
            after_step=lambda step, recorder: states.append(client.state()),
        )
        assert states[0]["state"] == "waiting"
        assert "--storage memory" in states[0]["note"]
        assert client.state()["records"] == 4


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    rewrite(tmp_path / "t", {"recorded_steps": torch.arange(3), "loss": torch.zeros(3)}, {})
    with watching(tmp_path / "t", None) as client:
        assert client.state()["records"] == 3
        status, _, text = client.get("/data")
        assert status == 409
        assert b"no vectors" in text


def test_computing_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the run goes on; the last data comes at once."""
    monkeypatch.setattr(module, "MAX_SHARE", 1e-9)
    path, found = tmp_path / "t", []

    def look(step: int, recorder: Recorder) -> None:
        if step in (30, 40, 50):
            while recorder.stats().committed < step - 10:
                time.sleep(0.001)
            found.append(follower.data(found[0].version if found else ""))

    follower = Follower(path, "first")
    record(path, 60, commit_seconds=0.0, after_step=look)
    assert [x is None for x in found] == [False, True, True]
    assert follower.data(found[0].version).version == "1-61-whole"


# ---------------------------------------------------------------------------------------------------------------------
# What is served, and to whom


def test_only_this_machine_by_its_own_name(run: TrainResult) -> None:
    with watching(run.path, None) as client:
        for host in (f"127.0.0.1:{client.port}", f"localhost:{client.port}"):
            assert client.get("/", Host=host)[0] == 200
        for host in (
            "evil.example",
            f"evil.example:{client.port}",
            "127.0.0.1",
            "localhost:1",
            "",
            "127.0.0.1.evil.example",
        ):
            for path in ("/", "/state", "/data", "/nothing"):
                status, _, text = client.get(path, Host=host)
                assert (status, text) == (403, b"This page is for browsers on this machine.\n")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", client.port), timeout=5)


def test_nothing_but_its_page_and_data(run: TrainResult, tmp_path: Path) -> None:
    with watching(run.path, None) as client:
        name = run.path.name
        for path in (
            f"/{name}",
            "/../../etc/passwd",
            "/%2e%2e/etc/passwd",
            "//etc/passwd",
            "/data/../..",
            "/state/",
            "/web/watch.js",
        ):
            assert client.get(path)[0] == 404, path
        status, headers, page = client.get("/?x=1")
        assert status == 200
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["Cache-Control"] == "no-store"
        assert f"bhfast: {name}".encode() in page
        assert b"http://" not in page.replace(b"http://www.w3.org/", b"")
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            connection = HTTPConnection("127.0.0.1", client.port, timeout=20)
            connection.request(method, "/")
            assert connection.getresponse().status == 501


def test_a_name_is_text_on_the_page(tmp_path: Path) -> None:
    with watching(tmp_path / "<script>alert(1)<") as client:
        assert b"<script>alert" not in client.get("/")[2]


def test_a_client_that_goes_away(run: TrainResult, capfd: pytest.CaptureFixture[str]) -> None:
    with watching(run.path, None) as client:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", client.port)) as client_socket:
                client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
                client_socket.sendall(f"GET /data HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\n\r\n".encode())
        assert client.state()["state"] == "ended"
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------
# The program, and the page in a browser


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert watch.main([str(tmp_path / "t"), "--port", str(port)]) == 2
    said = f"bhfast watch: error: cannot listen on port {port}: Address already in use; choose another --port\n"
    assert capsys.readouterr().err == said
    for port, why in (("70000", "must be 0 to 65535, got 70000"), ("x", "invalid port_number value: 'x'")):
        with pytest.raises(SystemExit):
            watch.main([str(tmp_path / "t"), "--port", port])
        assert why in capsys.readouterr().err


def test_the_program_serves_until_ctrl_c(run: TrainResult) -> None:
    program = Program(lambda: watch.main([f"{run.path}.partial"]))
    line = program.stdout.readline()
    assert line.startswith(f"{run.path}: http://127.0.0.1:")
    connection = HTTPConnection(line.split("//")[1].rstrip("/\n"), timeout=20)
    connection.request("GET", "/state")
    assert json.loads(connection.getresponse().read())["records"] == 131
    assert os.getpriority(os.PRIO_PROCESS, program.pid) == 19
    program.send_signal(signal.SIGINT)
    assert program.communicate() == ("", "")
    assert program.returncode == 0


def test_the_page_follows_a_run(tmp_path: Path) -> None:
    """In a browser: it takes in new records, keeps the place, and says when the run has ended, and the server."""
    program = find_chromium()
    if program is None:
        pytest.skip("this machine has no Chromium")
    (tmp_path / "profile").mkdir()
    browser, path = Chromium(program, tmp_path / "profile"), tmp_path / "t"

    def look(step: int, recorder: Recorder) -> None:
        if step in (30, 60):
            while recorder.stats().committed < step - 10:
                time.sleep(0.001)
            browser.wait("document.getElementById('state').textContent.startsWith('going on, step ')")
            browser.wait(f"!player.root.hidden && player.data.frames > {step - 10}")
        if step == 30:
            browser.evaluate("player.moment = 7")

    with watching(path) as client:
        url = f"http://127.0.0.1:{client.port}/"
        browser.call("Page.navigate", url=url)
        browser.wait("document.title === 'waiting · bhfast: t'")
        record(path, 80, commit_seconds=0.0, after_step=look)
        browser.wait("document.getElementById('state').textContent === 'ended, step 80'")
        browser.wait("player.data.frames === 81")
        assert browser.evaluate("player.moment") == 7
        assert browser.problems == []
        assert {request.removeprefix(url).partition("?")[0] for request in browser.requests} == {"", "state", "data"}
    browser.wait("document.getElementById('state').textContent === 'bhfast watch has ended'")
    browser.close()
