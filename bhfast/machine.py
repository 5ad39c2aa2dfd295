"""This machine's device to train on, and its free memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from bhfast.errors import ConfigError

MOST_THREADS = 1024  # torch ends the process if the system cannot start them


def select_device(name: str) -> tuple[torch.device, str]:
    """Return the device to train on, and why.

    Args:
        name: ``auto``, ``cuda``, ``mps`` or ``cpu``.

    Raises:
        ConfigError: this machine does not have that device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        first = next(device for device, ready in available.items() if ready)
        return torch.device(first), "the first available of cuda, mps and cpu"
    if not available[name]:
        raise ConfigError(
            f"device {name} is not available here; use --device {' or '.join(d for d in available if available[d])}"
        )
    return torch.device(name), "as asked"


def require_threads(count: int) -> None:
    """Check how many threads torch and the native engine are to have; more than there are cores are allowed.

    Raises:
        ConfigError: it is not a possible number.
    """
    if not 1 <= count <= MOST_THREADS:
        raise ConfigError(f"threads must be 1 to {MOST_THREADS}, got {count}")


def available_memory() -> int:
    """Return how many more bytes this process can allocate: limited by the machine, or by its control group.

    ``sys.maxsize`` if the system does not say.
    """
    limits = []
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError):
        if hasattr(os, "sysconf"):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        limits.append(int((group / "memory.max").read_text()) - int(used["anon"]))
    except (OSError, KeyError, ValueError):
        pass  # no control group, or no limit ("max")
    return min(limits, default=sys.maxsize)
