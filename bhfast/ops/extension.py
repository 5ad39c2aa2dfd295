"""The optional extension ``bhfast._C``: what it provides, and why it is missing if it is."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch

import bhfast.ops.kernels  # noqa: F401 - declares the operations before the extension registers kernels for them
from bhfast.ops.checks import _check
from bhfast.ops.compiled_run import compiled_run
from bhfast.ops.resident_program import ResidentProgram

OLDEST_TORCH = (2, 10)  # that has the stable ABI: csrc/libtorch/abi.h


def _load() -> tuple[ModuleType | None, str]:
    version = torch.__version__
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        return None, f"the extension needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is {version}"
    try:
        return importlib.import_module("bhfast._C"), ""
    except ModuleNotFoundError:
        return None, "the extension is not built: pip install . builds it if there is a C++ compiler"
    except ImportError as error:
        return None, f"the extension does not load: {error}; rebuild it"


@cache
def warn_if_missing() -> None:
    """Warn once if the operations run in pure torch, which takes several times as long."""
    if _extension is None:
        message = f"FusedAdam runs in pure torch, several times slower than compiled: {_unavailable}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def backend(device: torch.device | str = "cpu") -> tuple[str, str]:
    """Return which implementation the operations have on ``device`` (``C++``, ``CUDA`` or ``torch``), and why."""
    kind = torch.device(device).type
    if _extension is None:
        return "torch", _unavailable
    if kind == "cpu":
        return "C++", f"compiled; {_extension.instruction_set()}"
    if kind == "cuda" and _extension.cuda_architectures:
        return "CUDA", f"compiled for {_extension.cuda_architectures}"
    return "torch", f"the extension was built without kernels for {kind}"


def native_instruction_sets() -> list[str]:
    """Return the instruction sets that the native engine can use here, fastest first; none without the extension."""
    return [] if _extension is None else _extension.instruction_sets()


def native_unsupported(hidden_dim: int, heads: int, mlp_dim: int) -> str | None:
    """Return why the native engine cannot run a network of these sizes; None if it can."""
    if _extension is None:
        return f"the native engine needs the C++ kernels: {_unavailable}"
    return _extension.native_unsupported(hidden_dim, heads, mlp_dim) or None


def native_engine(*, threads: int | None, instruction_set: str, **arguments: Any) -> Any:
    """Return a new ``bhfast._C.NativeEngine``, which runs training steps; see :mod:`bhfast.engines.native`."""
    run = compiled_run(_extension, **arguments)
    _check(run.device.type == "cpu", ValueError, f"the native engine runs on the CPU, not on {run.device}")
    assert _extension is not None
    return _extension.NativeEngine(run.handle, threads=threads, instruction_set=instruction_set)


def resident_unavailable(device: torch.device) -> str | None:
    """Return why the resident engine cannot run on ``device``, whatever the network; None if it can."""
    if device.type != "cuda":
        return f"the resident engine needs a CUDA device, not {device.type}"
    if backend(device)[0] != "CUDA":
        return f"the resident engine needs the CUDA kernels: {backend(device)[1]}"
    return None


def resident_unsupported(**sizes: int) -> str | None:
    """Return why the resident engine cannot run a network of these sizes; None if it can.

    Args:
        sizes: ``vocab_size``, ``hidden_dim``, ``mlp_dim``, ``layers``, ``heads``, ``context``; ``blocks``: that work on
            a run; ``shared_bytes``: the shared memory that a block may use, 0 for that of an H200.
    """
    if _extension is None:
        return f"the resident engine needs the CUDA kernels: {_unavailable}"
    return _extension.resident_unsupported(**sizes) or None


def resident_engine(runs: Sequence[dict[str, Any]], *, blocks: int, shared_bytes: int | None = None) -> ResidentProgram:
    """Return what runs the training steps of runs of one shape; see :mod:`bhfast.engines.resident`.

    Args:
        runs: the arguments of each run's :func:`bhfast.ops.compiled_run.compiled_run`.
        blocks, shared_bytes: see :class:`bhfast.engines.resident.ResidentEngine`.
    """
    module = _resident_module()
    own = [compiled_run(module, **arguments) for arguments in runs]
    return ResidentProgram(module, own, blocks=blocks, shared_bytes=shared_bytes)


def _resident_module() -> Any:
    return _extension


_extension, _unavailable = _load()
