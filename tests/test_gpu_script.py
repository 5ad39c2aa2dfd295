"""benchmarks/gpu.sh, with a stand-in for Python and the sanitizer; and, on the CPU, the benchmark it runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = [
    "build", "doctor", "kernels", "train-graph", "verify-graph", "train-resident", "verify-resident", "engines",
    "resident-8", "resident-4", "resident-2", "resident-1", "resident-16", "sweep-resident", "verify-sweep", "adam",
    "memcheck-graph", "racecheck-graph", "memcheck-resident", "racecheck-resident", "tests",
]  # fmt: skip
# In what each section runs, the part that tells it from the others. In order: a sanitizer's command trains too.
STAND_IN = """#!/bin/sh
case "$*" in
*setup.py*) section=build ;;
*bhfast.doctor*) section=doctor ;;
*"tests -k cuda"*) section=kernels ;;
*memcheck*engine\\ resident*) section=memcheck-resident ;;
*memcheck*) section=memcheck-graph ;;
*racecheck*engine\\ resident*) section=racecheck-resident ;;
*racecheck*) section=racecheck-graph ;;
*bhfast.train*engine\\ resident*) section=train-resident ;;
*bhfast.train*) section=train-graph ;;
*bhfast.verify*/sweep/*) section=verify-sweep ;;
*bhfast.verify*/resident.safetensors) section=verify-resident ;;
*bhfast.verify*) section=verify-graph ;;
*bhfast.sweep*) section=sweep-resident ;;
*test_bench_gpu.py*resident-*\\]*) section=${*#*-k }; section=${section%%]*} ;;
*test_bench_gpu.py*) section=engines ;;
*test_bench_adam.py*) section=adam ;;
*" tests") section=tests ;;
esac
echo "this is $section, with $PYTHONPATH"
case "$*" in
*--benchmark-json*) for json; do :; done; echo '{"benchmarks": []}' >"$json" ;;
esac
case " $FAIL " in *" $section "*) exit 3 ;; esac
case " $LEAVE " in *" $section "*) sleep 300 & echo $! >>"$PIDS" ;; esac
case " $HANG " in
*" $section "*)
  trap '' INT TERM
  echo $$ >>"$PIDS"
  sleep 300 & echo $! >>"$PIDS"
  while :; do sleep 300; done ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="gpu.sh needs timeout, of GNU coreutils")


@pytest.fixture
def script(tmp_path: Path):
    """Return what starts gpu.sh; PIDS gets the processes that hang or are left."""
    for name in ("python", "compute-sanitizer"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def start(**environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path / "out"],
            env={
                **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "PYTHON": str(tmp_path / "bin" / "python"),
                "PIDS": str(tmp_path / "pids"),
                **{"FAIL": "", "HANG": "", "LEAVE": "", "GRACE": "1", **environment},
            },
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def verdicts(summary: str) -> dict[str, str]:
    """Return what became of each section, in order."""
    lines = [line.removeprefix("== ") for line in summary.splitlines() if line.startswith("== ")]
    return {name: rest.rsplit(",", 1)[0] for name, rest in (line.split(": ", 1) for line in lines)}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_none_runs(pids: Path, count: int) -> None:
    numbers = [int(line) for line in pids.read_text().split()]
    assert len(numbers) == count
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in numbers):
        assert time.monotonic() < deadline, f"of {numbers} some are running"
        time.sleep(0.05)


def test_all_sections_pass(script, tmp_path: Path) -> None:
    run = script()
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    assert verdicts(printed) == dict.fromkeys(SECTIONS, "passed")
    assert printed.splitlines()[-1] == "failed: none"
    out = tmp_path / "out"
    assert (out / "gpu-summary.txt").read_text() == printed
    assert {path.name for path in out.iterdir()} == {
        "gpu-summary.txt",
        "gpu.log",
        "gpu-engines.json",
        "gpu-adam.json",
        *(f"gpu-resident-{blocks}.json" for blocks in (1, 2, 4, 8, 16)),
    }
    log = (out / "gpu.log").read_text()
    assert log.count(f"with {ROOT}\n") == len(SECTIONS)  # programs that tests start find the package
    limits = dict(re.findall(r"^== (\S+), up to (\d+) s: ", log, re.MULTILINE))
    assert sum(int(limits[name]) for name in SECTIONS[: SECTIONS.index("memcheck-graph")]) <= 570


def test_what_fails_hangs_or_leaves_something_stops_nothing_else(script, tmp_path: Path) -> None:
    run = script(FAIL="build memcheck-graph", HANG="train-graph resident-2", LEAVE="doctor adam", SECTION_LIMIT="2")
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == 1
    assert verdicts(printed) == {
        **dict.fromkeys(SECTIONS, "passed"),
        "build": "failed, status 3",
        "train-graph": "out of time",
        "resident-2": "out of time",
        "memcheck-graph": "failed, status 3",
    }
    assert printed.splitlines()[-1] == "failed: build train-graph resident-2 memcheck-graph"
    out = tmp_path / "out"
    assert (out / "gpu-summary.txt").read_text() == printed
    for name in ("gpu-engines.json", "gpu-resident-1.json", "gpu-adam.json"):
        assert json.loads((out / name).read_text()) == {"benchmarks": []}
    assert_none_runs(tmp_path / "pids", 6)


def test_it_ends_in_time(script, tmp_path: Path) -> None:
    begun = time.monotonic()
    run = script(HANG="doctor", LIMIT="2")
    printed, _ = run.communicate(timeout=60)
    assert time.monotonic() - begun < 2 + 5  # limit, and some for a busy machine
    assert run.returncode == 1
    assert verdicts(printed) == {"build": "passed", "doctor": "out of time"} | dict.fromkeys(
        SECTIONS[2:], "no time left"
    )
    assert printed.splitlines()[-1] == "failed: " + " ".join(SECTIONS[1:])
    assert_none_runs(tmp_path / "pids", 2)


def test_nothing_outlives_it(script, tmp_path: Path) -> None:
    run = script(HANG="build")
    pids = tmp_path / "pids"
    while not (pids.exists() and pids.read_text().count("\n") == 2):
        assert run.poll() is None
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 143
    assert_none_runs(pids, 2)


@pytest.mark.usefixtures("extension")
def test_figures_survive_a_contestant_that_fails(tmp_path: Path) -> None:
    """Here it is the graph engine, for want of a GPU."""
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_bench_gpu.py", "-k", "not trainer"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, *command, "--tryout", "--benchmark-json", tmp_path / "figures.json"],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},  # quick on a busy machine too
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "a CUDA graph needs a CUDA device, not cpu" in run.stdout
    figures = {
        entry["param"]: entry["extra_info"]
        for entry in json.loads((tmp_path / "figures.json").read_text())["benchmarks"]
    }
    assert set(figures) == {"torch", "native"}
    for info in figures.values():
        for mode in ("recording", "not recording"):
            assert info["steps_per_second"][mode][0] > 0
            assert 0 < info[mode]["p50_us"] <= info[mode]["p99_us"]
        assert info["recording"]["bytes_per_second_to_host"] > 0
        assert info["not recording"]["bytes_per_second_to_host"] == 0
