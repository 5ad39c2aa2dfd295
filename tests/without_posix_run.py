"""Reads traces and tries to write some, in a Python that lacks what Windows lacks; prints as JSON what came of it.

    python without_posix_run.py FULL COMPACT PARTIAL NEW

FULL, COMPACT: traces to read and verify. PARTIAL: to open. NEW: to write.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys

import torch

OTHERS = ("matplotlib.pyplot", "numpy", "safetensors.torch", "torch.distributed", "tqdm")
MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
NAMES = {
    "os": (
        "fork forkpty register_at_fork pread pwrite preadv pwritev posix_fallocate fdatasync statvfs fstatvfs sysconf "
        "sched_getaffinity getuid geteuid getgid getegid getpgid getpgrp killpg setsid wait wait3 wait4 chown fchown "
        "fchmod mkfifo uname getloadavg nice sendfile sync WNOHANG O_CLOEXEC O_NONBLOCK O_DIRECTORY O_SYNC"
    ),
    "signal": "SIGHUP SIGKILL SIGALRM SIGUSR1 SIGUSR2 SIGPIPE SIGCHLD SIGCONT alarm setitimer pthread_sigmask",
    "mmap": (
        "MAP_PRIVATE MAP_SHARED MAP_ANONYMOUS MAP_ANON MAP_NORESERVE MAP_POPULATE PROT_READ PROT_WRITE "
        "MADV_HUGEPAGE MADV_DONTNEED MADV_WILLNEED MADV_SEQUENTIAL MADV_RANDOM"
    ),
}
HEAVY = (  # they import only their frameworks, and what others import as well
    "bhfast.hf",
    "bhfast.lightning",
    *(f"bhfast.export.{name}_writer" for name in ("parquet", "rerun", "tensorboard")),
)


def take_posix_away() -> None:
    for name in OTHERS:  # they know which system they are on, and use what they find there
        importlib.import_module(name)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in NAMES.items():
        for name in names.split():
            vars(importlib.import_module(module)).pop(name, None)
    sys.platform = "win32"


def import_all() -> None:
    package = importlib.import_module("bhfast")
    for module in pkgutil.walk_packages(package.__path__, "bhfast."):
        if module.name not in HEAVY and "__main__" not in module.name:
            importlib.import_module(module.name)


def no_such_file(name: str) -> None:
    raise FileNotFoundError(name)


def main(full: str, compact: str, partial: str, new: str) -> int:
    take_posix_away()
    import_all()
    import traces

    import bhfast
    from bhfast import expand, machine, signals, verify
    from bhfast.sweep.results import SweepResults
    from bhfast.trace import rebuilt

    rebuilt.HUGE_PAGE = 1  # so that all rebuilt states are mapped memory
    weight = torch.zeros(1, requires_grad=True)
    errors = []
    for use in (
        lambda: bhfast.open_trace(partial),
        lambda: bhfast.Recorder(torch.optim.SGD([weight]), {"w": weight}, steps=1, path=new).start(),
        lambda: SweepResults(new).begin({}, [], [], False),
        lambda: expand.expand(compact, f"{new}-full"),
    ):
        try:
            use()
        except bhfast.BhfastError as error:
            errors.append(str(error))
    vars(machine)["open"] = no_such_file  # /proc/meminfo
    with signals.deferred_signals(), signals.terminable():
        memory = machine.available_memory()
    print(json.dumps([traces.checksums(full), traces.checksums(compact), errors, memory]))
    return verify.main([full, compact])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
