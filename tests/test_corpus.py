"""Corpora: the built-in text, cleaning, windows, errors."""

from __future__ import annotations

import hashlib
import os
import runpy
import urllib.error
from pathlib import Path

import pytest
import torch

from bhfast import corpus, tokens
from bhfast.errors import ConfigError, CorpusError

ROOT = Path(__file__).parent.parent
RAW = """\ufeffThe Project Gutenberg eBook
*** START OF THE PROJECT GUTENBERG EBOOK TEST ***


   A Title
     by
   Someone

First line—with a dash,
second line.  Two spaces.

“Quoted,” said café.

*** END OF THE PROJECT GUTENBERG EBOOK TEST ***
licence
"""
CLEAN = 'A Title by Someone\nFirst line--with a dash, second line.  Two spaces.\n"Quoted," said cafe.'


def test_builtin_corpus_is_what_its_generator_writes() -> None:
    text = runpy.run_path(str(ROOT / "data" / "make_night_log.py"))["night_log"]()
    assert (ROOT / "data" / tokens.BUILTIN_NAME).read_text(encoding="ascii") == text


def test_builtin_corpus_suits_the_experiment() -> None:
    data = tokens.load_corpus(str(tokens.builtin_path()), vocab_size=128, window=129).data
    assert len(data) >= 256 * 1024
    assert 40 <= 128 - len(data.unique()) <= 50


def test_cleans_a_gutenberg_text() -> None:
    pytest.importorskip("unidecode", reason="needs the corpus extra: unidecode")
    assert corpus.clean_gutenberg(RAW) == CLEAN
    assert corpus.clean_gutenberg(RAW.replace("\n", "\r\n")) == CLEAN


def test_makes_the_reference_bytes_of_gatsby(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("unidecode", reason="needs the corpus extra: unidecode")
    raw = os.environ.get("BHFAST_GATSBY_RAW", "")
    if not raw:
        pytest.skip("set BHFAST_GATSBY_RAW to the raw 64317-0.txt; the project does not ship the book")
    out = tmp_path / "folder" / "gatsby.txt"
    assert corpus.main(["gatsby", "--raw", raw, "--out", str(out)]) == 0
    assert out.stat().st_size == 268_928
    assert hashlib.sha256(out.read_bytes()).hexdigest() == corpus.GATSBY_SHA256
    assert "note" not in capsys.readouterr().out


def test_program_says_when_the_source_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("unidecode", reason="needs the corpus extra: unidecode")
    (tmp_path / "raw").write_text(RAW, encoding="utf-8")
    assert corpus.main(["gatsby", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == CLEAN
    assert "these are not the reference bytes" in capsys.readouterr().out


def test_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "raw.txt"
    source.write_text(RAW, encoding="utf-8")
    assert corpus.download(source.as_uri()).startswith("The Project")


def test_says_what_to_do_without_a_network(monkeypatch, capsys, tmp_path: Path) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(corpus.urllib.request, "urlopen", no_network)
    assert corpus.main(["gatsby", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "cannot download" in error
    assert "pass it with --raw FILE" in error
    assert not (tmp_path / "out").exists()


def test_refuses_other_raw_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("unidecode", reason="needs the corpus extra: unidecode")
    raw, out = tmp_path / "raw", str(tmp_path / "out")
    assert corpus.main(["gatsby", "--raw", str(raw), "--out", out]) == 2
    assert "name the raw file with --raw" in capsys.readouterr().err
    raw.write_text("no markers")
    assert corpus.main(["gatsby", "--raw", str(raw), "--out", out]) == 2
    assert "START and END markers" in capsys.readouterr().err
    raw.write_bytes(b"\xff\xff\xff")
    assert corpus.main(["gatsby", "--raw", str(raw), "--out", out]) == 2
    assert "is not UTF-8 text" in capsys.readouterr().err
    raw.write_text(RAW)
    assert corpus.main(["gatsby", "--raw", str(raw), "--out", str(tmp_path)]) == 2
    assert "choose another place with --out" in capsys.readouterr().err


def test_says_that_unidecode_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(corpus.sys.modules, "unidecode", None)
    with pytest.raises(ConfigError, match="pip install unidecode"):
        corpus.clean_gutenberg(RAW)


def test_prefers_gatsby_if_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tokens.load_corpus(None, vocab_size=128, window=129).name == "night_log.txt (built in)"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gatsby_clean.txt").write_bytes(b"x" * 200)
    found = tokens.load_corpus(None, vocab_size=128, window=129)
    assert found.name == "data/gatsby_clean.txt (The Great Gatsby)"
    assert found.sha256 == hashlib.sha256(b"x" * 200).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the corpus .*: No such file or directory; name a text file with --corpus"),
        (b"", "is too short: it has 0 bytes, one window takes 129"),
        (b"x" * 128, "is too short: it has 128 bytes, one window takes 129; use a longer text, or a smaller --context"),
        (b"x" * 200 + b"\xe9", "has byte 233 at position 200, but vocab_size is 128; .* set --vocab-size to 234"),
    ],
)
def test_refuses_bad_corpora(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        tokens.load_corpus(path, vocab_size=128, window=129)


def test_windows_are_drawn_without_replacement_and_reshuffled() -> None:
    offsets = tokens.window_offsets(corpus_size=20, window=11, count=25, seed=3)
    assert offsets.dtype == torch.int64
    first, second, rest = offsets.split(10)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert first.tolist() != second.tolist()
    assert len(rest) == 5
    assert torch.equal(tokens.window_offsets(20, 11, 7, 3), offsets[:7])
    assert not torch.equal(tokens.window_offsets(20, 11, 25, 4), offsets)
