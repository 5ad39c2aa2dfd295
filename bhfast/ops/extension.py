"""The extension ``bhfast._C``, where it is built, and what is behind the operations on each device."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

import bhfast.ops.kernels  # noqa: F401 - declares what the extension brings kernels for


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("bhfast._C"), ""
    except ModuleNotFoundError:
        return None, "the extension is not built: pip install --no-build-isolation -e . builds it where a compiler is"
    except ImportError as error:  # built for another torch, say
        return None, f"the extension does not load: {error}; build it anew"


def backend(device: torch.device | str = "cpu") -> tuple[str, str]:
    """Return the name of the implementation behind these operations on ``device``, and why it was chosen."""
    kind = torch.device(device).type
    if _extension is None:
        return "torch", _unavailable
    if kind == "cpu":
        return "C++", f"compiled; {_extension.instruction_set()}"
    if kind == "cuda" and _extension.cuda_architectures:
        return "CUDA", f"compiled for {_extension.cuda_architectures}"
    return "torch", f"the extension was built without kernels for {kind}"


def native_instruction_sets() -> list[str]:
    """Return the instruction sets that the native engine can use here, best first; none if it is not built."""
    return [] if _extension is None else _extension.native_instruction_sets()


def native_engine(**arguments: Any) -> Any:
    """Return a new object that runs training steps; see :mod:`bhfast.engines.native`, its only user."""
    assert _extension is not None
    return _extension.NativeEngine(**arguments)


_extension, _unavailable = _load()
