"""Corpora: text as ASCII bytes, and the windows that a run reads from it.

python -m bhfast.corpus gatsby --out data/gatsby_clean.txt               downloads The Great Gatsby and cleans it
python -m bhfast.corpus gatsby --raw 64317-0.txt --out gatsby_clean.txt  cleans a file you have
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bhfast.cli import run_program
from bhfast.errors import ConfigError, CorpusError

GATSBY_URL = "https://www.gutenberg.org/files/64317/64317-0.txt"
GATSBY_SHA256 = "c774efbbdbbd41711bdab8bf79f37f3451606da188b13d1a472f1f7e0a2ce931"
GATSBY_PATH = Path("data/gatsby_clean.txt")
BUILTIN_NAME = "night_log.txt"


@dataclass(frozen=True)
class Corpus:
    """A text to train on.

    Attributes:
        name: human-readable: where the text came from.
        data: uint8 ``[bytes]``.
        sha256: of the bytes, in hexadecimal.
    """

    name: str
    data: Tensor
    sha256: str


def load_corpus(path: str | os.PathLike[str] | None, *, vocab_size: int, window: int) -> Corpus:
    """Load the corpus ``path``. If that is None, load ``data/gatsby_clean.txt`` if it exists, else the built-in corpus.

    Args:
        path: a text file, or None.
        vocab_size: every byte must be below this.
        window: the corpus must have at least this many bytes.

    Raises:
        CorpusError: the file is missing, empty, shorter than a window, or has a byte outside the vocabulary.
    """
    if path is not None:
        name, path = str(path), Path(path)
    elif GATSBY_PATH.is_file():
        name, path = f"{GATSBY_PATH} (The Great Gatsby)", GATSBY_PATH
    else:
        name, path = f"{BUILTIN_NAME} (built in)", builtin_path()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read the corpus {path}: {error.strerror}; name a text file with --corpus") from None
    if len(raw) < window:
        raise CorpusError(
            f"the corpus {path} is too short: it has {len(raw)} bytes, one window takes {window}; "
            "use a longer text, or a smaller --context"
        )
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    if (top := int(data.max())) >= vocab_size:
        at = int((data >= vocab_size).nonzero()[0])
        raise CorpusError(
            f"the corpus {path} has byte {int(data[at])} at position {at}, but vocab_size is {vocab_size}; "
            f"clean the text, or set --vocab-size to {top + 1} or more"
        )
    return Corpus(name, data, hashlib.sha256(raw).hexdigest())


def builtin_path() -> Path:
    """Return the path of the built-in corpus: in the installed package, or next to it in a checkout."""
    package = Path(__file__).parent
    installed = package / "data" / BUILTIN_NAME
    return installed if installed.is_file() else package.parent / "data" / BUILTIN_NAME


def window_offsets(corpus_size: int, window: int, count: int, seed: int) -> Tensor:
    """Return where each of ``count`` windows starts: all starts in random order, reshuffled when they are used up.

    Args:
        corpus_size: bytes in the corpus.
        window: bytes in a window.
        count: how many windows.
        seed: the order depends only on this and the sizes.

    Returns:
        int64 ``[count]``.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = corpus_size - window + 1
    epochs = [torch.randperm(starts, generator=generator) for _ in range(-(-count // starts))]
    return torch.cat(epochs)[:count]


# ---------------------------------------------------------------------------------------------------------------------
# The Great Gatsby


def clean_gutenberg(raw: str) -> str:
    """Return a Project Gutenberg text as plain ASCII, without the license around it, one paragraph per line.

    Raises:
        CorpusError: the START or END marker is missing.
        ConfigError: the unidecode library is not installed.
    """
    try:
        from unidecode import unidecode
    except ImportError:
        raise ConfigError("cleaning a book needs the unidecode library: pip install unidecode") from None
    body = re.search(r"\*\*\* ?START OF.*?\*\*\*(.*)\*\*\* ?END OF", raw, flags=re.DOTALL)
    if body is None:
        raise CorpusError("the raw file has no Project Gutenberg START and END markers; is it 64317-0.txt?")
    paragraphs = re.split(r"\n\s*\n", body[1].strip())
    return unidecode("\n".join(" ".join(line.strip() for line in paragraph.splitlines()) for paragraph in paragraphs))


def download(url: str) -> str:
    """Download a UTF-8 text.

    Raises:
        CorpusError: there is no network, or no file at that address.
    """
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return response.read().decode("utf-8-sig")
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise CorpusError(
            f"cannot download {url}: {reason}; on a machine without a network, fetch the file elsewhere and pass it "
            "with --raw FILE"
        ) from None


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="bhfast corpus", description="Make a corpus to train on.")
    books = parser.add_subparsers(dest="book", required=True, metavar="BOOK")
    gatsby = books.add_parser("gatsby", help="The Great Gatsby, Project Gutenberg eBook 64317")
    gatsby.add_argument("--raw", type=Path, metavar="FILE", help="the raw 64317-0.txt (default: download it)")
    gatsby.add_argument("--out", type=Path, metavar="FILE", default=GATSBY_PATH, help="default: %(default)s")
    return run_program(parser, _make_gatsby, argv)


def _make_gatsby(args: argparse.Namespace) -> int:
    raw = download(GATSBY_URL) if args.raw is None else _read(args.raw)
    clean = clean_gutenberg(raw).encode("ascii")
    _write(args.out, clean)
    digest = hashlib.sha256(clean).hexdigest()
    print(f"{args.out}: {len(clean):,} bytes, {len(set(clean))} of 128 bytes occur, SHA-256 {digest}")
    if digest != GATSBY_SHA256:
        print(f"note: these are not the reference bytes (SHA-256 {GATSBY_SHA256}): the source text is different")
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}; name the raw file with --raw") from None
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise CorpusError(f"cannot write {path}: {error.strerror}; choose another place with --out") from None


if __name__ == "__main__":
    sys.exit(main())
