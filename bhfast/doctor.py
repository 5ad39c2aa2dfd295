"""Reports the hardware, and which device, engine and kernels bhfast uses.

python -m bhfast.doctor
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from bhfast.cli import run_program
from bhfast.engines.choose import select_engine
from bhfast.machine import available_memory, select_device
from bhfast.ops import extension
from bhfast.optim import FusedAdam
from bhfast.trace.format import format_bytes
from bhfast.version import __version__

PACKAGES = ("numpy", "safetensors", "tqdm", "unidecode", "h5py", "pytest", "pytest-benchmark", "transformers")


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


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 1 if the self-test failed."""
    parser = argparse.ArgumentParser(
        prog="bhfast doctor", description="Report the hardware, and what bhfast will use of it."
    )
    return run_program(parser, _report, argv)


def _report(args: argparse.Namespace) -> int:
    device, device_reason = select_device("auto")
    engine, engine_reason = select_engine("auto", device)
    backend, backend_reason = extension.backend(device)
    fault = self_test()
    rows = {
        "bhfast": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{format_bytes(memory)} free" if (memory := available_memory()) < sys.maxsize else "unknown",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "device": f"{device.type} ({device_reason})",
        "engine": f"{engine} ({engine_reason})",
        "operations": f"{backend} ({backend_reason})",
        "native": ", ".join(extension.native_instruction_sets()) or "not built",
        "resident": extension.resident_unavailable(device) or "--engine resident runs here; not measured on a GPU yet",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "self-test": fault or "FusedAdam equals torch.optim.AdamW bit for bit",
    }
    for name, text in rows.items():
        print(f"{name:<11}{text}")
    return 1 if fault else 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    sys.exit(main())
