"""One system call after another fails, in runs and recoveries: status and message agree with what is on the disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def injector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the injector of faults needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("injector") / "injector.so"
    source = HERE / "fault_injector.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("most", [2, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_no_fault_breaks_a_rule(most: int | None, injector: Path, tmp_path: Path) -> None:
    command = [sys.executable, HERE / "faults.py", injector, tmp_path / "runs"]
    command += [] if most is None else ["--most", str(most)]
    done = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(injector)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert min(found["tried"].values()) >= (most or 4)
    assert found["broken"] == []
