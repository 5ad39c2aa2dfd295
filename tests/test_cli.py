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
from children import Program, end_as_a_program, fork, status_of
from streaming_run import record

import bhfast.__main__ as console
from bhfast import train
from bhfast.cli import lasting_streams
from bhfast.recording.recorder import Recorder
from bhfast.trace import open_trace
from bhfast.train import TrainResult
from bhfast.verify import verify

BOOK = "*** START OF THE BOOK ***\n\nSome text.\n\n*** END OF THE BOOK ***"
CONDITIONS = ("closed", "no reader", "full")


def disturb(condition: str) -> None:
    """Do to this process's streams what it would have found when it started."""
    if condition in ("closed", "all closed"):
        os.close(0), os.close(1)
        sys.stdin = sys.stdout = None
        if condition == "all closed":
            os.close(2)
            sys.stderr = None
    elif condition == "no reader":
        reader, writer = os.pipe()
        os.close(reader), os.dup2(writer, 1), os.close(writer)
    else:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def run_disturbed(condition: str, calls: dict[str, list[str]], folder: Path) -> None:
    """Run programs, one after the other, in a process that ends as one of theirs does: none fails, none says a word."""

    def work() -> None:
        sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w")
        for program, arguments in calls.items():
            os.dup2(os.open(folder / f"{program}.err", os.O_WRONLY | os.O_CREAT), 2)
            disturb(condition)
            sys.argv[1:] = [program, *arguments]
            (folder / f"{program}.status").write_text(f"{console.main()}")
        end_as_a_program()

    import bhfast.corpus, bhfast.diff, bhfast.doctor, bhfast.info, bhfast.recover, bhfast.report, bhfast.sweep  # noqa: E401, F401, I001 - before the fork
    import torch._dynamo  # noqa: F401 - which optimizers import

    assert status_of(fork(work, folder / "errors")) == 0
    assert not (folder / "errors").exists()
    for program in calls:
        assert (folder / f"{program}.status").read_text() == "0", program
        said = (folder / f"{program}.err").read_text()
        assert "Traceback" not in said, program
        assert "ignored" not in said, program


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


@pytest.mark.parametrize("condition", CONDITIONS)
def test_programs_work_whatever_becomes_of_their_streams(
    condition: str, run: TrainResult, killed: Path, text: str, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    run_disturbed(condition, programs(tmp_path, run, text), tmp_path)
    assert verify(tmp_path / "trained").replayed == 20
    assert verify(tmp_path / "t.safetensors").difference is None
    assert (tmp_path / "clean").read_text() == "Some text."


def programs(folder: Path, run: TrainResult, text: str) -> dict[str, list[str]]:
    (folder / "book").write_text(BOOK)
    return {
        "train": ["--steps", "20", "--corpus", text, "--device", "cpu", "--out", str(folder / "trained")],
        "info": [str(run.path)],
        "verify": [str(run.path)],
        "diff": [str(run.path), str(run.path)],
        "recover": [str(folder / "t.safetensors.partial")],
        "report": [str(run.path)],
        "corpus": ["gatsby", "--raw", str(folder / "book"), "--out", str(folder / "clean")],
        "doctor": [],
    }


@pytest.mark.parametrize("condition", ["all closed", pytest.param("closed", marks=pytest.mark.slow)])
def test_a_sweep_works_without_streams(condition: str, text: str, tmp_path: Path) -> None:
    arguments = ["--steps", "20", "--corpus", text, "--device", "cpu", "--out-dir", str(tmp_path / "out")]
    run_disturbed(condition, {"sweep": arguments}, tmp_path)
    assert (tmp_path / "sweep.err").read_text() == ""
    (path,) = (tmp_path / "out").glob("*.safetensors")
    assert verify(path).replayed == 20


def test_programs_work_without_a_home(run: TrainResult, killed: Path, text: str, tmp_path: Path) -> None:
    """In an interpreter that has imported nothing: matplotlib looks for its home when it is imported."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    calls = programs(tmp_path, run, text)
    calls["report"] += ["--out", str(tmp_path / "report")]
    code = """if True:
        import json, sys
        import bhfast.__main__ as console
        for program, arguments in json.load(sys.stdin).items():
            if program == "report":
                from bhfast.report import pictures

                pictures.run_pictures = lambda survey: [pictures.loss(survey)]  # drawing all of them takes seconds
            sys.argv[1:] = [program, *arguments]
            if status := console.main():
                sys.exit(f"{program}: {status}")
    """
    homes = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR")
    homeless = {name: value for name, value in os.environ.items() if name not in homes}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(calls), env=homeless, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr
    assert verify(tmp_path / "trained").replayed == 20
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"index.html", "loss.png"}


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
