"""Compiles the CUDA kernels for a CPU, with the emulation of CUDA in this folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shlex
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = [
    "-std=c++20",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",  # as pybind11 is
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]

PREAMBLE = "#define __CUDACC__ 1\n#define __CUDA_ARCH__ 900\n#include <cuda_runtime.h>\n"  # as nvcc does

LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<([^;]*?)>>>\(([^;]*?)\);")
DYNAMIC = re.compile(r"extern __shared__ ([^;]+?) (\w+)\[\];")
SHARED = re.compile(r"__shared__ ([^;=]+?) (\w+)((?:\[[^\]]+\])*);")


def translate(path: Path) -> str:
    """Return a CUDA source as C++: launches become calls, and shared variables become allocations of the block."""
    text = path.read_text()
    launches = text.count("<<<")
    text, found = LAUNCH.subn(r"cuda_on_cpu::launch(\2, [&] { \1(\3); });", text)
    assert found == launches, f"{path}: cannot translate a launch"
    text = DYNAMIC.sub(r"\1* const \2 = static_cast<\1*>(cuda_on_cpu::dynamic_shared());", text)
    names = [match[2] for match in SHARED.finditer(text)]
    text = SHARED.sub(
        lambda match: f"auto& {match[2]} = cuda_on_cpu::shared<{match[1]}{match[3]}>({names.index(match[2])});", text
    )
    assert "__shared__" not in text, f"{path}: cannot translate a shared variable"
    assert len(set(names)) == len(names), f"{path}: two shared variables with the same name"
    return f'{PREAMBLE}#line 1 "{path.name}"\n{text}'


def library() -> Path:
    """Build csrc/ops.cpp with the CUDA kernels, as ``torch.ops.bhfast_cuda_on_cpu.*`` and as the module ``kernels``.

    CXXFLAGS adds compiler flags, such as sanitizers that this process has already loaded.
    """
    import torch

    folder = Path(torch.__file__).parent
    system = [folder / "include", sysconfig.get_paths()["include"]]  # the first for pybind11
    flags = [*shlex.split(os.environ.get("CXXFLAGS", "")), *(f"-isystem{path}" for path in system)]
    libraries = ["-shared", f"-L{folder / 'lib'}", "-ltorch_cpu"]
    names = ("ops", "python_run", "python_resident", "cuda/resident/plan")
    own = [*(ROOT / f"csrc/{name}.cpp" for name in names), HERE / "module.cpp", HERE / "machine.cpp"]
    return _build("kernels.so", own, ROOT / "csrc", ["-O1", *flags], libraries)


def probes(csrc: Path = ROOT / "csrc") -> Path:
    """Build probes.cpp with the kernels in ``csrc``, under sanitizers."""
    plan = ROOT / "csrc/cuda/resident/plan.cpp"
    own = [HERE / "probes.cpp", HERE / "instructions.cu", HERE / "machine.cpp", plan]
    return _build("probes", own, csrc, ["-O0", *SANITIZERS])


def _build(name: str, own: list[Path], csrc: Path, flags: list[str], libraries: Sequence[str] = ()) -> Path:
    """Build the kernels in ``csrc`` and the project's ``own`` sources, or return an earlier build of the same.

    Each object is cached by itself; the project's own do not depend on the ``csrc`` of a copy.
    """
    flags = [*FLAGS, *flags, "-DBHFAST_CUDA_ON_CPU", '-DBHFAST_CUDA="cpu"']
    sources = {**dict.fromkeys(own, ROOT / "csrc"), **dict.fromkeys(sorted(csrc.glob("cuda/*.cu")), csrc)}
    folder = ROOT / "build/cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects, jobs = [], []
        for source, includes in sources.items():
            text = translate(source) if source.suffix == ".cu" else source.read_text()
            headers = [path.read_text() for root in (includes, HERE) for path in sorted(root.rglob("*.h"))]
            target = folder / f"{source.stem}-{_digest(text, str(flags), *headers)}"
            objects.append(target.with_suffix(".o"))
            if not objects[-1].exists():
                code, new = target.with_suffix(".cpp"), target.with_suffix(".new")
                code.write_text(text if source.suffix == ".cu" else f'#include "{source}"\n')
                folders = [f"-I{path}" for path in (HERE / "include", HERE, includes, includes / "cuda")]
                command = [*_compiler(), *flags, *folders, "-c", code, "-o", new]
                jobs.append((objects[-1], subprocess.Popen(command)))
        for target, job in jobs:
            assert job.wait() == 0, f"{target} could not be compiled"
            target.with_suffix(".new").rename(target)
        result = folder / f"{_digest(*map(str, objects), *libraries)}-{name}"
        if not result.exists():
            subprocess.run([*_compiler(), *flags, *objects, *libraries, "-o", result], check=True)
    return result


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
