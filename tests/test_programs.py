"""The package as a whole: imports, the console script, doctor, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bhfast
from bhfast import __main__ as console
from bhfast import doctor

PACKAGE = Path(bhfast.__file__).parent
MAY_IMPORT = {
    "__init__": {
        "config",
        "errors",
        "optim",
        "recording",
        "trace",
        "train",
        "version",
    },
    "__main__": set(),
    "config": {"engines", "errors", "model", "ops", "storage"},
    "corpus": {"errors"},
    "doctor": {
        "engines",
        "machine",
        "ops",
        "optim",
        "trace",
        "version",
    },
    "engines/__init__": set(),
    "engines/choose": {"engines", "errors", "model", "ops"},
    "engines/graph": {"engines"},
    "engines/job": {"errors", "model", "optim", "recording"},
    "engines/native": {"engines", "ops"},
    "engines/torch": {"engines", "model"},
    "errors": set(),
    "experiment": {
        "config",
        "corpus",
        "engines",
        "errors",
        "machine",
        "ops",
        "trace",
    },
    "hf": {"recording"},
    "lattice/__init__": {"lattice"},
    "lattice/cells": set(),
    "lattice/crowds": {"lattice"},
    "lattice/motion": {"lattice"},
    "machine": {"errors"},
    "model": {"errors"},
    "ops/__init__": {"ops"},
    "ops/arithmetic": set(),
    "ops/checks": {"ops"},
    "ops/extension": set(),
    "ops/kernels": {"ops"},
    "optim": {"errors", "ops"},
    "progress": {"engines"},
    "recording/__init__": set(),
    "recording/clipping": set(),
    "recording/fields": {"ops", "recording"},
    "recording/optimizer_description": {"ops"},
    "recording/protocols": {"storage"},
    "recording/recorder": {
        "errors",
        "ops",
        "recording",
        "signals",
        "storage",
        "trace",
        "transfer",
    },
    "recording/selection": {"errors"},
    "recording/shards": {"errors", "recording", "trace"},
    "recover": {"errors", "storage"},
    "report/__init__": {"report"},
    "report/__main__": {"report"},
    "report/page": {"errors", "report", "version"},
    "report/pictures": {"errors", "report"},
    "report/program": {"errors", "report", "summary", "trace"},
    "report/survey": {"lattice", "summary", "trace"},
    "report/sweep": {"errors", "report", "sweep", "trace"},
    "signals": set(),
    "storage/__init__": set(),
    "storage/base": {"transfer"},
    "storage/choose": {"errors", "machine", "storage", "trace"},
    "storage/claim": {"errors", "storage", "trace"},
    "storage/files": set(),
    "storage/finish": {"errors", "storage", "trace"},
    "storage/journal": {"errors", "storage", "trace"},
    "storage/memory": {"errors", "storage", "trace", "transfer"},
    "storage/stream": {"errors", "storage", "trace", "transfer"},
    "summary": {"errors", "trace"},
    "sweep/__init__": {"sweep"},
    "sweep/__main__": {"sweep"},
    "sweep/format": set(),
    "sweep/grid": {"config", "errors"},
    "sweep/pool": {"errors", "machine", "signals", "storage", "sweep"},
    "sweep/program": {"config", "errors", "progress", "sweep"},
    "sweep/results": {"errors", "storage", "sweep"},
    "sweep/worker": {"config", "errors", "experiment", "trace", "train"},
    "trace/__init__": {"trace"},
    "trace/checksums": {"trace"},
    "trace/format": {"errors"},
    "trace/reader": {"errors", "trace"},
    "trace/sharded": {"errors", "trace"},
    "train": {
        "config",
        "corpus",
        "engines",
        "errors",
        "experiment",
        "machine",
        "model",
        "ops",
        "optim",
        "progress",
        "recording",
        "signals",
        "summary",
        "trace",
        "version",
    },
    "transfer/__init__": set(),
    "transfer/host_memory": set(),
    "transfer/lanes": {"transfer"},
    "transfer/ring": {"transfer"},
    "verify": {"errors", "ops", "trace"},
    "version": set(),
}


def test_rooms_import_only_what_they_may() -> None:
    files = {str(p.relative_to(PACKAGE).with_suffix("")): p for p in PACKAGE.rglob("*.py")}
    assert files.keys() == MAY_IMPORT.keys()
    for room, path in files.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bhfast"):
                parts = node.module.split(".")
                imported |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        assert imported <= MAY_IMPORT[room], room


def test_import_is_light_and_silent() -> None:
    code = "import sys, bhfast; print('torch' in sys.modules); bhfast.FusedAdam; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"]
    assert run.stderr == ""


def test_every_public_name_is_there() -> None:
    for name in bhfast.__all__:
        assert getattr(bhfast, name)
    with pytest.raises(AttributeError, match="module 'bhfast' has no attribute 'nothing'"):
        _ = bhfast.nothing


@pytest.mark.parametrize("program", console.PROGRAMS)
def test_every_program_has_help(program: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bhfast", program, "--help"])
    with pytest.raises(SystemExit) as exit_:
        console.main()
    assert exit_.value.code == 0
    assert f"usage: bhfast {program}" in capsys.readouterr().out


def test_console_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (([], 0), (["--help"], 0), (["--version"], 0), (["fly"], 2)):
        monkeypatch.setattr(sys, "argv", ["bhfast", *arguments])
        assert console.main() == code
    printed = capsys.readouterr()
    assert bhfast.__version__ in printed.out
    assert "there is no program 'fly'; there are\n  train" in printed.err


def test_programs_run_as_modules() -> None:
    """As ``python -W error -m`` does, but in forks of one process, which has imported torch."""
    code = """if True:
        import os, runpy, sys
        import torch, children
        for program in sys.argv[1:]:
            def run():
                sys.argv[1:] = ["--help"]
                runpy.run_module(f"bhfast.{program}", run_name="__main__", alter_sys=True)
            print(program, children.status_of(children.fork(run)), file=sys.stderr)
    """
    command = [sys.executable, "-W", "error", "-c", code, *console.PROGRAMS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stderr.splitlines() == [f"{program} 0" for program in console.PROGRAMS]


def test_doctor_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for name in ("bhfast", "torch", "device", "engine", "operations", "self-test"):
        assert f"\n{name}" in f"\n{printed}"
    assert "bit for bit" in printed


def test_doctor_fails_if_the_self_test_does(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from bhfast.ops import arithmetic

    real = arithmetic.adam_coefficients
    monkeypatch.setattr(arithmetic, "adam_coefficients", lambda steps, *a, **k: real([s + 1 for s in steps], *a, **k))
    assert doctor.main([]) == 1
    assert "values at step 1" in capsys.readouterr().out
