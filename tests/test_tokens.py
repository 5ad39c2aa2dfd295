"""Token ids from files and tokenizers, and the tokens that a setting names."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bhfast import corpus
from bhfast.errors import ConfigError, CorpusError
from bhfast.tokens import chosen_tokens, load_corpus, load_tokenizer

IDS = np.array([3, 0, 299, 7, 3, 3, 65_535, 12], np.int64)
SIZE = 65_536


def written(path: Path) -> Path:
    """Write ``IDS`` to ``path``, in the format that its name asks for."""
    kind = path.stem
    if path.suffix == ".npy":
        np.save(path, IDS.astype(kind))
    elif path.suffix == ".bin":
        path.write_bytes(IDS.astype({"uint16": "<u2", "uint32": "<u4"}[kind]).tobytes())
    else:
        more = {"other": np.zeros(3, np.float32)} if kind == "two" else {}
        save_file({"tokens" if more else "any": IDS.astype(np.int32), **more}, path)
    return path


@pytest.mark.parametrize(
    "name", ["uint16.npy", "uint32.npy", "int64.npy", "uint16.bin", "uint32.bin", "one.safetensors", "two.safetensors"]
)
def test_reads_token_files(name: str, tmp_path: Path) -> None:
    found = load_corpus(written(tmp_path / name), vocab_size=SIZE, window=8)
    assert found.data.dtype == torch.int32
    assert found.data.tolist() == IDS.tolist()
    assert found.unit == "tokens"
    assert found.counts[[0, 3, 12, 1]].tolist() == [1, 3, 1, 0]
    assert len(found.counts) == SIZE
    assert found.strings is None
    assert found.sha256 == load_corpus(written(tmp_path / "int64.npy"), vocab_size=SIZE, window=8).sha256


def test_a_text_stays_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"hello")
    found = load_corpus(tmp_path / "a.txt", vocab_size=128, window=5)
    assert (found.data.dtype, found.unit, found.data.tolist()) == (torch.uint8, "bytes", list(b"hello"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.zeros(9, np.float32), r"must have integers along one axis, got float32 \[9\]"),
        ("a.npy", np.zeros((3, 3), np.int32), r"must have integers along one axis, got int32 \[3, 3\]"),
        ("a.npy", np.array([1, 2, 300] * 3), "has token 300 at position 2, but vocab_size is 300"),
        ("a.npy", np.array([1, -2, 3] * 3), "has token -2 at position 1"),
        ("a.npy", np.zeros(3, np.int32), "is too short: it has 3 tokens, one window takes 8"),
        ("a.npy", b"not numpy", "cannot read the corpus .*a.npy"),
        ("a.npy", None, "cannot read the corpus .*a.npy: No such file"),
        ("a.bin", b"123", "has 3 bytes, which is not a whole number of uint16 tokens"),
        ("a.bin", b"", "is too short: it has 0 tokens"),
        ("a.safetensors", b"123", "cannot read the corpus"),
        ("a.txt", b"", "is too short: it has 0 bytes"),
    ],
)  # fmt: skip
def test_refuses_what_is_not_tokens(name: str, content, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(path, vocab_size=300, window=8)


def test_refuses_tensors_without_a_name(tmp_path: Path) -> None:
    save_file({"a": IDS, "b": IDS}, tmp_path / "a.safetensors")
    with pytest.raises(CorpusError, match="has 2 tensors, none of them called tokens"):
        load_corpus(tmp_path / "a.safetensors", vocab_size=SIZE, window=8)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 tokens, trained on the text beside it; ``part.txt`` is the start of that text."""
    pytest.importorskip("tokenizers", reason="needs the tokenizers library")
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "The light on the dock, the café and the green light. " * 3 + "Orgastic futures recede before us. " * 20
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "part.txt").write_text(text[:159], encoding="utf-8")
    assert corpus.main(
        ["train-tokenizer", str(folder / "text.txt"), "--vocab", "300", "--on", str(folder / "part.txt"), "--out",
         str(folder / "tokenizer.json")]
    ) == 0  # fmt: skip
    return folder / "tokenizer.json"


def test_a_tokenizer_makes_tokens_of_a_text(tokenizer: Path) -> None:
    part = tokenizer.with_name("part.txt")
    found = load_corpus(part, vocab_size=310, window=8, tokenizer=tokenizer)
    assert found.strings is not None
    assert len(found.strings) == 310
    assert max(map(len, (found.strings[i] for i in found.data.tolist()))) > 1
    rebuilt = load_tokenizer(tokenizer, 300).decode(found.data.tolist())
    assert rebuilt == part.read_text(encoding="utf-8")
    assert found.data.tolist() == np.load(part.with_suffix(".npy")).tolist()
    assert not any("\ufffd" in text for text in found.strings)
    assert found.strings[300:] == [""] * 10


def test_a_larger_text_leaves_dead_tokens(tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tokenizer.with_name("part.txt")
    folder = tokenizer.parent
    args = [str(folder / "text.txt"), "--vocab", "300", "--on", str(part), "--out", str(folder / "again.json")]
    assert corpus.main(["train-tokenizer", *args]) == 0
    dead = 300 - len(np.unique(np.load(part.with_suffix(".npy"))))
    assert f"{dead} of the 300 never occur" in capsys.readouterr().out
    assert dead > 256 - 60
    assert (folder / "again.json").read_bytes() == tokenizer.read_bytes()


def test_a_token_file_may_have_strings(tokenizer: Path) -> None:
    found = load_corpus(tokenizer.with_name("part.npy"), vocab_size=300, window=8, tokenizer=tokenizer)
    assert found.strings is not None
    assert "".join(found.strings[i] for i in found.data.tolist()[:5]) in tokenizer.with_name("part.txt").read_text(
        "utf-8"
    )


def test_refuses_wrong_tokenizers(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tokenizer.with_name("part.txt")
    with pytest.raises(CorpusError, match="has 300 tokens, but vocab_size is 299; set --vocab-size"):
        load_corpus(part, vocab_size=299, window=8, tokenizer=tokenizer)
    with pytest.raises(CorpusError, match=r"cannot read the tokenizer .*part\.txt"):
        load_corpus(part, vocab_size=300, window=8, tokenizer=part)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match="is not UTF-8 text"):
        load_corpus(tmp_path / "a.txt", vocab_size=300, window=1, tokenizer=tokenizer)
    for args, message in (
        ([str(part), "--vocab", "255"], "--vocab must be at least 256"),
        ([str(part), "--vocab", "5000"], "is too short for 5000 tokens"),
        ([str(tmp_path / "no.txt")], "cannot read .*no.txt: No such file"),
    ):
        assert corpus.main(["train-tokenizer", *args, "--out", str(tmp_path / "out.json")]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.json").exists()


def test_the_library_may_be_missing(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match="needs the tokenizers library: pip install tokenizers"):
        load_corpus(tokenizer.with_name("part.txt"), vocab_size=300, window=8, tokenizer=tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens that a setting names

COUNTS = torch.tensor([2, 0, 1, 0, 0, 5, 0, 1])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("dead", [1, 3, 4, 6]),
        ("live", [0, 2, 5, 7]),
        ("all", list(range(8))),
        ("1,2,5-7", [1, 2, 5, 6, 7]),
        ("7 3, 3", [3, 7]),
        ("list.txt", [0, 4, 5]),
        ("ids.npy", [2, 6]),
        ("mask.npy", [1, 7]),
    ],
)
def test_chooses_tokens(text: str, wanted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("4-5\n0\n")
    np.save("ids.npy", np.array([6, 2], np.uint16))
    np.save("mask.npy", np.isin(np.arange(8), [1, 7]))
    assert chosen_tokens("rows", text, COUNTS).tolist() == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-8", "rows must be 0 to 7, got 0 to 8"),
        ("5-3", "got '5-3'"),
        ("deadly", "rows must be dead, live, all, ids and ranges such as 1,2,5-9, or a file of them; got 'deadly'"),
        ("-1", "got '-1'"),
        (",", "rows must name at least one token, got ','"),
        ("no.npy", "rows: cannot read no.npy: No such file"),
        ("floats.npy", r"must have token ids along one axis, or a bool mask \[8\], got float64 \[3\]"),
        ("mask.npy", r"or a bool mask \[8\], got bool \[5\]"),
        ("bad.txt", "got 'x' in bad.txt"),
    ],
)
def test_refuses_other_tokens(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("floats.npy", np.zeros(3))
    np.save("mask.npy", np.zeros(5, bool))
    Path("bad.txt").write_text("1 x")
    with pytest.raises(ConfigError, match=message):
        chosen_tokens("rows", text, COUNTS)


def test_there_may_be_no_dead_tokens() -> None:
    with pytest.raises(ConfigError, match="rows: no token of the 8 is dead in this corpus"):
        chosen_tokens("rows", "dead", COUNTS + 1)
