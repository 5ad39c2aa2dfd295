"""The answers of all runs of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bhfast.errors import TraceError
from bhfast.report.survey import format_result, survey
from bhfast.sweep.format import FORMAT
from bhfast.trace import open_trace
from bhfast.trace.format import parse_json


@dataclass(frozen=True)
class Run:
    """A finished run of a sweep: its settings of the grid's flags, and its answers, see ``Survey.results``."""

    name: str
    settings: dict[str, Any]
    results: dict[str, float | int | None]


@dataclass(frozen=True)
class SweepSurvey:
    """All runs of a sweep.

    Attributes:
        runs: those that are finished, in the order of the grid.
        others: names of the others, and what is known of them.
        grid: values of each flag.
    """

    runs: list[Run]
    others: dict[str, str]
    grid: dict[str, list[Any]]

    @property
    def axis(self) -> str:
        """What the answers are drawn against: sigma, or the first other flag that has several values."""
        varied = [flag for flag, values in self.grid.items() if len(values) > 1 and flag != "seed"]
        return next((flag for flag in ("sigma", *varied) if flag in varied), "sigma")

    def series(self) -> dict[str, list[Run]]:
        """Return the runs by the values of all that was varied but the axis and the seed."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            others = {k: v for k, v in run.settings.items() if k not in (self.axis, "seed") and len(self.grid[k]) > 1}
            found.setdefault(", ".join(f"{k} {v}" for k, v in others.items()), []).append(run)
        return found

    def table(self) -> list[tuple[str, ...]]:
        """Return one row for each run, below the names of the answers."""
        names = list(dict.fromkeys(name for run in self.runs for name in run.results))
        rows = [(run.name, *(format_result(run.results.get(name)) for name in names)) for run in self.runs]
        return [("run", *names), *rows, *((name, what) for name, what in self.others.items())]

    def text(self) -> str:
        """Return the table with one line for each answer and column for each run, in blocks that fit a terminal."""
        return "\n".join(
            "\n".join([run.name, *(f"  {name:<40}{format_result(value):>12}" for name, value in run.results.items())])
            for run in self.runs
        ) + "".join(f"\n{name}\n  {what}" for name, what in self.others.items())

    def summary(self) -> str:
        """Return what was varied, in one sentence."""
        varied = "; ".join(f"{flag} {', '.join(map(str, values))}" for flag, values in self.grid.items())
        return f"{len(self.runs)} of {len(self.runs) + len(self.others)} runs: {varied}."


def survey_sweep(file: Path) -> SweepSurvey:
    """Read ``sweep.json`` and walk through the trace of each finished run.

    Raises:
        TraceError: it is not there or not of a sweep, or a trace is missing or damaged.
    """
    try:
        content = parse_json(str(file), file.read_bytes())
    except OSError as error:
        raise TraceError(f"cannot open the sweep {file}: {error.strerror}") from None
    runs, others = [], {}
    try:
        if {key: content[key] for key in FORMAT} != FORMAT:
            raise ValueError
        grid = {flag: list(values) for flag, values in content["grid"].items()}
        for run in content["runs"]:
            if run["state"] == "done":
                runs.append(Run(run["name"], run["settings"], survey(open_trace(file.parent / run["file"])).results()))
            else:
                others[run["name"]] = f"{run['state']}: {run['error']}" if run["error"] else run["state"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{file} is not the sweep.json of a sweep") from None
    return SweepSurvey(runs, others, grid)
