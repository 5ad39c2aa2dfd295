"""The package as a whole: imports, the console script, doctor, and who may import whom."""

from __future__ import annotations

import argparse
import ast
import json
import pickle
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bhfast
from bhfast import __main__ as console
from bhfast import doctor
from bhfast.cli import run_program
from bhfast.errors import BhfastError, StorageError

PACKAGE = Path(bhfast.__file__).parent
ROOT = Path(__file__).parents[1]
# The plan of rooms: each one imports exactly those named, which all stand above it. "bhfast" is bhfast/__init__.py.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "cli": {"errors"},
    "version": set(),
    "signals": set(),
    "locks": {"errors"},
    "lattice": set(),
    "machine": {"errors"},
    "start": {"errors"},
    "model": {"errors", "start"},
    "tokens": {"errors"},
    "corpus": {"cli", "errors", "tokens"},
    "ops": set(),
    "optim": {"errors", "ops"},
    "transfer": set(),
    "trace": {"errors", "ops", "transfer"},
    "storage": {"errors", "locks", "machine", "trace", "transfer"},
    "recording": {"errors", "ops", "signals", "storage", "trace", "transfer"},
    "hf": {"errors", "recording"},
    "lightning": {"recording"},
    "replay": {"ops", "trace"},
    "accounting": {"errors", "ops", "trace"},
    "foreign": {"cli", "errors", "ops", "replay", "storage", "trace"},
    "import": {"foreign"},
    "verify": {"cli", "errors", "foreign", "replay", "trace"},
    "compact": {"cli", "errors", "replay", "storage", "trace"},
    "expand": {"cli", "errors", "ops", "storage", "trace", "verify"},
    "recover": {"cli", "errors", "storage", "trace"},
    "checkpoint": {"errors", "storage", "trace"},
    "summary": {"errors", "lattice", "trace"},
    "engines": {"errors", "model", "ops", "optim", "recording"},
    "config": {"engines", "errors", "model", "ops", "start", "storage", "trace"},
    "info": {"cli", "config", "errors", "locks", "trace"},
    "experiment": {"config", "engines", "errors", "machine", "ops", "tokens", "trace"},
    "resume": {"checkpoint", "config", "engines", "errors", "experiment", "recording", "recover", "trace"},
    "progress": {"engines"},
    "assemble": {
        *("config", "engines", "errors", "experiment", "model", "optim", "recording", "tokens", "trace"),
        "version",
    },
    "train": {
        *("assemble", "cli", "config", "engines", "experiment", "machine", "model", "ops", "progress"),
        *("recording", "resume", "signals", "summary", "trace"),
    },
    "bhfast": {"config", "errors", "optim", "recording", "trace", "train", "version"},
    "sweep": {
        *(
            "bhfast",
            "checkpoint",
            "cli",
            "config",
            "engines",
            "errors",
            "experiment",
            "locks",
            "machine",
            "ops",
            "progress",
        ),
        *("signals", "storage", "summary", "trace", "train", "transfer"),
    },
    "report": {"cli", "errors", "lattice", "summary", "sweep", "trace", "version"},
    "watch": {"cli", "errors", "lattice", "locks", "report", "summary", "trace"},
    "export": {"cli", "errors", "lattice", "report", "summary", "trace"},
    "diff": {"cli", "errors", "replay", "report", "trace"},
    "doctor": {"cli", "engines", "machine", "ops", "optim", "trace", "version"},
    "completion": {"cli", "errors"},
    "__main__": {"cli"},
}


def imports_of_modules() -> dict[str, set[str]]:
    """Every module of the package, and those of the package that it imports, wherever in it that stands."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in files}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively"
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= names & files.keys()
                if node.module in files and names - files.keys():
                    found[name].add(node.module)
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_modules_import_in_no_circle() -> None:
    TopologicalSorter(imports_of_modules()).prepare()  # raises CycleError, and names the circle


def test_rooms_import_only_what_they_may() -> None:
    rooms: dict[str, set[str]] = {}
    for module, imported in imports_of_modules().items():
        rooms.setdefault(room_of(module), set()).update(room_of(other) for other in imported)
    assert {room: others - {room} for room, others in rooms.items()} == ROOMS


def test_rooms_import_downward() -> None:
    order = list(ROOMS)
    for room, others in ROOMS.items():
        assert others <= set(order[: order.index(room)]), room


needs_documents = pytest.mark.skipif(
    not (ROOT / "CONTRIBUTING.md").exists() or not (ROOT / "docs").exists(),
    reason="this copy of the tree has no CONTRIBUTING.md and docs/",
)


@needs_documents
def test_contributing_has_the_same_plan() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \|([^|]*)\|$", text, flags=re.MULTILINE)
    assert [(room, set(re.findall(r"\w+", others))) for room, others in rows] == list(ROOMS.items())


@needs_documents
def test_links_between_documents_lead_somewhere() -> None:
    documents = [path for folder in (".", "docs", "data", "benchmarks") for path in (ROOT / folder).glob("*.md")]
    assert len(documents) > 5
    for document in documents:
        for target in re.findall(r"\]\(([^):]+)\)", document.read_text()):
            path, _, heading = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists(), f"{document} links to {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
                assert heading in [text.lower().replace(" ", "-") for text in headings], f"{document} links to {target}"


def test_an_error_of_the_user_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def program(args: argparse.Namespace) -> int:
        if args.file == "bad":
            raise BhfastError("bad is not a file; name another")
        return 7

    parser = argparse.ArgumentParser(prog="bhfast fly")
    parser.add_argument("file")
    assert run_program(parser, program, ["good"]) == 7
    assert capsys.readouterr() == ("", "")
    assert run_program(parser, program, ["bad"]) == 2
    assert capsys.readouterr() == ("", "bhfast fly: error: bad is not a file; name another\n")


def test_programs_name_flags_where_calls_name_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Not in what the user has given, such as a file called lr=True."""
    error = StorageError(
        "lr=True exists", 'pass overwrite=True, choose path=, steps= or record_every=, or use storage="stream"'
    )
    text = 'lr=True exists; pass overwrite=True, choose path=, steps= or record_every=, or use storage="stream"'
    assert f"{error}" == f"{pickle.loads(pickle.dumps(error))}" == text

    def fail(args: argparse.Namespace) -> int:
        raise error

    assert run_program(argparse.ArgumentParser(prog="bhfast fly"), fail, []) == 2
    flags = "pass --overwrite, choose --out, --steps or --record-every, or use --storage stream"
    assert capsys.readouterr().err == f"bhfast fly: error: lr=True exists; {flags}\n"
    assert pickle.loads(pickle.dumps(error)).with_flags == f"lr=True exists; {flags}"


def test_every_public_name_is_there() -> None:
    for name in bhfast.__all__:
        assert getattr(bhfast, name)
    with pytest.raises(AttributeError, match="module 'bhfast' has no attribute 'nothing'"):
        _ = bhfast.nothing


@pytest.mark.parametrize("program", console.PROGRAMS)
def test_every_program_has_help(program: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bhfast", program, "--help"])
    with pytest.raises(SystemExit) as exit_:
        console.main()
    assert exit_.value.code == 0
    assert f"usage: bhfast {program}" in capsys.readouterr().out


def test_console_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (([], 0), (["--help"], 0), (["--version"], 0), (["fly"], 2)):
        monkeypatch.setattr(sys, "argv", ["bhfast", *arguments])
        assert console.main() == code
    printed = capsys.readouterr()
    assert bhfast.__version__ in printed.out
    assert "there is no program 'fly'; choose from\n  train" in printed.err


def test_import_is_light_and_silent_and_programs_run_as_modules() -> None:
    """As ``python -W error -m`` does, but in forks of one process, which has imported torch."""
    code = """if True:
        import os, runpy, sys, bhfast
        print('torch' in sys.modules)
        bhfast.FusedAdam
        print('torch' in sys.modules, flush=True)
        import children
        for program in sys.argv[1:]:
            def run():
                sys.argv[1:] = ["--help"]
                runpy.run_module(f"bhfast.{program}", run_name="__main__", alter_sys=True)
            print(program, children.status_of(children.fork(run)), file=sys.stderr)
    """
    command = [sys.executable, "-W", "error", "-c", code, *console.PROGRAMS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.split()[:2] == ["False", "True"]
    assert done.stderr.splitlines() == [f"{program} 0" for program in console.PROGRAMS]


def test_doctor_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for name in ("bhfast", "torch", "device", "engine", "operations", "self-test"):
        assert f"\n{name}" in f"\n{printed}"
    assert "bit for bit" in printed


def test_doctor_says_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(doctor.examine())) | {"free_memory": found["free_memory"]}
    assert (found["schema"], found["bhfast"], found["fault"]) == (1, bhfast.__version__, None)
    assert found["device"].keys() == found["engine"].keys() == found["operations"].keys() == {"name", "reason"}


@needs_documents
def test_the_keys_of_json_are_documented() -> None:
    text = (ROOT / "docs" / "setup.md").read_text().partition("## What a machine has")[2]
    cells = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))
    assert doctor.examine().keys() == set(re.findall("`(.+?)`", cells))


def test_doctor_fails_if_the_self_test_does(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from bhfast.ops import arithmetic

    real = arithmetic.adam_coefficients
    monkeypatch.setattr(arithmetic, "adam_coefficients", lambda steps, *a, **k: real([s + 1 for s in steps], *a, **k))
    assert doctor.main([]) == 1
    assert "values at step 1" in capsys.readouterr().out
    assert doctor.main(["--json"]) == 1
    assert "values at step 1" in json.loads(capsys.readouterr().out)["fault"]
