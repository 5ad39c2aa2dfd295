"""Builds the extension ``bhfast._C``. It uses torch's stable C ABI: the build needs no torch, and one build serves all.

BHFAST_BUILD says what to build: ``none``; ``cpu``: the C++ kernels; ``cuda``: those and the CUDA kernels; or, by
default, ``auto``: as much of it as there are compilers and a use for, and the package in pure torch if there are none.
Flags in CFLAGS and LDFLAGS come last, and win.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_ONLY = ["csrc/python_resident.cpp"]  # C++ that only a build for CUDA has
SOURCES = sorted({str(path) for path in Path("csrc").rglob("*.cpp")} - {*CUDA_ONLY})
CUDA_SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cu"))
ARCHITECTURES = ("80", "90", "100")  # the last one also as PTX, for the GPUs to come
# The bits of the results are specified: no contraction, no reassociation, division and square root correctly rounded.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]


# ---------------------------------------------------------------------------------------------------------------------
# What to build


def plan() -> tuple[str, str]:
    """Return what to build, one of ``none``, ``cpu`` and ``cuda``, and why."""
    wanted = os.environ.get("BHFAST_BUILD", "auto")
    if wanted not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"BHFAST_BUILD must be auto, none, cpu or cuda, got {wanted!r}")
    if wanted == "none":
        return wanted, "as asked"
    missing = None
    if shutil.which(compiler()[0]) is None:
        missing = f"there is no C++ compiler {compiler()[0]}"
    elif pybind11_headers() is None:
        missing = "pybind11 is missing: pip install pybind11"
    elif wanted == "cuda" and nvcc() is None:
        missing = "there is no nvcc: set CUDA_HOME"
    if missing:
        if wanted != "auto":
            sys.exit(f"BHFAST_BUILD={wanted}: {missing}")
        return "none", missing
    if wanted != "auto":
        return wanted, "as asked"
    if nvcc() is None:
        return "cpu", "there is no nvcc"
    return use_of_cuda()


def use_of_cuda() -> tuple[str, str]:
    """Return ``cpu`` or ``cuda``, and why: whether a torch with CUDA is here, or else a GPU."""
    for folder in site_packages():
        about = folder / "torch/version.py"
        if about.exists():
            if re.search(r"^cuda\b.*= '", about.read_text(), re.MULTILINE):
                return "cuda", "nvcc and a torch with CUDA are there"
            return "cpu", "this torch has no CUDA"
    if shutil.which("nvidia-smi"):
        return "cuda", "nvcc and a GPU are there"
    return "cpu", "there is neither a torch with CUDA nor a GPU"


def site_packages() -> list[Path]:
    """Return where packages are: those of the build, and those of the environment that pip builds for."""
    return [Path(folder) for folder in dict.fromkeys([*sys.path, sysconfig.get_path("platlib")]) if folder]


def pybind11_headers() -> Path | None:
    """Return the folder of pybind11's headers: its own, or the copy that torch brings."""
    package = importlib.util.find_spec("pybind11")
    own = [Path(package.origin).parent / "include"] if package and package.origin else []
    there = [*own, *(folder / "torch/include" for folder in site_packages())]
    return next((folder for folder in there if (folder / "pybind11/pybind11.h").exists()), None)


def compiler() -> list[str]:
    """Return the command of the C++ compiler."""
    return shlex.split(os.environ.get("CXX", "c++"))


def nvcc() -> str | None:
    """Return the CUDA compiler, if there is one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(os.path.join(home, "bin", "nvcc")) or shutil.which("nvcc")
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_toolkit() -> Path:
    """Return nvcc's own idea of where its toolkit is; the nvcc on the PATH may be a wrapper."""
    said = subprocess.run(
        [nvcc(), "--dryrun", "-c", CUDA_SOURCES[0]], check=True, capture_output=True, text=True
    ).stderr
    return Path(re.search(r"TOP=(\S+)", said)[1])


# ---------------------------------------------------------------------------------------------------------------------
# Building it


class Build(build_ext):
    """Compiles sources side by side, those that have changed, and links them."""

    def build_extensions(self) -> None:
        """Build the extension; under ``auto``, leave it out if that fails."""
        (extension,) = self.extensions
        try:
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            self._prepare(extension)
            super().build_extensions()
        except Exception as error:
            if os.environ.get("BHFAST_BUILD", "auto") != "auto":
                raise
            print(f"bhfast: the extension could not be built, pure torch it is: {error}", file=sys.stderr)
            self.extensions = []

    def _prepare(self, extension: Extension) -> None:
        flags = [*CXX_FLAGS, f"-isystem{pybind11_headers()}", f"-isystem{sysconfig.get_path('include')}"]
        libraries = ["libtorch_cpu.so"]
        sources, jobs = SOURCES, []
        if extension.with_cuda:
            codes, names = architectures()
            toolkit = cuda_toolkit()
            flags += [f"-isystem{toolkit / 'include'}", f'-DBHFAST_CUDA="{names}"']
            sources = [*SOURCES, *CUDA_ONLY]
            command = [nvcc(), *NVCC_FLAGS, *codes, "-Xcompiler=-fPIC,-Wall,-Wextra"]
            jobs = [(source, command) for source in CUDA_SOURCES]
            libraries.append("libtorch.so")  # which brings the part of torch that knows CUDA
            extension.library_dirs = [str(toolkit / "lib64"), str(toolkit / "lib")]
            extension.libraries = ["cudart_static", "rt", "dl", "pthread"]
        command = [*compiler(), *flags, *shlex.split(os.environ.get("CFLAGS", ""))]
        jobs += [(source, command) for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = [str(target) for target in threads.map(self._compile, *zip(*jobs, strict=True))]
        extension.extra_objects = objects
        if sys.platform == "darwin":
            extension.extra_link_args = ["-undefined", "dynamic_lookup"]
        else:
            extension.extra_link_args = ["-Wl,--no-as-needed", *map(self._stand_in, libraries), "-Wl,--as-needed"]
        self.force = self.compiler.force = True  # always link: that takes no time

    def _compile(self, source: str, command: list[str]) -> Path:
        """Compile a source if it, a header or the command has changed; return the object."""
        target = Path(self.build_temp, Path(source).relative_to("csrc").with_suffix(".o"))
        target = target.with_name(Path(source).name + ".o")
        record = target.with_suffix(".command")
        depends = target.with_suffix(".d")
        command = [*command, "-MMD", "-MF", str(depends), "-c", source, "-o", str(target)]
        if not self.force and target.exists() and record.exists() and record.read_text() == shlex.join(command):
            files = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
            if all(Path(file).exists() and Path(file).stat().st_mtime < target.stat().st_mtime for file in files):
                return target
        target.parent.mkdir(parents=True, exist_ok=True)
        print(shlex.join(command))
        record.unlink(missing_ok=True)
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)  # in one piece, though other sources are compiled beside it
        done.check_returncode()
        record.write_text(shlex.join(command))
        return target

    def _stand_in(self, name: str) -> str:
        """Make an empty library of this name, which the extension will need, and find loaded by torch."""
        target = Path(self.build_temp, name)
        command = [*compiler(), "-shared", "-nostdlib", f"-Wl,-soname,{name}", "-x", "c", os.devnull, "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)


def architectures() -> tuple[list[str], str]:
    """Return nvcc's flags for the architectures that it knows, and their names."""
    known = subprocess.run([nvcc(), "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    there = [arch for arch in ARCHITECTURES if f"sm_{arch}" in known]
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in there]
    codes.append(f"-gencode=arch=compute_{there[-1]},code=compute_{there[-1]}")
    return codes, " ".join(f"sm_{arch}" for arch in there)


def options() -> dict[str, object]:
    """Return what ``setup`` needs to build the extension; nothing if there is none to build."""
    what, why = plan()
    print(f"bhfast: extension: {what} ({why})", file=sys.stderr)
    if what == "none":
        return {}
    extension = Extension("bhfast._C", [], language="c++")
    extension.with_cuda = what == "cuda"
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**options())
