"""What setup.py decides to build, and what it prints; and that the build agrees with torch."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
Distribution = pytest.importorskip("setuptools", reason="builds need setuptools").Distribution


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str]]:
    """Runs setup.py in the given environment without building; returns its exit status and output."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])

    def call(**environment: str) -> tuple[object, str]:
        for name in ("BHFAST_BUILD", "CXX", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
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


@pytest.mark.parametrize(
    ("version", "tools", "said"),
    [
        ("cuda: Optional[str] = '13.0'", ["nvcc"], "cuda (nvcc and a torch with CUDA are there)"),
        ("cuda: Optional[str] = None", ["nvcc", "nvidia-smi"], "cpu (this torch has no CUDA)"),
        (None, ["nvcc", "nvidia-smi"], "cuda (nvcc and a GPU are there)"),
        (None, ["nvcc"], "cpu (there is neither a torch with CUDA nor a GPU)"),
        ("cuda: Optional[str] = '13.0'", [], "cpu (there is no nvcc)"),
    ],
    ids=str,
)
def test_what_is_built_by_itself(version, tools, said, tmp_path: Path, plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an isolated build, where torch cannot be imported, but may be in the environment that pip builds for."""
    tools_at, packages = tmp_path / "bin", tmp_path / "packages"
    for tool in ["c++", *tools]:
        (tools_at / tool).parent.mkdir(exist_ok=True)
        (tools_at / tool).touch(mode=0o755)
    (packages / "pybind11").mkdir(parents=True)
    (packages / "pybind11/__init__.py").touch()
    (packages / "pybind11/include/pybind11").mkdir(parents=True)
    (packages / "pybind11/include/pybind11/pybind11.h").touch()
    if version:
        (packages / "torch").mkdir()
        (packages / "torch/version.py").write_text(f"__version__ = '2.13.0'\n{version}\n")
    without_torch = [folder for folder in sys.path if not Path(folder, "torch/version.py").exists()]
    monkeypatch.setattr(sys, "path", [*without_torch, str(packages)])
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(packages))
    monkeypatch.setitem(sys.modules, "pybind11", None)
    monkeypatch.delitem(sys.modules, "pybind11")
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    status, output = plan(PATH=str(tools_at), CUDA_HOME="/nowhere")
    assert status == 0
    assert f"bhfast: extension: {said}" in output


def test_without_pybind11_there_is_pure_torch(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not Path(folder, "torch/version.py").exists()])
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    status, said = plan()
    assert status == 0
    assert "bhfast: extension: none (pybind11 is missing: pip install pybind11)" in said
    status, _ = plan(BHFAST_BUILD="cpu")
    assert status == "BHFAST_BUILD=cpu: pybind11 is missing: pip install pybind11"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("agrees", [True, False])
def test_the_functions_of_torch_are_declared_as_torch_declares_them(agrees: bool, tmp_path: Path) -> None:
    """A declaration that differs in a type is an error of the compiler."""
    headers = Path(torch.__file__).parent / "include"
    if not (headers / "torch/csrc/stable/c/shim.h").exists():
        pytest.skip(f"torch {torch.__version__} has no stable ABI")
    own = (ROOT / "csrc/libtorch/abi.h").read_text()
    if not agrees:
        assert own.count("int64_t* ret_numel") == 1
        own = own.replace("int64_t* ret_numel", "int32_t* ret_numel")
    (tmp_path / "abi.h").write_text(own)
    code = tmp_path / "both.cpp"
    code.write_text(
        "#define USE_CUDA\n#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))\n"
        '#include <torch/csrc/stable/c/shim.h>\n#include "abi.h"\n'
        "static_assert(bhfast::kStableAbi == TORCH_FEATURE_VERSION);\n"
    )
    command = ["c++", "-std=c++20", "-fsyntax-only", f"-isystem{headers}", str(code)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == agrees, done.stderr
    # each function that the extension calls is one of torch's
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", own))
    known = "".join((headers / f"torch/csrc/{name}/c/shim.h").read_text() for name in ("stable", "inductor/aoti_torch"))
    assert len(declared) > 30
    assert {name for name in declared if not re.search(rf"\b{name}\(", known)} == set()


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, which builds the C++ kernels, but does not run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BHFAST_BUILD", "cpu")
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    return runpy.run_path("setup.py")


def test_every_source_is_built(setup: dict[str, Any]) -> None:
    files = {suffix: {str(x.relative_to(ROOT)) for x in ROOT.glob(f"csrc/**/*.{suffix}")} for suffix in ("cpp", "cu")}
    assert all(files.values())
    assert {*setup["SOURCES"], *setup["CUDA_ONLY"]} == files["cpp"]
    assert set(setup["CUDA_SOURCES"]) == files["cu"]


def test_what_has_changed_is_compiled_again(setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc").mkdir()
    monkeypatch.chdir(tmp_path)
    header, source = Path("csrc/a.h"), Path("csrc/a.cpp")
    header.write_text("constexpr int value = 1;\n")
    source.write_text('#include "a.h"\nint f() { return value; }\n')
    for path in (header, source):
        os.utime(path, (0, 0))
    build = setup["Build"](Distribution())
    build.build_temp, build.force = "build", False

    def compiled(*flags: str) -> bool:
        """Return whether the object is new, as it is after 1970."""
        target = build._compile(str(source), ["c++", *flags])
        is_new = target.stat().st_mtime > 10
        os.utime(target, (5, 5))
        return is_new

    assert [compiled(), compiled()] == [True, False]
    os.utime(header, (7, 7))
    assert compiled()
    os.utime(header, (0, 0))
    assert [compiled("-O1"), compiled("-O1"), compiled()] == [True, False, True]
