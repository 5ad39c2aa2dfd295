"""Errors that a user can fix. The programs print them without a traceback, in one line."""

MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
)  # what wrong data raises


class BhfastError(Exception):
    """Base of all errors. The message says what is wrong, in which argument, what was expected, and what to do."""


class ConfigError(BhfastError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class CorpusError(BhfastError, ValueError):
    """A corpus is missing, too short, or has bytes outside the vocabulary."""


class TraceError(BhfastError, ValueError):
    """A trace is truncated, corrupted, not a trace, or does not have what is needed."""


class RecordingWarning(UserWarning):
    """Something is missing from a recording. Training continues, and the trace says what is missing."""


class StorageError(BhfastError):
    """A recording cannot be stored: no memory, disk space or permission, or a file that must not be replaced."""


class DamageError(TraceError):
    """A trace file is not as it was written: it is truncated, or bytes were changed."""


def printable(text: object) -> str:
    """Return text with all that could control a terminal, or break a line, as escapes such as ``\\x1b``.

    Names and metadata of a file are of whoever wrote it.
    """
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in str(text))
