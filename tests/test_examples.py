"""The examples run as they are documented."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bhfast.trace import open_trace

EXAMPLES = Path(__file__).parents[1] / "examples"
SAYS = {
    "dead_tokens": "dead tokens froze",
    "gpt2_rows": "Trace(",
    "hf_trainer": "; 2 steps replayed",
    "lightning_module": "; 2 steps replayed",
}
NEEDS = {
    "dead_tokens": "matplotlib",
    "gpt2_rows": "transformers",
    "hf_trainer": "transformers",
    "lightning_module": "lightning",
}


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed; examples/{name}.py needs it")
    program = [sys.executable, str(EXAMPLES / f"{name}.py"), "--steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads of programs side by side wait for each other
    run = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert open_trace(tmp_path / f"{name}.safetensors").steps.tolist() == [0, 1, 2]
    assert SAYS[name] in run.stdout
