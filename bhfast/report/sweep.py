"""The results of all runs of a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bhfast.errors import TraceError
from bhfast.report.survey import format_result, survey_trace
from bhfast.sweep.format import FORMAT
from bhfast.trace import open_trace
from bhfast.trace.format import parse_json


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of a sweep.

    Attributes:
        name: of its trace, without the suffix.
        settings: its value of each setting of the grid.
        results: see :meth:`bhfast.report.survey.Survey.results`.
    """

    name: str
    settings: dict[str, Any]
    results: dict[str, float | int | None]


@dataclass(frozen=True)
class SweepSurvey:
    """All runs of a sweep.

    Attributes:
        runs: the finished ones, in the order of the grid.
        unfinished: the state of each of the other runs, by name.
        grid: the values of each setting.
    """

    runs: list[FinishedRun]
    unfinished: dict[str, str]
    grid: dict[str, list[Any]]

    @property
    def axis(self) -> str:
        """The setting on the x axis: sigma, or, if that was not varied, the first varied setting except the seed."""
        varied = [name for name, values in self.grid.items() if len(values) > 1 and name != "seed"]
        return next((name for name in ("sigma", *varied) if name in varied), "sigma")

    def series(self) -> dict[str, list[FinishedRun]]:
        """Group the runs by the values of all varied settings except the axis and the seed."""
        found: dict[str, list[FinishedRun]] = {}
        for run in self.runs:
            others = {k: v for k, v in run.settings.items() if k not in (self.axis, "seed") and len(self.grid[k]) > 1}
            found.setdefault(", ".join(f"{k} {v}" for k, v in others.items()), []).append(run)
        return found

    def table(self) -> list[tuple[str, ...]]:
        """Return one row per run, below the names of the results."""
        names = list(dict.fromkeys(name for run in self.runs for name in run.results))
        rows = [(run.name, *(format_result(run.results.get(name)) for name in names)) for run in self.runs]
        return [("run", *names), *rows, *((name, state) for name, state in self.unfinished.items())]

    def text(self) -> str:
        """Return one block of lines per run, with one result per line."""
        return "\n".join(
            "\n".join([run.name, *(f"  {name:<40}{format_result(value):>12}" for name, value in run.results.items())])
            for run in self.runs
        ) + "".join(f"\n{name}\n  {state}" for name, state in self.unfinished.items())

    def summary(self) -> str:
        """Return what was varied, in one sentence."""
        varied = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in self.grid.items())
        return f"{len(self.runs)} of {len(self.runs) + len(self.unfinished)} runs: {varied}."


def survey_sweep(file: Path) -> SweepSurvey:
    """Read ``sweep.json`` and walk through the trace of each finished run.

    Raises:
        TraceError: the file is missing or not of a sweep, or a trace is missing or damaged.
    """
    try:
        content = parse_json(str(file), file.read_bytes())
    except OSError as error:
        raise TraceError(f"cannot open the sweep {file}: {error.strerror}") from None
    runs, unfinished = [], {}
    try:
        if {key: content[key] for key in FORMAT} != FORMAT:
            raise ValueError
        grid = {name: list(values) for name, values in content["grid"].items()}
        for run in content["runs"]:
            if run["state"] == "done":
                results = survey_trace(open_trace(file.parent / run["file"])).results()
                runs.append(FinishedRun(run["name"], run["settings"], results))
            else:
                unfinished[run["name"]] = f"{run['state']}: {run['error']}" if run["error"] else run["state"]
    except TraceError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise TraceError(f"{file} is not the sweep.json of a sweep") from None
    return SweepSurvey(runs, unfinished, grid)
