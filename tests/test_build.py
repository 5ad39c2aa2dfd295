"""What setup.py decides to build, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", reason="builds need setuptools")


def plan(**environment: str) -> tuple[int, str]:
    """Return the exit status and what is printed of a call that builds nothing."""
    keep = {name: value for name, value in os.environ.items() if name not in ("BHFAST_BUILD", "CXX", "CUDA_HOME")}
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, env=keep | environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_without_a_compiler_there_is_pure_torch() -> None:
    status, said = plan(CXX="no-such-compiler")
    assert status == 0
    assert "bhfast: extension: none (there is no C++ compiler no-such-compiler)" in said


def test_nothing_is_built_if_asked_for() -> None:
    status, said = plan(BHFAST_BUILD="none")
    assert status == 0
    assert "bhfast: extension: none (as asked)" in said


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
def test_what_is_asked_for_and_cannot_be_had_is_an_error(environment: dict[str, str], message: str) -> None:
    status, said = plan(**environment)
    assert status != 0
    assert message in said


def test_a_torch_too_old_for_the_cuda_kernels_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "torch/utils"
    folder.mkdir(parents=True)
    (tmp_path / "torch/__init__.py").write_text("__version__ = '2.10.3+cu126'\nclass version: cuda = '12.6'")
    (folder / "__init__.py").touch()
    (folder / "cpp_extension.py").write_text(
        "CUDA_HOME = None\nclass BuildExtension: pass\ndef include_paths(): return []\n"
        "def CppExtension(name, sources, **_):\n"
        "    from setuptools import Extension\n    return Extension(name, sources)\n"
    )
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "nvcc").chmod(0o755)
    here = {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    told = "the CUDA kernels need torch 2.11 or newer, this is 2.10.3+cu126"
    status, said = plan(**here)
    assert status == 0
    assert f"bhfast: extension: cpu ({told})" in said
    status, said = plan(**here, BHFAST_BUILD="cuda")
    assert status != 0
    assert f"BHFAST_BUILD=cuda: {told}" in said


def test_without_torch_there_is_pure_torch(tmp_path: Path) -> None:
    """As in an isolated build; an install there must not fail."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch in an isolated build')")
    status, said = plan(PYTHONPATH=str(tmp_path))
    assert status == 0
    assert "bhfast: extension: none (torch is not there to build against" in said


def test_every_source_is_built_and_every_header_is_watched() -> None:
    text = (ROOT / "setup.py").read_text()
    for path in [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.cu")]:
        assert f'"{path.relative_to(ROOT)}"' in text, path
