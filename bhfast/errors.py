"""The errors bhfast raises for what a user can mend; the programs print them without a traceback."""


class BhfastError(Exception):
    """Base of all of them. The text says what, which argument, what was wanted, what came, and the way out."""


class ConfigError(BhfastError, ValueError):
    """A setting that is out of range, unknown, or at odds with another."""


class CorpusError(BhfastError, ValueError):
    """A corpus that is missing, too short, or holds bytes outside the vocabulary."""


class TraceError(BhfastError, ValueError):
    """A trace file that is truncated, corrupted, foreign, or lacks what was asked of it."""


class RecordingWarning(UserWarning):
    """Something is missing from a recording; the training goes on, and the trace says what is missing."""


class StorageError(BhfastError):
    """No room or no permission for a recording: memory, disk, folder, or a file that must not be replaced."""


class DamageError(TraceError):
    """A trace file that is not as it was written: truncated, or with bytes changed."""
