"""Modules that are imported when they are first used: all processes collect all tests, few run those of one module."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest


class Deferred:
    """A module that is imported when one of its names is first asked for.

    Where a package that it needs is missing, making this skips the module of the tests.
    """

    def __init__(self, name: str, *, needs: str, reason: str) -> None:
        if find_spec(needs) is None:
            pytest.skip(reason, allow_module_level=True)
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)
