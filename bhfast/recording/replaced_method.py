"""Methods of other libraries that have no hooks, replaced while somebody listens to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

L = TypeVar("L")


class ReplacedMethod(Generic[L]):
    """A method of a class, replaced by another function as long as there are listeners.

    Args:
        owner: the class.
        name: of the method.
        replacement: takes its place; it calls ``original``, and tells the ``listeners``.

    Attributes:
        original: the method itself.
        listeners: in the order in which they came.
    """

    def __init__(self, owner: type, name: str, replacement: Callable[..., Any]) -> None:
        self.original: Callable[..., Any] = getattr(owner, name)
        self.listeners: list[L] = []
        self._owner = owner
        self._name = name
        self._replacement = replacement

    @contextmanager
    def heard_by(self, listener: L) -> Iterator[None]:
        """Have one more listener inside the block."""
        self.listeners.append(listener)
        setattr(self._owner, self._name, self._replacement)
        try:
            yield
        finally:
            self.listeners.remove(listener)
            if not self.listeners and getattr(self._owner, self._name) is self._replacement:
                setattr(self._owner, self._name, self.original)
