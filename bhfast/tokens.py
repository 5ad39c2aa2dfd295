"""What a run reads: the tokens of its corpus, the windows it takes from it, and subsets of its vocabulary."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bhfast.errors import ConfigError, CorpusError

GATSBY_PATH = Path("data/gatsby_clean.txt")
BUILTIN_NAME = "night_log.txt"
TOKEN_FILES = (".npy", ".bin", ".safetensors")


@dataclass(frozen=True)
class Corpus:
    """A sequence of tokens to train on.

    Attributes:
        name: human-readable: where the tokens came from.
        data: token ids ``[tokens]``: the bytes of a text as uint8, other tokens as int32.
        sha256: of ``data``, in hexadecimal.
        counts: how often each token of the vocabulary occurs, int64 ``[V]``.
        strings: what each token of the vocabulary stands for; None if that is not known, or if tokens are bytes.
    """

    name: str
    data: Tensor
    sha256: str
    counts: Tensor
    strings: list[str] | None = None

    @property
    def unit(self) -> str:
        """What its tokens are: bytes or tokens."""
        return "bytes" if self.data.dtype == torch.uint8 else "tokens"


def load_corpus(
    path: str | os.PathLike[str] | None,
    *,
    vocab_size: int,
    window: int,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Load the corpus ``path``. If that is None, load ``data/gatsby_clean.txt`` if it exists, else the built-in corpus.

    A text is a sequence of bytes, or with a tokenizer of its tokens. Files of token ids are known by their suffix:
    ``.npy`` (any integers, one axis), ``.bin`` (little-endian uint16, or uint32 if every second uint16 is 0) and
    ``.safetensors`` (one tensor of integers, or the one called ``tokens``).

    Args:
        path: a text, a file of token ids, or None.
        vocab_size: every token must be below this.
        window: the corpus must have at least this many tokens.
        tokenizer: a ``tokenizer.json`` of Hugging Face's tokenizers. Of a file of token ids it gives the strings.

    Raises:
        CorpusError: a file is missing, empty, shorter than a window, not of integers, or has a token outside the
            vocabulary.
        ConfigError: a tokenizer is given, but the tokenizers library is not installed.
    """
    if path is not None:
        name, path = str(path), Path(path)
    elif GATSBY_PATH.is_file():
        name, path = f"{GATSBY_PATH} (The Great Gatsby)", GATSBY_PATH
    else:
        name, path = f"{BUILTIN_NAME} (built in)", builtin_path()
    encoder = None if tokenizer is None else load_tokenizer(tokenizer, vocab_size)
    if path.suffix in TOKEN_FILES:
        data = torch.from_numpy(read_tokens(path))
    elif encoder is not None:
        data = torch.tensor(encode(encoder, path), dtype=torch.int32)
    else:
        data = torch.from_numpy(np.frombuffer(_read_bytes(path), np.uint8).copy())
    unit = "bytes" if data.dtype == torch.uint8 else "tokens"
    if len(data) < window:
        raise CorpusError(
            f"the corpus {path} is too short: it has {len(data)} {unit}, one window takes {window}; "
            "use a longer text, or a smaller --context"
        )
    if (top := int(data.max())) >= vocab_size or int(data.min()) < 0:
        at = int(((data >= vocab_size) | (data < 0)).nonzero()[0])
        raise CorpusError(
            f"the corpus {path} has {unit[:-1]} {int(data[at])} at position {at}, but vocab_size is {vocab_size}; "
            f"{'clean the text, or ' if unit == 'bytes' else ''}set --vocab-size to {top + 1} or more"
        )
    data = data if unit == "bytes" else data.to(torch.int32)
    sha256 = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    counts = torch.from_numpy(np.bincount(data.numpy(), minlength=vocab_size))
    return Corpus(name, data, sha256, counts, None if encoder is None else token_strings(encoder, vocab_size))


def builtin_path() -> Path:
    """Return the path of the built-in corpus: in the installed package, or next to it in a checkout."""
    package = Path(__file__).parent
    installed = package / "data" / BUILTIN_NAME
    return installed if installed.is_file() else package.parent / "data" / BUILTIN_NAME


def read_tokens(path: Path) -> np.ndarray:
    """Return the token ids of a file, int64 ``[tokens]``; see :func:`load_corpus`.

    Raises:
        CorpusError: the file cannot be read, or is not of integers.
    """
    if path.suffix == ".bin":
        raw = _read_bytes(path)
        if len(raw) % 2:
            raise CorpusError(f"the corpus {path} has {len(raw)} bytes, which is not a whole number of uint16 tokens")
        found = np.frombuffer(raw, "<u2")
        if len(raw) % 4 == 0 and not found[1::2].any():
            found = np.frombuffer(raw, "<u4")
    elif path.suffix == ".npy":
        try:
            found = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise CorpusError(f"cannot read the corpus {path}: {_first_line(error)}") from None
    else:
        found = _read_safetensors(path)
    if found.ndim != 1 or found.dtype.kind not in "ui":
        raise CorpusError(
            f"the corpus {path} must have integers along one axis, got {found.dtype} {list(found.shape)}; "
            "tokens are their ids"
        )
    return found.astype(np.int64)


def _read_safetensors(path: Path) -> np.ndarray:
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
            name = names[0] if len(names) == 1 else "tokens"
            if name not in names:
                raise CorpusError(f"the corpus {path} has {len(names)} tensors, none of them called tokens")
            return file.get_tensor(name)
    except (OSError, SafetensorError, TypeError) as error:
        raise CorpusError(f"cannot read the corpus {path}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).partition("\n")[0]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read the corpus {path}: {error.strerror}; name a text file with --corpus") from None


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> Any:
    """Return the ``tokenizers.Tokenizer`` of a ``tokenizer.json``.

    Raises:
        ConfigError: the tokenizers library is not installed.
        CorpusError: the file is not a tokenizer, or has more tokens than the vocabulary.
    """
    tokenizers = require_tokenizers()
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise CorpusError(f"cannot read the tokenizer {path}: {_first_line(error)}") from None
    if (size := max(tokenizer.get_vocab().values(), default=-1) + 1) > vocab_size:
        raise CorpusError(f"the tokenizer {path} has {size} tokens, but vocab_size is {vocab_size}; set --vocab-size")
    return tokenizer


def require_tokenizers() -> Any:
    """Return the tokenizers library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("this needs the tokenizers library: pip install tokenizers") from None
    return tokenizers


def encode(tokenizer: Any, path: Path) -> list[int]:
    """Return the token ids of a UTF-8 text, without special tokens.

    Raises:
        CorpusError: the file cannot be read, or is not UTF-8.
    """
    raw = _read_bytes(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return tokenizer.encode(text, add_special_tokens=False).ids


def token_strings(tokenizer: Any, vocab_size: int) -> list[str]:
    """Return what each token stands for; tokens that are part of a character, by their name in the tokenizer."""
    names = [tokenizer.id_to_token(i) or "" for i in range(vocab_size)]
    texts = tokenizer.decode_batch([[i] for i in range(vocab_size)], skip_special_tokens=False)
    return [name if not text or "\ufffd" in text else text for name, text in zip(names, texts, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the corpus and of the vocabulary


def window_offsets(corpus_size: int, window: int, count: int, seed: int) -> Tensor:
    """Return where each of ``count`` windows starts: all starts in random order, reshuffled when they are used up.

    Args:
        corpus_size: tokens in the corpus.
        window: tokens in a window.
        count: how many windows.
        seed: the order depends only on this and the sizes.

    Returns:
        int64 ``[count]``.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = corpus_size - window + 1
    epochs = [torch.randperm(starts, generator=generator) for _ in range(-(-count // starts))]
    return torch.cat(epochs)[:count]


def chosen_tokens(setting: str, text: str, counts: Tensor) -> Tensor:
    """Return the tokens that a setting names.

    Args:
        setting: its name, for error messages.
        text: ``dead`` for tokens that do not occur in the corpus, ``live`` for those that do, ``all``; ids and ranges
            such as ``1,2,5-9``; or a file: ``.npy`` with ids or a bool mask ``[V]``, or a text of ids and ranges.
        counts: how often each token occurs, ``[V]``.

    Returns:
        int64 ``[n]``, in increasing order.

    Raises:
        ConfigError: there is no such token, or the text is none of these.
    """
    size = len(counts)
    if text in ("dead", "live", "all"):
        found = {"dead": counts == 0, "live": counts > 0, "all": counts >= 0}[text].nonzero()[:, 0]
        if not len(found):
            raise ConfigError(f"{setting}: no token of the {size} is {text} in this corpus")
        return found
    if Path(text).suffix == ".npy":
        found = _tokens_of_array(setting, Path(text), size)
    else:
        found = _tokens_of_text(setting, text)
    if not len(found):
        raise ConfigError(f"{setting} must name at least one token, got {text!r}")
    if not (0 <= int(found.min()) and int(found.max()) < size):
        raise ConfigError(f"{setting} must be 0 to {size - 1}, got {int(found.min())} to {int(found.max())}")
    return found.unique()


def _tokens_of_array(setting: str, path: Path, size: int) -> Tensor:
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{setting}: cannot read {path}: {_first_line(error)}") from None
    if found.dtype == bool and found.shape == (size,):
        found = found.nonzero()[0]
    if found.ndim != 1 or found.dtype.kind not in "ui":
        raise ConfigError(
            f"{setting}: {path} must have token ids along one axis, or a bool mask [{size}], "
            f"got {found.dtype} {list(found.shape)}"
        )
    return torch.from_numpy(found.astype(np.int64))


def _tokens_of_text(setting: str, text: str) -> Tensor:
    source = text
    if Path(text).is_file():
        try:
            source = Path(text).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{setting}: cannot read {text}: {_first_line(error)}") from None
    found: list[int] = []
    for part in source.replace(",", " ").split():
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ConfigError(
                f"{setting} must be dead, live, all, ids and ranges such as 1,2,5-9, or a file of them; got {part!r}"
                + (f" in {text}" if source is not text else "")
            )
        found += range(int(first), int(last or first) + 1)
    return torch.tensor(found, dtype=torch.int64)
