"""Makes corpora to train on.

python -m bhfast.corpus gatsby --out data/gatsby_clean.txt               downloads The Great Gatsby and cleans it
python -m bhfast.corpus gatsby --raw 64317-0.txt --out gatsby_clean.txt  cleans a file you have
python -m bhfast.corpus train-tokenizer TEXT --vocab 10000 --on PART     makes a tokenizer, and the tokens of PART
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from bhfast.cli import run_program
from bhfast.errors import ConfigError, CorpusError
from bhfast.tokens import GATSBY_PATH, encode, load_tokenizer, require_tokenizers

GATSBY_URL = "https://www.gutenberg.org/files/64317/64317-0.txt"
TOKENIZER_PATH = Path("data/tokenizer.json")
GATSBY_SHA256 = "c774efbbdbbd41711bdab8bf79f37f3451606da188b13d1a472f1f7e0a2ce931"


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


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def train_tokenizer(text: Path, vocab_size: int, out: Path) -> None:
    """Train a byte-level BPE tokenizer, as GPT-2's is, and write it as a ``tokenizer.json``.

    Its first 256 tokens are the bytes, so that it can encode any text.

    Args:
        text: UTF-8.
        vocab_size: number of tokens, at least 256.
        out: the file to write.

    Raises:
        ConfigError: the tokenizers library is not installed, or the size is too small.
        CorpusError: the text cannot be read, or has too few different words for so many tokens.
    """
    tokenizers = require_tokenizers()
    if vocab_size < 256:
        raise ConfigError(f"--vocab must be at least 256, one token for each byte, got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_read(text).splitlines(keepends=True), trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        raise CorpusError(f"{text} is too short for {vocab_size} tokens: it gives {size}; use a longer text")
    _write(out, tokenizer.to_str(pretty=True).encode())


def _train_tokenizer(args: argparse.Namespace) -> int:
    train_tokenizer(args.text, args.vocab, args.out)
    print(f"{args.out}: {args.vocab:,} tokens")
    if args.on is not None:
        tokens = np.array(encode(load_tokenizer(args.out, args.vocab), args.on))
        dead = args.vocab - len(np.unique(tokens))
        path = args.on.with_suffix(".npy")
        buffer = io.BytesIO()
        np.save(buffer, tokens.astype(np.uint16 if args.vocab <= 1 << 16 else np.uint32))
        _write(path, buffer.getvalue())
        print(f"{path}: {len(tokens):,} tokens; {dead:,} of the {args.vocab:,} never occur")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The program


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="bhfast corpus", description="Make a corpus to train on.")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    gatsby = kinds.add_parser("gatsby", help="The Great Gatsby, Project Gutenberg eBook 64317")
    gatsby.add_argument("--raw", type=Path, metavar="FILE", help="the raw 64317-0.txt (default: download it)")
    gatsby.add_argument("--out", type=Path, metavar="FILE", default=GATSBY_PATH, help="default: %(default)s")
    gatsby.set_defaults(make=_make_gatsby)
    tokenizer = kinds.add_parser("train-tokenizer", help="a byte-level BPE tokenizer, trained on a text")
    tokenizer.add_argument("text", type=Path, metavar="TEXT", help="UTF-8 text to train it on")
    tokenizer.add_argument("--vocab", type=int, default=10_000, help="number of tokens (default: %(default)s)")
    tokenizer.add_argument(
        "--on",
        type=Path,
        metavar="PART",
        help="a text that a model will see: write its tokens to PART with the suffix .npy, and count those that never "
        "occur; if TEXT is larger than PART, these are the dead ones",
    )
    tokenizer.add_argument("--out", type=Path, metavar="FILE", default=TOKENIZER_PATH, help="default: %(default)s")
    tokenizer.set_defaults(make=_train_tokenizer)
    return run_program(parser, lambda args: args.make(args), argv)


def _make_gatsby(args: argparse.Namespace) -> int:
    raw = download(GATSBY_URL) if args.raw is None else _read(args.raw, "; name the raw file with --raw")
    clean = clean_gutenberg(raw).encode("ascii")
    _write(args.out, clean)
    digest = hashlib.sha256(clean).hexdigest()
    print(f"{args.out}: {len(clean):,} bytes, {len(set(clean))} of 128 bytes occur, SHA-256 {digest}")
    if digest != GATSBY_SHA256:
        print(f"note: these are not the reference bytes (SHA-256 {GATSBY_SHA256}): the source text is different")
    return 0


def _read(path: Path, hint: str = "") -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}{hint}") from None
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
