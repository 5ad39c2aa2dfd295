"""The examples run as they are documented."""

from __future__ import annotations

import runpy
import sys
from functools import partial
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
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    needed = pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed; examples/{name}.py needs it")
    if name == "gpt2_rows":  # with all its tokens, but a tenth of the width
        monkeypatch.setattr(needed, "GPT2Config", partial(needed.GPT2Config, n_embd=72, n_layer=2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--steps", "2"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert open_trace(tmp_path / f"{name}.safetensors").steps.tolist() == [0, 1, 2]
    assert SAYS[name] in capsys.readouterr().out
