"""Launches of the resident engine that several runs share, each run in a thread of its own.

Every run goes through its own training loop, with its own recorder. Only where the loop asks for steps do the runs
meet: the last one to ask launches for all of them.
"""

from __future__ import annotations

import threading
from typing import Any

from bhfast.ops import extension


class SharedLaunches:
    """Launches for runs of one shape.

    A launch waits until every run has asked for steps or has left. It does as many as the run that wants the
    fewest; the others stay in line for the rest. So all clusters of a launch have the same work.

    Args:
        blocks: that work on each run.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._changed = threading.Condition()  # guards what follows
        self._places: list[Place] = []
        self._program: Any = None
        self._error: Exception | None = None

    def place(self) -> Place:
        """Return the place of another run. All places are to be made before the first one is used."""
        self._places.append(Place(self))
        return self._places[-1]

    def run(self, place: Place, steps: int) -> None:
        """Wait until launches have done this many more steps of the run in ``place``.

        Raises:
            RuntimeError: a launch failed.
        """
        with self._changed:
            place.wanted = steps
            while place.wanted and self._error is None:
                if all(own.wanted for own in self._places):
                    self._launch()
                else:
                    self._changed.wait()
            if self._error is not None:
                raise RuntimeError(f"a launch shared by several runs failed: {self._error}") from self._error

    def leave(self, place: Place) -> None:
        """Launch without the run in ``place`` from now on."""
        with self._changed:
            if place in self._places:
                self._places.remove(place)
                self._program = None
                self._changed.notify_all()

    def _launch(self) -> None:
        steps = min(place.wanted for place in self._places)
        try:
            if self._program is None:
                runs = [{**place.arguments, "start": place.done} for place in self._places]
                self._program = extension.resident_engine(runs, blocks=self.blocks)
            self._program.run(steps)
        except Exception as error:
            self._error = error
        for place in self._places:
            place.wanted -= steps
            place.done += steps
        self._changed.notify_all()


class Place:
    """A run's place in :class:`SharedLaunches`; it is the run's program. Leaving the ``with`` block gives it up."""

    def __init__(self, launches: SharedLaunches) -> None:
        self.arguments: dict[str, Any] = {}  # of the run's TrainingRun in the extension
        self.wanted = self.done = 0  # steps: asked for and not launched yet; launched in all
        self._launches = launches

    def join(self, arguments: dict[str, Any]) -> Place:
        """Take the place for a run; return it."""
        self.arguments, self.done = arguments, arguments["start"]
        return self

    def run(self, steps: int) -> None:
        """Run and record the next ``steps`` steps; the place is given up after the last one."""
        self._launches.run(self, steps)
        if self.done == len(self.arguments["offsets"]):
            self._launches.leave(self)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *error: object) -> None:
        self._launches.leave(self)
