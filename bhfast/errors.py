"""Errors that a user can fix. The programs print them without a traceback, in one line."""

import re

MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
)  # what wrong data raises


ARGUMENT = re.compile(r'\b(\w+)=(?:True|"(\w+)")?')  # name=, name=True or name="value"
FLAGS = {"path": "out", "every": "record-every"}  # the arguments that programs call something else


class BhfastError(Exception):
    """Base of all errors. The message says what is wrong, in which argument, what was expected, and what to do.

    Args:
        text: what is wrong.
        way_out: what to do, if that names arguments of a Python call, such as ``overwrite=True``. No names of files
            belong here: programs print the arguments as flags.

    Attributes:
        with_flags: the message as programs print it.
    """

    def __init__(self, text: object = "", way_out: str = "") -> None:
        super().__init__(f"{text}; {way_out}" if way_out else text)
        self.with_flags = f"{text}; {re.sub(ARGUMENT, _flag, way_out)}" if way_out else f"{text}"


def _flag(argument: re.Match[str]) -> str:
    name, value = argument.groups()
    flag = f"--{FLAGS.get(name, name.replace('_', '-'))}"
    return f"{flag} {value}" if value else flag


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
