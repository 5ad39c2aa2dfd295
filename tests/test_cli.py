"""What programs do when their standard streams are closed, full or without a reader: their work, and no traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from children import Program, fork, status_of
from streaming_run import record

from bhfast import train
from bhfast.cli import lasting_streams
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.train import TrainResult
from bhfast.verify import verify

BOOK = "*** START OF THE BOOK ***\n\nSome text.\n\n*** END OF THE BOOK ***"
CONDITIONS = ("closed", "no reader", "full", "no home")
SWEPT = ("closed", "all closed")
# Forks a child for each program under each condition: importing torch takes seconds, and so does torch._dynamo, which
# its optimizers import. Each child ends as a program of its own does: by sys.exit, with all that Python does at its
# end, except that it does not search the imported modules for garbage.
DRIVER = """if True:
    import gc, json, os, sys
    import torch._dynamo, bhfast.__main__ as console
    import bhfast.train, bhfast.verify, bhfast.recover, bhfast.report, bhfast.corpus, bhfast.doctor, bhfast.sweep
    import bhfast.diff
    gc.freeze()

    def disturb(condition):
        if condition in ("closed", "all closed"):  # as Python finds it when it starts
            os.close(0), os.close(1)
            sys.stdin = sys.stdout = None
            if condition == "all closed":
                os.close(2)
                sys.stderr = None
        elif condition == "no reader":
            reader, writer = os.pipe()
            os.close(reader), os.dup2(writer, 1), os.close(writer)
        elif condition == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        elif condition == "no home":
            for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
                os.environ.pop(name, None)

    for program, condition, errors, arguments in json.load(open(sys.argv[1])):
        if child := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(program, condition, status, file=sys.stderr, flush=True)
            continue
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        disturb(condition)
        if "--out" in arguments and program == "report":
            from bhfast.report import pictures  # imports matplotlib, which looks for its home

            pictures.run_pictures = lambda survey: [pictures.loss(survey)]  # drawing all of them takes seconds
        sys.argv[1:] = [program, *arguments]
        sys.exit(console.main())
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed."""
    folder = tmp_path_factory.mktemp("killed")

    def die(step: int, recorder: Recorder) -> None:
        if step == 25:
            assert recorder.stats().committed > 0
            os._exit(9)

    def work() -> None:
        record(folder / "t.safetensors", 30, announced=30, buffer_bytes=1 << 16, after_step=die)

    assert status_of(fork(work)) == 9
    return folder


def test_programs_work_whatever_becomes_of_their_streams(
    run: TrainResult, killed: Path, text: str, tmp_path: Path
) -> None:
    (tmp_path / "book").write_text(BOOK)
    calls = []
    for condition in CONDITIONS:
        here = tmp_path / condition
        shutil.copytree(killed, here)
        programs = {
            "train": ["--steps", "20", "--corpus", text, "--device", "cpu", "--out", str(here / "trained")],
            "verify": [str(run.path)],
            "diff": [str(run.path), str(run.path)],
            "recover": [str(here / "t.safetensors.partial")],
            "report": [str(run.path), *(["--out", str(here / "report")] if condition == "no home" else [])],
            "corpus": ["gatsby", "--raw", str(tmp_path / "book"), "--out", str(here / "clean")],
            "doctor": [],
        }
        calls += [(name, condition, str(here / f"{name}.err"), arguments) for name, arguments in programs.items()]
    for condition in SWEPT:
        (here := tmp_path / f"sweep {condition}").mkdir()
        arguments = ["--steps", "20", "--corpus", text, "--device", "cpu", "--out-dir", str(here / "out")]
        calls.append(("sweep", condition, str(here / "err"), arguments))
    (tmp_path / "calls").write_text(json.dumps(calls))
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "calls")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.splitlines() == [f"{program} {condition} 0" for program, condition, *_ in calls]
    for program, condition, errors, _ in calls:
        said = Path(errors).read_text()
        assert "Traceback" not in said, (program, condition)
        assert "ignored" not in said, (program, condition)
        assert program != "sweep" or said == ""
    for condition in CONDITIONS:
        assert verify(tmp_path / condition / "trained").replayed == 20
        assert verify(tmp_path / condition / "t.safetensors").difference is None
        assert (tmp_path / condition / "clean").read_text() == "Some text."
    for condition in SWEPT:
        (path,) = (tmp_path / f"sweep {condition}" / "out").glob("*.safetensors")
        assert verify(path).replayed == 20
    drawn = tmp_path / "no home" / "report"
    assert {path.name for path in drawn.iterdir()} == {"index.html", "loss.png"}


def test_errors_without_streams(tmp_path: Path) -> None:
    """The error goes nowhere; the exit status tells."""
    command = f"{sys.executable} -m bhfast.verify {tmp_path / 'gone'} 0<&- 1>&- 2>&-"
    assert subprocess.run(command, shell=True).returncode == 2


def test_closed_streams_become_the_null_device(tmp_path: Path) -> None:
    """So that no file is opened under the number of one, and printed into."""

    def work() -> None:
        for fd in range(3):
            os.close(fd)
        sys.stdin = sys.stdout = sys.stderr = None
        with lasting_streams():
            fd = os.open(tmp_path / "trace", os.O_RDWR | os.O_CREAT)
            print("to stdout", flush=True)
            print("to stderr", file=sys.stderr, flush=True)
            os.write(1, b"from C")
            assert sys.stdin.read() == ""
            assert fd > 2
        assert sys.stdout is None

    assert status_of(fork(work, tmp_path / "errors")) == 0
    assert (tmp_path / "trace").read_bytes() == b""


def test_streams_are_what_they_were_after_the_block(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    with lasting_streams():
        print("out")
        print("err", file=sys.stderr)
        assert sys.stdout.isatty() is False
    assert (sys.stdin, sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("out\n", "err\n")


def test_a_stream_that_works_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    with pytest.raises(ZeroDivisionError), lasting_streams():
        print("before")
        raise ZeroDivisionError
    assert text.getvalue() == "before\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_ends_a_run_with_its_trace(number: int, text: str, tmp_path: Path) -> None:
    """As its stdout breaks, too."""
    path = tmp_path / "t"
    arguments = ["--steps", "20000", "--corpus", text, "--device", "cpu", "--out", str(path), "--storage", "stream"]
    process = Program(lambda: train.main(arguments))
    for line in process.stdout:
        if line.startswith("storage"):
            break
    process.stdout.close()
    process.send_signal(number)
    said = process.stderr.read()
    process.wait()
    assert "Traceback" not in said
    assert process.returncode == 128 + number, said
    assert len(open_trace(path).steps) >= 1
    assert verify(path).difference is None
