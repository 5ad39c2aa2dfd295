"""The version of bhfast."""

__version__ = "0.2.0"
