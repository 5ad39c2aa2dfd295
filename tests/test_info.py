"""What `bhfast info` says of traces of every form, without reading their data."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from children import fork, status_of
from hypothesis import event, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from strategies import CHANGES, HEADER_CHANGES, JUNK, change_header, fuzzed, mutated
from streaming_run import record as record_streaming
from torch import nn
from traces import joined, record, rewrite, shard, split

from bhfast import TrainConfig, compact, info, train, verify
from bhfast.errors import DamageError, TraceError, printable
from bhfast.locks import is_locked
from bhfast.optim import FusedAdam
from bhfast.recording.recorder import Recorder
from bhfast.storage.output import lock, unlock
from bhfast.trace import open_trace
from bhfast.train import TrainResult

DOCUMENT = Path(__file__).parents[1] / "docs" / "info.md"
NASTY = "\x1b]0;owned\x07w\n\u202e\x9b2J\x7f"


def said(path: Path) -> str:
    return "\n".join(info.text_lines(info.inspect(path)))


def notebook_file(path: Path, **more: torch.Tensor) -> Path:
    """Write what the notebook writes: tensors, and no metadata."""
    cube = torch.zeros(3, 4, 2).bfloat16()
    scalars = {name: torch.tensor(0.25) for name in ("sigma", "init_scale", "adam_beta1")}
    own = {name: cube.clone() for name in ("embeddings", "grads", "momentum", "variance")}
    save_file({"recorded_steps": torch.tensor([0, 1, 2]), **own, **scalars, **more}, path)
    return path


def test_the_reference_run(run: TrainResult) -> None:
    found = info.inspect(run.path)
    trace = open_trace(run.path)
    assert (found.kind, found.state, found.written_by, found.format_version) == (
        "file",
        "complete",
        "bhfast train",
        "2",
    )
    assert (found.records, found.first_step, found.last_step, found.planned_steps, found.every) == (131, 0, 130, 130, 1)
    assert (found.keyframes, found.record_checksums, found.header_checksum, found.missing) == (None, True, True, [])
    assert found.files == [info.FileInfo(str(run.path), run.path.stat().st_size, 131)]
    assert {x.name: (x.dtype, x.shape, x.bytes, x.rows, x.rebuilt) for x in found.tensors}["embeddings"] == (
        *("BF16", [131, 128, 64], 131 * 128 * 64 * 2),
        *(None, False),
    )
    assert [x.name for x in found.tensors] == list(trace)
    assert found.bytes == sum(x.nbytes for x in trace.values())
    assert found.settings == trace.config
    assert found.scalars["sigma"] == 0
    assert found.made_by["engine"] == trace.metadata["engine"]
    assert found.versions["torch"] == torch.__version__
    assert found.optimizer["arithmetic"] == "per-op"
    assert found.corpus_sha256 == trace.metadata["corpus_sha256"]
    text = said(run.path)
    for part in (
        "a trace of bhfast train, complete",
        "0 to 130; 131 records",
        "sigma 0, seed 42, steps 130",
        "131 × 128",
    ):
        assert part in text
    assert "missing" not in text


def test_a_run_that_was_cut_short(run: TrainResult, tmp_path: Path) -> None:
    trace = open_trace(run.path)
    config = json.dumps({**trace.config, "steps": 205, "record_every": 10, "lr": 0.5})
    rewrite(tmp_path / "t", dict(trace), {**trace.metadata, "config": config})
    found = info.inspect(tmp_path / "t")
    assert (found.state, found.planned_steps) == ("cut short", 200)
    assert "cut short: 200 steps were planned" in said(tmp_path / "t")
    assert "lr 0.5" in said(tmp_path / "t")
    assert "record_every 10" in said(tmp_path / "t")  # not the default


def test_a_recorder_with_chosen_rows_and_every_third_step(tmp_path: Path) -> None:
    record(tmp_path / "t", rows={"w": [1, 3]}, every=3)
    found = info.inspect(tmp_path / "t")
    assert (found.written_by, found.state, found.every, found.last_step) == ("bhfast.Recorder", "ended", 3, 6)
    rows = {x.name: x.rows for x in found.tensors}
    assert (rows["w"], rows["w.exp_avg"], rows["b"], rows["loss"]) == (2, 2, None, None)
    assert "0 to 6, every 3; 3 records" in said(tmp_path / "t")
    assert "2 chosen rows" in said(tmp_path / "t")
    assert "how many steps were planned is not recorded" in said(tmp_path / "t")


def test_a_compact_trace(run: TrainResult, tmp_path: Path) -> None:
    compact.compact(run.path, tmp_path / "t", keyframes=50)
    found = info.inspect(tmp_path / "t")
    assert found.keyframes == 50
    assert [x.name for x in found.tensors if x.rebuilt] == ["embeddings", "momentum", "variance"]
    stored = open_trace(tmp_path / "t")
    assert found.bytes == sum(x.nbytes for name, x in stored.items() if name not in stored.rebuilt)
    assert "compact: parameters and moments at every 50th record" in said(tmp_path / "t")


def test_an_index(tmp_path: Path) -> None:
    record(tmp_path / "t")
    index = shard(tmp_path / "t")
    found = info.inspect(index)
    assert (found.kind, found.state, found.records, found.record_checksums) == ("index", "ended", 7, True)
    assert [Path(file.path).name for file in found.files] == [f"run-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert next(x.shape for x in found.tensors if x.name == "w") == [7, 5, 8]
    assert found.optimizer["name"] == "FusedAdam"
    assert "2 files, a trace of bhfast.Recorder" in said(index)


def test_a_trace_in_parts(tmp_path: Path) -> None:
    param = nn.Parameter(torch.randn(5, 8).bfloat16())
    optimizer = FusedAdam([param])
    for is_more in (False, True):
        with Recorder(optimizer, {"w": param}, path=tmp_path / "t.safetensors", append=is_more):
            for _ in range(4):
                param.grad = torch.ones_like(param)
                optimizer.step()
    found = info.inspect(tmp_path / "t.safetensors")
    assert (found.kind, found.records, found.last_step) == ("series", 9, 8)
    assert [file.records for file in found.files] == [5, 5]
    assert found.optimizer["name"] == "FusedAdam"
    assert "2 parts, a trace" in said(tmp_path / "t.safetensors")
    assert (found.record_checksums, found.header_checksum) == (True, True)


def test_a_run_that_goes_on_and_one_that_was_killed(tmp_path: Path) -> None:
    path, partial_ = tmp_path / "t", tmp_path / "t.partial"
    seen = []

    def look(step: int, recorder: Recorder) -> None:
        if step == 40:
            while not recorder.stats().committed:
                pass
            seen.append(info.inspect(partial_))
            assert "its run is going on" in said(partial_)

    record_streaming(path, 50, commit_seconds=0.0, after_step=look)
    (found,) = seen
    assert (found.kind, found.state, found.record_checksums) == ("partial", "going on", False)
    assert 0 < found.records <= 41
    assert found.bytes < info.inspect(path).bytes
    assert info.inspect(path).state == "ended"

    def die(step: int, recorder: Recorder) -> None:
        if step > 40 and recorder.stats().committed > 5:
            os.kill(os.getpid(), signal.SIGKILL)

    os.remove(path)
    assert status_of(fork(partial(record_streaming, path, 9999, commit_seconds=0.0, after_step=die))) == -signal.SIGKILL
    found = info.inspect(partial_)
    assert (found.kind, found.state) == ("partial", "killed")
    assert found.records > 5
    assert f"bhfast recover {partial_}" in said(partial_)
    assert "in the journal" in said(partial_)


def test_asking_for_a_writer_disturbs_none(tmp_path: Path) -> None:
    path = tmp_path / "t.partial"
    assert not is_locked(path)
    path.touch()
    assert not is_locked(path)
    fd = lock(path)
    assert is_locked(path)
    unlock(fd)
    assert not is_locked(path)
    asked = os.open(path, os.O_RDONLY)  # as if a reader were stopped right then
    fcntl.flock(asked, fcntl.LOCK_SH)
    threading.Timer(0.01, os.close, [asked]).start()
    unlock(lock(path))


# ---------------------------------------------------------------------------------------------------------------------
# Files of other programs, and damaged ones


def test_the_notebooks_file(tmp_path: Path) -> None:
    found = info.inspect(notebook_file(tmp_path / "t", bad=torch.tensor(math.inf)))
    assert (found.state, found.written_by, found.records, found.every) == (None, None, 3, 1)
    assert found.scalars == {"sigma": 0.25, "init_scale": 0.25, "adam_beta1": 0.25, "bad": "inf"}
    assert [text.split(":")[0] for text in found.missing] == [
        "no description of the optimizer",
        "no checksums",
        "no settings, engine, versions, corpus",
    ]
    text = said(tmp_path / "t")
    assert "a safetensors file of another program" in text
    assert "sigma 0.25" in text
    assert "missing    no checksums: damaged data cannot be found" in text


def test_any_safetensors_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3)}, tmp_path / "t", {"optimizer": '{"params": 7}', "config": '{"steps": 3}'})
    found = info.inspect(tmp_path / "t")
    assert (found.records, found.settings, found.optimizer, found.planned_steps) == (None, {}, {}, None)
    assert found.missing[0].startswith("no recorded_steps")
    save_file({"recorded_steps": torch.tensor([0, 1, 4])}, tmp_path / "t")
    found = info.inspect(tmp_path / "t")
    assert (found.records, found.last_step, found.every) == (3, 4, None)
    save_file({"recorded_steps": torch.zeros(2, 3)}, tmp_path / "t")
    assert info.inspect(tmp_path / "t").records is None


def test_damage_is_one_line_and_status_2(run: TrainResult, copy_of_run: Path, tmp_path: Path, capsys) -> None:
    content = run.path.read_bytes()
    at = content.index(b'"seed"')
    copy_of_run.write_bytes(content[:at] + b'"sEEd"' + content[at + 6 :])
    with pytest.raises(DamageError, match="its header is not the one that was written"):
        info.inspect(copy_of_run)
    copy_of_run.write_bytes(content[:-1])
    with pytest.raises(DamageError, match="is truncated"):
        info.inspect(copy_of_run)
    for path, what in ((copy_of_run, "is truncated"), (tmp_path / "gone", "cannot open"), (tmp_path, "cannot open")):
        assert info.main([str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("bhfast info: error: ")
        assert what in err
        assert err.count("\n") == 1


def test_settings_that_fit_nothing_are_damage(run: TrainResult, tmp_path: Path) -> None:
    deep = "[" * 30 + "]" * 30
    for key, text in (("config", f'{{"lr": {deep}}}'), ("keyframes", "x"), ("optimizer", '{"params": 7}')):
        trace = open_trace(run.path)
        rewrite(tmp_path / "t", dict(trace), {**trace.metadata, key: text})
        with pytest.raises(DamageError, match="is corrupted"):
            info.inspect(tmp_path / "t")


def test_no_control_character_reaches_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From names of files, tensors and settings, from metadata, or from errors that name them."""
    assert printable("wörter × 1\u3000") == "wörter × 1\\u3000"
    assert printable(NASTY) == r"\x1b]0;owned\x07w\n\u202e\x9b2J\x7f"
    path = tmp_path / f"run{NASTY}.safetensors"
    record(path, metadata={"engine": NASTY, "corpus": NASTY, "config": json.dumps({NASTY: NASTY, "seed": [NASTY]})})
    trace = open_trace(path)
    rewrite(path, {**trace, NASTY: torch.tensor(1.0)}, {**trace.metadata, "torch_version": NASTY})
    for arguments in ([], ["--json"]):
        assert info.main([str(path), *arguments]) == 0
        assert_clean(capsys.readouterr().out)
    verify.main([str(path)])
    assert_clean(capsys.readouterr().out)
    header, data = split(path.read_bytes())
    header[NASTY]["data_offsets"] = [NASTY]
    path.write_bytes(joined(header, data))
    for program in (info, verify):
        assert program.main([str(path)]) in (1, 2)
        err = capsys.readouterr().err
        assert r"the header's entry for \x1b]0;owned" in err
        assert_clean(err)
        assert err.count("\n") == 1


def assert_clean(text: str) -> None:
    assert all(x.isprintable() or x == "\n" for x in text)
    assert "owned" in text


# ---------------------------------------------------------------------------------------------------------------------
# The JSON


@pytest.mark.skipif(not DOCUMENT.exists(), reason="this copy of the tree has no docs/")
def test_the_json_has_all_that_is_documented(run: TrainResult, tmp_path: Path, capsys) -> None:
    assert info.main([str(run.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    page = DOCUMENT.read_text()
    for key in (*found, *found["files"][0], *found["tensors"][0], *found["optimizer"]):
        assert f"`{key}`" in page, key


def test_numbers_that_are_not_finite_are_strings(text: str, tmp_path: Path, capsys) -> None:
    config = TrainConfig(steps=2, max_grad_norm=math.inf, corpus=text, out=str(tmp_path / "t"), quiet=True)
    train.train(config)
    assert info.main([str(tmp_path / "t"), "--json"]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(capsys.readouterr().out, parse_constant=refuse)["settings"]["max_grad_norm"] == "inf"


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file to write, and the content of a small trace."""
    folder = tmp_path_factory.mktemp("fuzz")
    record(folder / "t.safetensors", steps=3, metadata={"config": '{"steps": 3, "record_every": 1}'}, keyframes=2)
    return folder / "t.safetensors", (folder / "t.safetensors").read_bytes()


@fuzzed(150)
@given(changes=st.one_of(CHANGES, HEADER_CHANGES), key=st.sampled_from(["config", "optimizer", "keyframes"]), junk=JUNK)
def test_any_file_ends_in_text_or_in_a_line(fuzz: tuple[Path, bytes], changes: list, key: str, junk: object) -> None:
    path, content = fuzz
    if len(changes[0]) == 3:
        content = mutated(content, changes)
    else:
        header, data = split(content)
        header["__metadata__"][key] = json.dumps(junk).encode(errors="replace").decode()
        for change in changes:
            change_header(header, *change)
        content = joined(header, data, is_sealed=isinstance(header["__metadata__"], dict))
    path.unlink()
    path.write_bytes(content)
    try:
        found = info.inspect(path)
    except TraceError as error:
        event("error")
        said = str(error)
        assert str(path) in said
        return
    assert json.loads(info.as_json(found))["path"] == str(path)
    assert all(map(str.isprintable, info.text_lines(found)))
