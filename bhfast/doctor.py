"""Reports the hardware, and which device, engine and kernels bhfast uses.

python -m bhfast.doctor [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bhfast.cli import run_program
from bhfast.engines.choose import select_engine
from bhfast.machine import available_memory, select_device
from bhfast.ops import extension
from bhfast.optim import FusedAdam
from bhfast.trace.format import format_bytes
from bhfast.version import __version__

PACKAGES = ("numpy", "safetensors", "tqdm", "unidecode", "h5py", "pytest", "pytest-benchmark", "transformers")
SCHEMA = 1  # of the object that --json prints; docs/setup.md describes it


def self_test() -> str | None:
    """Compare three steps of FusedAdam with torch's AdamW on the CPU; return the difference in words, or None."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator).bfloat16()
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = FusedAdam([ours]), torch.optim.AdamW([theirs], foreach=False, fused=False)
    for step in range(1, 4):
        ours.grad = theirs.grad = torch.randn(1000, generator=generator).bfloat16()
        for optimizer in optimizers:
            optimizer.step()
        if not torch.equal(ours, theirs):
            return (
                f"FusedAdam and torch.optim.AdamW differ in {int((ours != theirs).sum())} of 1000 values at step {step}"
            )
    return None


def examine() -> dict[str, Any]:
    """Return what this machine has, and what bhfast uses of it: the object that ``bhfast doctor --json`` prints."""
    device, device_reason = select_device("auto")
    engine, engine_reason = select_engine("auto", device)
    backend, backend_reason = extension.backend(device)
    memory = available_memory()
    return {
        "schema": SCHEMA,
        "bhfast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "free_memory": memory if memory < sys.maxsize else None,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": {"name": device.type, "reason": device_reason},
        "engine": {"name": engine, "reason": engine_reason},
        "operations": {"name": backend, "reason": backend_reason},
        "native": extension.native_instruction_sets(),
        "resident_unavailable": extension.resident_unavailable(device),
        "packages": {name: _version(name) for name in PACKAGES},
        "fault": self_test(),
    }


def _text(found: dict[str, Any]) -> str:
    memory = found["free_memory"]
    packages = (f"{name} {version or 'missing'}" for name, version in found["packages"].items())
    rows = {
        "bhfast": found["bhfast"],
        "python": f"{found['python']} on {found['platform']}",
        "torch": f"{found['torch']}, {found['threads']} threads",
        "cpu": f"{found['cores']} cores, {found['cpu_capability']}",
        "memory": "unknown" if memory is None else f"{format_bytes(memory)} free",
        "cuda": found["cuda"] or "none",
        **{name: "{name} ({reason})".format(**found[name]) for name in ("device", "engine", "operations")},
        "native": ", ".join(found["native"]) or "not built",
        "resident": found["resident_unavailable"] or "--engine resident runs here; not measured on a GPU yet",
        "packages": ", ".join(packages),
        "self-test": found["fault"] or "FusedAdam equals torch.optim.AdamW bit for bit",
    }
    return "\n".join(f"{name:<11}{text}" for name, text in rows.items())


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 1 if the self-test failed."""
    parser = argparse.ArgumentParser(
        prog="bhfast doctor", description="Report the hardware, and what bhfast will use of it."
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return run_program(parser, _report, argv)


def _report(args: argparse.Namespace) -> int:
    found = examine()
    print(json.dumps(found) if args.json else _text(found))
    return 1 if found["fault"] else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
