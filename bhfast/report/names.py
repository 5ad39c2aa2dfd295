"""What the tokens of a trace are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bhfast.errors import BhfastError
from bhfast.summary import Vectors
from bhfast.trace.format import REFERENCE_NAMES

IDS = (".npy", ".bin", ".safetensors")  # suffixes of corpora whose tokens are numbers
ASCII = 128  # tokens of a run whose tokens are the bytes of its text


def token_names(found: Vectors, file: Path | None = None) -> list[str]:
    """Return a name for each recorded vector.

    That is, in this order: its line in ``file``; its entry in the trace's ``token_strings``; its character, if the
    tokens are bytes; the number of its row. Names that have characters that do not print are written as Python does.

    Args:
        found: the vectors.
        file: names of all rows of the parameter, or of the recorded ones: UTF-8, one a line; ``\\n`` stands for a line
            feed.

    Returns:
        V strings, all of which print.

    Raises:
        BhfastError: the file cannot be read, is not UTF-8, or does not have as many lines.
    """
    names = _strings(found) if file is None else _lines(found, file)
    rows = found.rows.tolist()
    if names is None:
        return [f"row {row}" for row in rows]
    return [_printable(names[i if len(names) == len(rows) else row], row) for i, row in enumerate(rows)]


def _strings(found: Vectors) -> Sequence[str] | None:
    """Return the names that the trace gives to rows; None if it gives none, or they do not fit."""
    trace, last = found.trace, int(found.rows.max())
    is_run = "sigma" in trace.config or "bh_center" in trace  # of bhfast.train, or of the notebook
    if is_run and found.names["param"] != REFERENCE_NAMES["param"]:
        return None
    try:
        strings = json.loads(trace.metadata.get("token_strings", "null"))
    except (ValueError, RecursionError):
        strings = None
    if isinstance(strings, list) and all(isinstance(x, str) for x in strings):
        return strings if len(strings) == len(found.rows) or (is_run and len(strings) > last) else None
    is_text = Path(trace.metadata.get("corpus", "")).suffix not in IDS
    return [chr(i) for i in range(ASCII)] if is_run and is_text and last < ASCII else None


def _lines(found: Vectors, file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BhfastError(f"cannot read the names of tokens, {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BhfastError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    count = len(found.rows)
    if len(lines) != count and len(lines) <= int(found.rows.max()):
        raise BhfastError(
            f"{file} has {len(lines)} lines for {count} vectors of the rows up to {int(found.rows.max())}: "
            "write one name a line, of each vector or of each row of the parameter"
        )
    return lines


def _printable(name: str, row: int) -> str:
    if not name:
        return f"row {row}"
    return name if name.isprintable() and name.strip() == name else repr(name)
