"""Checks what ptxas says of each kernel, for each architecture; ``make cuda`` runs it.

    python tests/ptxas_log.py LOG sm_80 sm_90

``LOG`` is what nvcc prints with ``-Xptxas=-v``. Nothing may be spilled, no thread may need a stack, and every GPU must
have the registers and the static shared memory, which are printed. Exit status 1 if something is wrong.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REGISTERS = 255  # that a thread can have; with 256 threads a block then has all of a multiprocessor's
STATIC_SHARED = 48 << 10  # bytes

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\d+)\w*'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


class Kernel(NamedTuple):
    name: str
    architecture: str
    spilled: int  # bytes, of all its functions
    stack: int  # bytes
    registers: int | None  # None if the log does not say
    shared: int  # bytes


def kernels(log: str) -> Iterator[Kernel]:
    """Yield the kernels of a log, with all that is said of them and of the functions that they call."""
    starts = [*ENTRY.finditer(log)]
    for i, match in enumerate(starts):
        text = log[match.end() : starts[i + 1].start() if i + 1 < len(starts) else len(log)]
        memory = [[int(x) for x in found.groups()] for found in MEMORY.finditer(text)]
        used = USED.search(text)
        yield Kernel(
            _short(match[1]),
            match[2],
            sum(stores + loads for _, stores, loads in memory),
            sum(stack for stack, _, _ in memory),
            int(used[1]) if used and memory else None,
            int(used[2] or 0) if used else 0,
        )


def _short(mangled: str) -> str:
    """Return the name of a kernel with its template arguments, without what the compiler adds for each build."""
    return re.sub(r"^.*?_cu_[0-9a-f]{8}", "", mangled).lstrip("0123456789_")


def faults(found: list[Kernel], architectures: list[str]) -> Iterator[str]:
    """Yield a line for each thing that is wrong."""
    if not found:
        yield "the log has no kernels: it must be that of nvcc -Xptxas=-v"
    names = {kernel.name for kernel in found}
    for architecture in architectures:
        for name in sorted(names - {kernel.name for kernel in found if kernel.architecture == architecture}):
            yield f"{name} is not compiled for {architecture}"
    for kernel in found:
        wrong = [
            (kernel.registers is None, "its registers are not in the log"),
            (kernel.spilled > 0, f"{kernel.spilled} bytes are spilled"),
            (kernel.stack > 0, f"a stack of {kernel.stack} bytes"),
            ((kernel.registers or 0) > REGISTERS, f"{kernel.registers} registers, at most {REGISTERS}"),
            (kernel.shared > STATIC_SHARED, f"{kernel.shared} bytes of shared memory, at most {STATIC_SHARED}"),
        ]
        yield from (f"{kernel.name} for {kernel.architecture}: {what}" for is_wrong, what in wrong if is_wrong)


def main(arguments: list[str]) -> int:
    log, *architectures = arguments
    found = list(kernels(Path(log).read_text()))
    for name in dict.fromkeys(kernel.name for kernel in found):
        own = [kernel for kernel in found if kernel.name == name]
        figures = ", ".join(f"{k.architecture} {k.registers} registers {k.shared} B shared" for k in own)
        print(f"{name}: {figures}")
    wrong = list(faults(found, architectures))
    for line in wrong:
        print(f"ptxas_log: error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
