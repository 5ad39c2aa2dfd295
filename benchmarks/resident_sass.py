"""Counts the instructions of each phase of the resident engine, in the machine code that nvcc makes of it.

    python benchmarks/resident_sass.py [--out benchmarks/results/resident_sass.json]

needs nvcc and nvdisasm, but no GPU. The compiler's line numbers tell which call in ``csrc/cuda/resident/step.h``,
``forward.h`` and ``backward.h`` an instruction belongs to. ``benchmarks/resident_floor.py`` reads the result.

A phase is in the code once per call in the source (``copies``), or per call of ``multiply`` within. It has instructions
in no loop, in a loop over the items that warps take (``item``), and in loops within that, over a row (``trip``). All
are counted, whatever the branches: too many rather than too few. ``multiply``, the function of all products, is apart;
its loop is over groups of tiles.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import runpy
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc/cuda/resident.cu"
ARCHITECTURE = "sm_90"
KERNEL = "resident_kernelILb1E"  # the one for clusters
# The calls that begin a phase, by the file they are in.
MARKERS = {
    "step.h": {
        "embed(": "embedding",
        "sync_cluster": "cluster barriers",
        "weight_gradients(": "weight gradients",
        "log_hidden_statistics(": "hidden statistics",
        "sum_squares(": "norm",
        "clip(": "clipping",
        " update(": "Adam, recording",
        " log(": "log",
        "record_rows(": "recorded rows",
    },
    "forward.h": {
        "layer_norm(": "layer norms",
        "block.c_attn,": "c_attn",
        "each_score(": "scores",
        "causal_softmax(": "softmax",
        "mix_keys(": "mixed values",
        "block.attn_proj,": "attn_proj",
        "block.c_fc,": "c_fc, GELU",
        "block.mlp_proj,": "mlp_proj",
        "run.wte,": "logits",
        "cross_entropy(": "loss",
    },
    "backward.h": {
        "run.wte,": "head, backward",
        "layer_norm_backward(": "layer norms, backward",
        "block.mlp_proj,": "mlp_proj, GELU, backward",
        "block.c_fc,": "c_fc, backward",
        "block.attn_proj,": "attn_proj, backward",
        "each_score(": "attention weights, backward",
        "softmax_backward(": "softmax, backward",
        "mix_keys(": "queries, backward",
        "mix_queries(": "keys and values, backward",
        "block.c_attn,": "c_attn, backward",
    },
}
ADAM = "adam_pack<bfloat16, bfloat16>"  # of optimizer.h: Adam with --adam-rounding per-op
ADAM_SCALAR = "for (int k = 0; k < P::kSize && i + k"  # of adam_pack.h: from here on the elements that fill no pack
KINDS = {
    "mma": "HMMA",
    "shared memory": "LDS|STS|LDSM",
    "memory": "LD|LDG|ST|STG",
    "shuffles": "SHFL",
    "calls": "CALL",
    "barriers": "BAR",
    "cluster barriers": "UCGABAR_ARV|UCGABAR_WAIT",
}


class Instruction(NamedTuple):
    opcode: str
    target: str  # of a branch
    function: str
    lines: tuple[tuple[str, int], ...]  # file and line, of the innermost function first


class Function(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]


def parse(sass: str, kernel: str) -> Function:
    """Return the instructions of a kernel, and where its labels are, from the output of ``nvdisasm -gi -c``."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    lines: list[tuple[str, int]] = []
    is_inside, is_new, function = False, True, ""
    for text in sass.splitlines():
        if text.startswith(".text."):
            is_inside = kernel in text
        elif not is_inside:
            continue
        elif found := re.match(r'\s*//## File "([^"]+)", line (\d+)', text):
            lines = ([] if is_new else lines) + [(Path(found[1]).name, int(found[2]))]
            is_new = False
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", text):
            target = re.search(r"`\(([^)]+)\)", found[2])
            instructions.append(Instruction(found[1], target[1] if target else "", function, tuple(lines)))
            is_new = True
        elif found := re.match(r"(\S+):$", text):
            labels[found[1]] = len(instructions)
            if not found[1].startswith(".L"):
                function = found[1]
    return Function(instructions, labels)


def call_sites() -> dict[tuple[str, int], tuple[str, int]]:
    """Return for each line of the files in ``MARKERS`` its phase, and the line of the call that begins it."""
    found = {}
    for file, calls in MARKERS.items():
        phase = None
        for number, line in enumerate((SOURCE.with_suffix("") / file).read_text().splitlines(), 1):
            phase = next(((name, number) for call, name in calls.items() if call in line), phase)
            if phase:
                found[file, number] = phase
    return found


def site_of(instruction: Instruction, sites: dict[tuple[str, int], tuple[str, int]]) -> tuple[str, int] | None:
    """Return the phase of an instruction, and where it begins; None if it is in none."""
    at = next((i for i, (file, _) in enumerate(instruction.lines) if file == "step.h"), None)
    if at is None:
        return None
    caller = instruction.lines[at - 1] if at else ("", 0)
    return sites.get(caller) or sites.get(instruction.lines[at])


def phase_of(instruction: Instruction, sites: dict[tuple[str, int], tuple[str, int]]) -> str:
    if variant := re.search(r"multiplyILb(\d)ELb(\d)", instruction.function):
        return f"multiply<{variant[1]}, {variant[2]}>"
    site = site_of(instruction, sites)
    return site[0] if site else "other"


def depths(function: Function, members: Sequence[int]) -> list[int]:
    """Return for each instruction of a phase in how many loops of that phase it is."""
    own = set(members)
    loops: dict[int, int] = {}  # from its first instruction to its last
    for i in members:
        to = function.labels.get(function.instructions[i].target, i + 1)
        if function.instructions[i].opcode == "BRA" and to <= i and to in own:
            loops[to] = max(i, loops.get(to, i))
    return [sum(first <= i <= last for first, last in loops.items()) for i in members]


def count(function: Function) -> dict[str, dict[str, int]]:
    """Return the numbers of each phase."""
    sites, members = call_sites(), dict[str, list[int]]()
    for i, instruction in enumerate(function.instructions):
        members.setdefault(phase_of(instruction, sites), []).append(i)
    counts = {}
    for phase, own in sorted(members.items()):
        depth = depths(function, own)
        opcodes = Counter(function.instructions[i].opcode for i in own)
        kinds = {name: sum(opcodes[opcode] for opcode in kind.split("|")) for name, kind in KINDS.items()}
        counts[phase] = {
            "all": len(own),
            "copies": copies(function, own, sites),
            "item": sum(d == 1 for d in depth),
            "trip": sum(d >= 2 for d in depth),
            **{name: number for name, number in kinds.items() if number},
        }
    if packs := sum(is_in_pack(x) for x in function.instructions):
        counts["Adam, recording"]["pack"] = packs
    return counts


def copies(function: Function, members: Sequence[int], sites: dict[tuple[str, int], tuple[str, int]]) -> int:
    own = [function.instructions[i] for i in members]
    products = sum(x.opcode == "CALL" and "8multiply" in x.target for x in own)
    return products or len({site_of(x, sites) for x in own} - {None}) or 1


def is_in_pack(instruction: Instruction) -> bool:
    """Return whether an instruction updates a thread's pack of elements with per-op rounding."""
    start = number_of("resident/optimizer.h", ADAM), number_of("adam_pack.h", ADAM_SCALAR)
    packs = [line for file, line in instruction.lines if file == "adam_pack.h"]
    return ("optimizer.h", start[0]) in instruction.lines and bool(packs) and packs[-1] < start[1]


def number_of(file: str, text: str) -> int:
    lines = (SOURCE.parent / file).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if text in line]
    return number


def versions() -> Iterator[str]:
    for tool in ("nvcc", "nvdisasm"):
        said = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout
        yield re.search(r"V([\d.]+)", said)[1]


def disassemble() -> tuple[str, int]:
    """Compile the engine as setup.py does, with line numbers; return its machine code as text, and its registers."""
    with mock.patch("setuptools.setup"):
        flags = runpy.run_path(str(ROOT / "setup.py"))["NVCC_FLAGS"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "resident.cubin"
        compile_it = ["nvcc", "-cubin", f"-arch={ARCHITECTURE}", SOURCE, "-o", cubin, *flags, "-lineinfo", "-Xptxas=-v"]
        said = subprocess.run(compile_it, check=True, capture_output=True, text=True).stderr
        registers = re.search(KERNEL + r".*?Used (\d+) registers", said, re.DOTALL)[1]
        sass = subprocess.run(["nvdisasm", "-gi", "-c", cubin], check=True, capture_output=True, text=True).stdout
    return sass, int(registers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/resident_sass.json")
    arguments = parser.parse_args()
    sass, registers = disassemble()
    nvcc, nvdisasm = versions()
    result = {
        "date": datetime.date.today().isoformat(),
        "nvcc": nvcc,
        "nvdisasm": nvdisasm,
        "architecture": ARCHITECTURE,
        "registers": registers,
        "phases": count(parse(sass, KERNEL)),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{sum(phase['all'] for phase in result['phases'].values()):,} instructions: {arguments.out}")


if __name__ == "__main__":
    main()
