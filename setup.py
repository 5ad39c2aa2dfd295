"""Builds the extension ``bhfast._C``, ahead of time, against the torch of the environment at hand.

BHFAST_BUILD says what to build: ``none``; ``cpu``: the C++ kernels; ``cuda``: those and the CUDA kernels; or, by
default, ``auto``: as much of it as there are compilers for, and the package in pure torch if there are none. Flags in
CFLAGS come last, and win.

Needs ``pip install --no-build-isolation``: in an isolated build there is no torch to build against. The CUDA sources
know nothing of torch, so a torch without CUDA is enough to compile and link them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

SOURCES = [
    "csrc/module.cpp",
    "csrc/ops.cpp",
    "csrc/python_run.cpp",
    "csrc/cpu/operations.cpp",
    "csrc/cuda/resident/plan.cpp",
    "csrc/instruction_sets/amx.cpp",
    "csrc/instruction_sets/avx2.cpp",
    "csrc/instruction_sets/avx512.cpp",
    "csrc/instruction_sets/avx512bf16.cpp",
    "csrc/instruction_sets/dispatch.cpp",
    "csrc/instruction_sets/neon.cpp",
    "csrc/instruction_sets/neonbf16.cpp",
    "csrc/instruction_sets/portable.cpp",
    "csrc/native/engine.cpp",
    "csrc/native/optimizer_step.cpp",
]
CUDA_SOURCES = ["csrc/cuda/adam.cu", "csrc/cuda/norm.cu", "csrc/cuda/record.cu", "csrc/cuda/resident.cu"]
CUDA_ONLY = ["csrc/python_resident.cpp"]  # C++ that only a build for CUDA has
HEADERS = sorted(map(str, Path("csrc").rglob("*.h")))
ARCHITECTURES = ("80", "90", "100")  # the last one also as PTX, for the GPUs to come
OLDEST_FOR_CUDA = (2, 11)  # the first torch whose streams tell their CUDA handle: c10::Stream::native_handle
# The bits of the results are specified: no contraction, no reassociation, division and square root correctly rounded.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",  # Python's own flags ask for -g, which nearly doubles the time to compile
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, include_paths
except ImportError:
    torch = None


def plan() -> tuple[str, str]:
    """Return what to build, one of ``none``, ``cpu`` and ``cuda``, and why."""
    wanted = os.environ.get("BHFAST_BUILD", "auto")
    if wanted not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"BHFAST_BUILD must be auto, none, cpu or cuda, got {wanted!r}")
    missing = None
    if torch is None:
        missing = "torch is not there to build against: install it first, then pip install --no-build-isolation"
    elif shutil.which(compiler()[0]) is None:
        missing = f"there is no C++ compiler {shlex.join(compiler())}"
    elif wanted == "cuda" and nvcc() is None:
        missing = "there is no nvcc: set CUDA_HOME"
    elif wanted == "cuda" and too_old_for_cuda():
        missing = too_old_for_cuda()
    if wanted == "none":
        return wanted, "as asked"
    if missing:
        if wanted != "auto":
            sys.exit(f"BHFAST_BUILD={wanted}: {missing}")
        return "none", missing
    if wanted != "auto":
        return wanted, "as asked"
    if torch.version.cuda is None:
        return "cpu", "this torch has no CUDA"
    if nvcc() is None:
        return "cpu", "there is no nvcc: set CUDA_HOME"
    return ("cpu", too_old_for_cuda()) if too_old_for_cuda() else ("cuda", "nvcc and a CUDA torch are there")


def compiler() -> list[str]:
    """Return the command of the C++ compiler."""
    return shlex.split(os.environ.get("CXX", "c++"))


def openmp() -> list[str]:
    """Return the flags for OpenMP; none for clang, whose threads would be others than torch's."""
    version = subprocess.run([*compiler(), "--version"], check=True, capture_output=True, text=True).stdout
    return [] if "clang" in version else ["-fopenmp"]


def too_old_for_cuda() -> str | None:
    """Return why the CUDA kernels cannot be built against this torch; None if they can."""
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version >= OLDEST_FOR_CUDA:
        return None
    return f"the CUDA kernels need torch {'.'.join(map(str, OLDEST_FOR_CUDA))} or newer, this is {torch.__version__}"


def nvcc() -> str | None:
    """Return the CUDA compiler, if there is one."""
    home = CUDA_HOME or ""
    return shutil.which(os.path.join(home, "bin", "nvcc")) or shutil.which("nvcc")


def cuda_toolkit() -> Path:
    """Return nvcc's own idea of where its toolkit is; the nvcc on the PATH may be a wrapper."""
    said = subprocess.run(
        [nvcc(), "--dryrun", "-c", CUDA_SOURCES[0]], check=True, capture_output=True, text=True
    ).stderr
    return Path(re.search(r"TOP=(\S+)", said)[1])


def compile_cuda(folder: str) -> tuple[list[str], str]:
    """Compile the CUDA sources; return the objects, and the architectures in them."""
    os.makedirs(folder, exist_ok=True)
    known = subprocess.run([nvcc(), "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    there = [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in there]
    codes.append(f"-gencode=arch=compute_{there[-1]},code=compute_{there[-1]}")
    jobs = []
    for source in CUDA_SOURCES:
        target = os.path.join(folder, Path(source).stem + ".cu.o")
        command = [nvcc(), "-c", source, "-o", target, *NVCC_FLAGS, *codes, "-Xcompiler=-fPIC,-Wall,-Wextra"]
        print(*command)
        jobs.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for _, job in jobs:
        sys.stderr.write(job.communicate()[1])  # that of one source after another: the lines belong together
    failed = [target for target, job in jobs if job.returncode != 0]
    if failed:
        raise RuntimeError(f"nvcc failed for {', '.join(failed)}")
    return [target for target, _ in jobs], " ".join(f"sm_{arch}" for arch in there)


def options() -> dict[str, object]:
    """Return what ``setup`` needs to build the extension; nothing if there is none to build."""
    what, why = plan()
    print(f"bhfast: extension: {what} ({why})", file=sys.stderr)
    if what == "none":
        return {}
    extension = CppExtension(
        "bhfast._C",
        SOURCES + CUDA_ONLY * (what == "cuda"),
        depends=[*HEADERS, *CUDA_SOURCES, *CUDA_ONLY],
        extra_compile_args=[
            *CXX_FLAGS,
            *openmp(),
            *(f"-isystem{path}" for path in include_paths()),
            *shlex.split(os.environ.get("CFLAGS", "")),
        ],
        extra_link_args=openmp(),
    )

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                if what == "cuda":
                    objects, architectures = compile_cuda(self.build_temp)
                    toolkit = cuda_toolkit()
                    extension.extra_objects = objects
                    extension.include_dirs.append(str(toolkit / "include"))
                    extension.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib")]
                    extension.libraries += ["cudart_static", "rt", "dl", "pthread"]
                    extension.extra_compile_args.append(f'-DBHFAST_CUDA="{architectures}"')
                super().build_extensions()
            except Exception as error:
                if "BHFAST_BUILD" in os.environ:
                    raise
                print(f"bhfast: the extension could not be built, pure torch it is: {error}", file=sys.stderr)
                self.extensions = []

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**options())
