"""What is known of the runs in a folder."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bhfast.errors import StorageError
from bhfast.sweep.format import FORMAT
from bhfast.sweep.grid import Run, plain


class Register:
    """``sweep.json``: how each run of the sweeps in a folder went. Any number of processes may update it.

    Raises:
        StorageError: the folder cannot be written to, or ``sweep.json`` there is something else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "sweep.json"
        self._lock = Path(folder) / "sweep.lock"

    @contextmanager
    def _update(self) -> Iterator[dict[str, Any]]:
        """Yield what is in the file, and write what the block makes of it."""
        from bhfast.storage.files import sync_folder

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._lock, "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                content = self._read()
                yield content
                new = self.path.with_name(f"{self.path.name}.new")
                with open(new, "w") as file:
                    json.dump(content, file, indent=1, allow_nan=False)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(new, self.path)
                sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; choose another folder with --out-dir"
            ) from None

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {**FORMAT, "grid": {}, "runs": []}
        try:
            content = json.loads(self.path.read_text())
            fits = {key: content[key] for key in FORMAT} == FORMAT
            _ = [(run["name"], run["state"]) for run in content["runs"]]
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            raise StorageError(f"{self.path} is no register of a sweep; delete it, or choose another --out-dir")
        return content

    def begin(self, grid: Mapping[str, list[Any]], runs: Sequence[Run], share: Sequence[Run], anew: bool) -> None:
        """Enter a sweep: its runs come first, in order, then those of others that are known here.

        Args:
            share: the runs of this process. They are waiting from now on, but those done already only if ``anew``.
        """
        mine = {run.name for run in share}
        with self._update() as content:
            known = {run["name"]: run for run in content["runs"]}
            stays = {
                name: run for name, run in known.items() if name not in mine or (run["state"] == "done" and not anew)
            }
            own = {run.name: stays.get(run.name, run.waiting()) for run in runs}
            content["grid"] = {name: [plain(value) for value in values] for name, values in grid.items()}
            content["runs"] = [*own.values(), *(run for name, run in known.items() if name not in own)]

    def enter(self, run: Run, **outcome: Any) -> dict[str, Any]:
        """Enter how a run went; return its entry. The speed of a trace that was there already stays."""
        entry = {**run.waiting(), **outcome}
        with self._update() as content:
            for place, known in enumerate(content["runs"]):
                if known["name"] == run.name:
                    if "seconds" not in outcome and known["state"] == entry["state"] == "done":
                        entry |= {name: known.get(name) for name in ("steps_per_second", "seconds")}
                    content["runs"][place] = entry
                    return entry
            content["runs"].append(entry)
        return entry
