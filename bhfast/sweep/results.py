"""``sweep.json``: the results of the runs in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bhfast.errors import StorageError
from bhfast.locks import open_locked
from bhfast.sweep.format import FORMAT
from bhfast.sweep.grid import Run, json_value


class SweepResults:
    """The results of all sweeps in a folder, kept in its ``sweep.json``. Several processes may update it concurrently.

    Every method raises :class:`bhfast.errors.StorageError` if the folder cannot be written to, or if its
    ``sweep.json`` does not belong to a sweep.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "sweep.json"
        self._lock = Path(folder) / "sweep.lock"

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """Yield the content of the file for the block to change, then replace the file."""
        from bhfast.storage.files import sync_folder

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = open_locked(self._lock, os.O_CREAT, wait=True)
            try:
                content = self._read()
                yield content
                new = self.path.with_name(f"{self.path.name}.new")
                with open(new, "w") as file:
                    json.dump(content, file, indent=1, allow_nan=False)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(new, self.path)
                sync_folder(self.path.parent)
            finally:
                os.close(lock)
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
            raise StorageError(
                f"{self.path} does not belong to a sweep; delete it, or choose another folder with --out-dir"
            )
        return content

    def begin(self, grid: Mapping[str, list[Any]], runs: Sequence[Run], share: Sequence[Run], restart: bool) -> None:
        """Add a sweep: its runs come first, in order, then those of earlier sweeps.

        Args:
            grid: the values of each setting.
            runs: all runs of the sweep.
            share: the runs of this process; they are marked as waiting.
            restart: whether to mark runs that are done as waiting, too.
        """
        mine = {run.name for run in share}
        with self._locked() as content:
            known = {run["name"]: run for run in content["runs"]}
            kept = {
                name: run for name, run in known.items() if name not in mine or (run["state"] == "done" and not restart)
            }
            own = {run.name: kept.get(run.name, run.waiting_entry()) for run in runs}
            content["grid"] = {name: [json_value(value) for value in values] for name, values in grid.items()}
            content["runs"] = [*own.values(), *(run for name, run in known.items() if name not in own)]

    def update(self, run: Run, **outcome: Any) -> dict[str, Any]:
        """Write how a run went; return its entry. If its trace was kept, its speed is kept as well."""
        entry = {**run.waiting_entry(), **outcome}
        with self._locked() as content:
            for i, known in enumerate(content["runs"]):
                if known["name"] == run.name:
                    if "seconds" not in outcome and known["state"] == entry["state"] == "done":
                        entry |= {name: known.get(name) for name in ("steps_per_second", "seconds")}
                    content["runs"][i] = entry
                    return entry
            content["runs"].append(entry)
        return entry
