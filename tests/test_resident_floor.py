"""The estimate of a step of the resident engine: its counts of instructions, and what is written about it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bhfast.sweep.limits import REFERENCE_SECONDS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs/resident.md"


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, name, raising=False)
    return __import__(name)


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("resident_floor", monkeypatch)


@pytest.fixture
def sass(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return imported("resident_sass", monkeypatch)


def line_of(file: str, text: str) -> int:
    lines = (ROOT / "csrc/cuda/resident" / file).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


def test_instructions_belong_to_the_call_that_they_are_inlined_at(sass: ModuleType) -> None:
    """Two layer norms, each with a loop over items and one within; a function; another kernel."""
    step = [line_of("step.h", text) for text in ("forward_qkv(", "forward_mlp(")]
    norm = [line_of("forward.h", f"layer_norm(pass, block.ln_{i}") for i in (1, 2)]
    text, address = "\t.text.other:\n        /*0000*/  IMAD R1, R2 ;\n\t\n.text.a_resident_kernelILb1E:\n", 0

    def add(opcode: str, chain: list[tuple[str, int]]) -> None:
        nonlocal text, address
        places = [f'File "csrc/{file}", line {line}' for file, line in chain]
        for i, place in enumerate(places):
            inlined = f' inlined at "csrc/{chain[i + 1][0]}", line {chain[i + 1][1]}' if i + 1 < len(chain) else ""
            text += f"\t//## {place}{inlined}\n"
        text += f"        /*{address:04x}*/                   {opcode} ;\n"
        address += 16

    for copy in (0, 1):
        chain = [("layernorm.h", 5), ("forward.h", norm[copy]), ("step.h", step[copy]), ("resident.cu", 1)]
        add("S2R R1", chain)
        text += f".L_item{copy}:\n"
        add("LDS R1, [R2]", chain)
        text += f".L_trip{copy}:\n"
        add("@P0 FADD R1, R2, R3", chain)
        add(f"@!P0 BRA `(.L_trip{copy})", chain)
        add(f"@P1 BRA `(.L_item{copy})", chain)
        add("BAR.SYNC.DEFER_BLOCKING 0x0", [("forward.h", norm[copy] + 1), *chain[2:]])
    text += "$kernel$_ZN8multiplyILb0ELb1ELb1EE:\n"
    add("HMMA.16816.F32.BF16 R1, R2", [("product.h", 9)])
    counts = sass.count(sass.parse(text, sass.KERNEL))
    assert counts == {
        "layer norms": {"all": 12, "copies": 2, "item": 4, "trip": 4, "shared memory": 2, "barriers": 2},
        "multiply<0, 1>": {"all": 1, "copies": 1, "item": 0, "trip": 0, "mma": 1},
    }


def test_every_phase_has_been_counted(floor: ModuleType, sass: ModuleType) -> None:
    result = json.loads(floor.SASS.read_text())
    wanted = {name for calls in sass.MARKERS.values() for name in calls.values()}
    assert wanted == {name for name in result["phases"] if "multiply" not in name} - {"other"}
    assert {phase for phase, _ in sass.call_sites().values()} == wanted
    assert {phase.name for phase in floor.phases(floor.Sizes(), 8)} <= wanted
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert result["nvcc"].startswith("13.")
    assert sum(phase["mma"] for name, phase in result["phases"].items() if "multiply" in name) == 8 + 8 + 12


def test_a_step_waits_or_issues(floor: ModuleType) -> None:
    for blocks in (1, 2, 4, 8):
        least, most = floor.seconds(floor.Sizes(), blocks)
        assert 0 < least < most
        assert most == pytest.approx(REFERENCE_SECONDS[blocks], rel=0.01)


def test_the_note_has_the_estimate(floor: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    if not DOCS.exists():
        pytest.skip("docs/ is not here")
    monkeypatch.setattr(sys, "argv", ["resident_floor.py"])
    floor.main()
    text = DOCS.read_text()
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("| ") and "phase" not in line:
            assert line in text
