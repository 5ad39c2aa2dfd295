"""The version of bhfast."""

__version__ = "0.1.0"
