"""Completions for shells; those of bash are tried in bash."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import bhfast.__main__ as console
import bhfast.sweep.program
from bhfast.completion import SHELLS

TRY = """
source "$1"
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_bhfast; echo "${COMPREPLY[*]}"; }
while read -r line; do try $line; done
"""


@pytest.fixture(autouse=True)
def _without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep starts one while it reads its arguments."""
    monkeypatch.setattr(bhfast.sweep.program, "Worker", nullcontext)


def print_completion(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bhfast", "--print-completion", *arguments])
    return console.main()


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_knows_every_program(shell: str, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert print_completion(monkeypatch, shell) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(program in printed.out for program in console.PROGRAMS)
    assert "checkpoint-every" in printed.out


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is missing")
def test_bash_completes_programs_flags_choices_and_files(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("shtab")
    assert print_completion(monkeypatch, "bash") == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "a-file").touch()
    wanted = {
        "bhfast ve": "verify",
        "bhfast --print-completion z": "zsh",
        "bhfast train --checkp": "--checkpoint-every",
        "bhfast train --engine resi": "resident",
        "bhfast train --steps a-f": "",
        "bhfast train --quiet a-f": "",
        "bhfast train --config a-f": "a-file",
        "bhfast verify a-f": "a-file",
        "bhfast watch a-f": "a-file",
        "bhfast import a-f": "a-file",
        "bhfast corpus ga": "gatsby",
        "bhfast corpus gatsby --ra": "--raw",
        "bhfast corpus gatsby --raw a-f": "a-file",
    }
    command = ["bash", "-c", TRY, "bash", "./script"]
    done = subprocess.run(command, input="\n".join([*wanted, ""]), capture_output=True, text=True, cwd=tmp_path)
    assert dict(zip(wanted, done.stdout.splitlines(), strict=True)) == wanted
    assert done.stderr == ""


def test_a_missing_package_or_a_shell_that_is_not_known_has_a_line(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert print_completion(monkeypatch, "bash") == 2
    text = "bhfast --print-completion: error: this needs shtab: pip install 'bhfast[completion]'\n"
    assert capsys.readouterr() == ("", text)
    with pytest.raises(SystemExit) as exit_:
        print_completion(monkeypatch, "fish")
    assert exit_.value.code == 2
    assert "invalid choice: 'fish'" in capsys.readouterr().err
