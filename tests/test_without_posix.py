"""Where POSIX is missing, as on Windows, the package can be imported and traces read; writing says what it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import without_posix_run
from keyframe_runs import Run
from traces import checksums

from bhfast.trace.journal import journal_path


def test_reads_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    full, compact = Run().record(tmp_path / "full"), Run().record(tmp_path / "compact", keyframes=8)
    partial, new = tmp_path / "run.partial", tmp_path / "new"
    for path in (partial, journal_path(partial)):
        path.write_bytes(b"\n")
    command = [sys.executable, without_posix_run.__file__, full, compact, partial, new]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first, *verified = done.stdout.splitlines()
    *found, errors, memory = json.loads(first)
    assert found == [checksums(full), checksums(compact)]
    assert verified
    assert memory > 1 << 20
    assert errors[0] == f"cannot read {partial} while it is written: win32 cannot; wait for its run to end"
    needs = "this needs the file locks of POSIX, which win32 does not have; read traces here, and record them on Linux"
    assert [error.startswith("cannot write ") and needs in error for error in errors[1:]] == [True] * 3
    assert not list(tmp_path.glob("new*.*"))
