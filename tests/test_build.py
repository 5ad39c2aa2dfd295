"""What setup.py decides to build, and what it prints."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", reason="builds need setuptools")


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    """Runs setup.py in the given environment without building; returns its exit status and output."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])

    def call(**environment: str) -> tuple[object, str]:
        for name in ("BHFAST_BUILD", "CXX", "CUDA_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            cpp_extension, "CUDA_HOME", environment.get("CUDA_HOME")
        )  # torch looked for it when imported
        status: object = 0
        try:
            runpy.run_path("setup.py", run_name="__main__")
        except SystemExit as leaving:
            status = leaving.code
        return status, "".join(capfd.readouterr())

    return call


def test_without_a_compiler_there_is_pure_torch(plan) -> None:
    status, said = plan(CXX="no-such-compiler")
    assert status == 0
    assert "bhfast: extension: none (there is no C++ compiler no-such-compiler)" in said


def test_nothing_is_built_if_asked_for(plan) -> None:
    status, said = plan(BHFAST_BUILD="none")
    assert status == 0
    assert "bhfast: extension: none (as asked)" in said


def test_an_error_is_one_line_and_a_status() -> None:
    environment = {**os.environ, "BHFAST_BUILD": "rocm"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "BHFAST_BUILD must be auto, none, cpu or cuda, got 'rocm'"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BHFAST_BUILD": "cpu", "CXX": "no-such-compiler"}, "BHFAST_BUILD=cpu: there is no C++ compiler no-such"),
        (
            {"BHFAST_BUILD": "cuda", "CXX": sys.executable, "PATH": "/nowhere", "CUDA_HOME": "/nowhere"},
            "BHFAST_BUILD=cuda: there is no nvcc",
        ),
        ({"BHFAST_BUILD": "rocm"}, "BHFAST_BUILD must be auto, none, cpu or cuda, got 'rocm'"),
    ],
    ids=str,
)
def test_what_is_asked_for_and_cannot_be_had_is_an_error(environment: dict[str, str], message: str, plan) -> None:
    status, _ = plan(**environment)
    assert message in str(status)


def test_a_torch_too_old_for_the_cuda_kernels_is_named(tmp_path: Path, plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.3+cu126")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    (tmp_path / "nvcc").touch(mode=0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    told = "the CUDA kernels need torch 2.11 or newer, this is 2.10.3+cu126"
    status, said = plan(PATH=path)
    assert status == 0
    assert f"bhfast: extension: cpu ({told})" in said
    status, _ = plan(PATH=path, BHFAST_BUILD="cuda")
    assert status == f"BHFAST_BUILD=cuda: {told}"


def test_without_torch_there_is_pure_torch(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an isolated build, where an install must not fail."""
    monkeypatch.setitem(sys.modules, "torch", None)
    status, said = plan()
    assert status == 0
    assert "bhfast: extension: none (torch is not there to build against" in said


@pytest.mark.parametrize(("version", "flags"), [("g++ (GCC) 12.2.0", ["-fopenmp"]), ("Apple clang version 16", [])])
def test_clang_builds_without_openmp(version, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(f"#!/bin/sh\necho '{version}'\n")
    compiler.chmod(0o755)
    extension = told_to_setup(monkeypatch, CXX=f"{compiler} -march=native")["ext_modules"][0]
    assert extension.extra_link_args == flags
    assert [x for x in extension.extra_compile_args if x == "-fopenmp"] == flags


def told_to_setup(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any]:
    """Run setup.py for a build for the CPU; return what it hands to setuptools."""
    monkeypatch.chdir(ROOT)
    for name, value in {"BHFAST_BUILD": "cpu", **environment}.items():
        monkeypatch.setenv(name, value)
    told: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", told.update)
    return {**runpy.run_path("setup.py"), **told}


def test_every_source_is_built_and_every_header_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change to any file in csrc/ rebuilds the extension."""
    setup = told_to_setup(monkeypatch)
    (extension,) = setup["ext_modules"]
    files = {
        suffix: {str(x.relative_to(ROOT)) for x in ROOT.glob(f"csrc/**/*.{suffix}")} for suffix in ("cpp", "cu", "h")
    }
    assert all(files.values())
    assert {*extension.sources, *setup["CUDA_ONLY"]} == files["cpp"]
    assert set(setup["CUDA_SOURCES"]) == files["cu"]
    assert set(extension.depends) >= files["cu"] | files["h"]
