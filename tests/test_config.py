"""Settings that are not flags: those of a file, and the number of threads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bhfast.config import TrainConfig, read_settings
from bhfast.errors import ConfigError
from bhfast.trace import open_trace
from bhfast.train import main


def test_settings_of_a_file_have_their_types(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text("sigma = 1\nhidden-dim = 32\nmax_grad_norm = inf\nuntied = true\nquiet = false\nrows = 'dead'\n")
    found = read_settings(file)
    assert found == {
        "sigma": 1.0,
        "hidden_dim": 32,
        "max_grad_norm": float("inf"),
        "untied": True,
        "quiet": False,
        "rows": "dead",
    }
    assert type(found["sigma"]) is float


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sgima = 0", "f.toml: there is no setting 'sgima'; there are sigma, steps, seed,"),
        ("[model]\nlayers = 1", "f.toml: there is no setting 'model'; there are"),
        ("batch-size = 1\nbatch_size = 1", "f.toml: batch_size is given twice"),
        ("sigma = 'x'", "f.toml: sigma must be a number, got 'x'"),
        (f"lr = 1{400 * '0'}", "f.toml: lr must be a number, got 1000"),
        ("seed = 1.0", "f.toml: seed must be an integer, got 1.0"),
        ("init-seed = true", "f.toml: init_seed must be an integer, got True"),
        ("lr = false", "f.toml: lr must be a number, got False"),
        ("untied = 1", "f.toml: untied must be true or false, got 1"),
        ("rows = [1, 2]", "f.toml: rows must be a string, got [1, 2]"),
        ("steps = ", "f.toml is not TOML: Invalid value"),
        ("steps = 0", "steps must be at least 1, got 0"),
    ],
)
def test_a_bad_file_has_a_line(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.toml").write_text(content)
    assert main(["--config", str(tmp_path / "f.toml"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bhfast train: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_file_has_a_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config .*gone: No such file"):
        read_settings(tmp_path / "gone")


def test_flags_override_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[TrainConfig] = []
    monkeypatch.setattr("bhfast.train.train", lambda config: started.append(config) or SimpleNamespace(signal=None))
    (tmp_path / "f.toml").write_text("steps = 7\nlr = 1e-2\nuntied = true\n")
    assert main(["--config", str(tmp_path / "f.toml"), "--lr", "1e-4", "--seed", "1"]) == 0
    assert started == [TrainConfig(steps=7, lr=1e-4, untied=True, seed=1)]


def test_a_run_goes_on_with_the_settings_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(
        "bhfast.train.resume", lambda trace, **settings: given.update(settings) or SimpleNamespace(signal=None)
    )
    (tmp_path / "f.toml").write_text("steps = 7\nlr = 1e-2\n")
    assert main(["--resume", "t", "--config", str(tmp_path / "f.toml"), "--steps", "9"]) == 0
    assert given == {"steps": 9, "lr": 1e-2}


@pytest.mark.usefixtures("two_threads")
def test_the_number_of_threads_is_not_of_the_experiment(text: str, tmp_path: Path) -> None:
    """A run with another number replaces the first without being told to; the trace says so where bits depend on it."""
    arguments = ["--steps", "3", "--corpus", text, "--device", "cpu", "--engine", "torch", "--out", str(tmp_path / "t")]
    for threads in ("1", "3"):
        assert main([*arguments, "--threads", threads, "--quiet"]) == 0
        assert torch.get_num_threads() == int(threads)
        trace = open_trace(tmp_path / "t")
        assert trace.metadata["threads"] == threads
        assert "threads" not in trace.metadata["config"]


@pytest.mark.parametrize("threads", ["0", "-1", "1025", str(2**70)])
def test_a_bad_number_of_threads_has_a_line(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--threads", threads]) == 2
    assert capsys.readouterr() == ("", f"bhfast train: error: threads must be 1 to 1024, got {threads}\n")
