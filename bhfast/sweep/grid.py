"""The runs of a grid, and which of them are this process's."""

from __future__ import annotations

import itertools
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import bhfast
from bhfast.errors import ConfigError

FIXED = ("out", "overwrite", "quiet")  # the same for all runs
DEFAULTS = {
    "storage": "stream"
}  # sooner done, in less memory, where runs follow one another: benchmarks/results/cpu.json
ALWAYS_NAMED = ("sigma", "seed")
FIGURES = ("first_loss", "last_loss", "mean_loss", "steps_per_second", "seconds")


@dataclass(frozen=True)
class Run:
    """One experiment of a grid.

    Attributes:
        name: of the trace, without its suffix.
        settings: those that the name tells.
        config: all of them.
    """

    name: str
    settings: dict[str, Any]
    config: bhfast.TrainConfig

    @property
    def path(self) -> Path:
        return self.config.path

    def waiting(self) -> dict[str, Any]:
        """Return the entry in ``sweep.json`` of a run that is still to be done."""
        return {
            "name": self.name,
            "file": self.path.name,
            "settings": {name: plain(value) for name, value in self.settings.items()},
            "state": "waiting",
            "error": None,
            "steps": self.config.steps,
            **dict.fromkeys(FIGURES),
        }


def read_grid(grid: Mapping[str, Any], source: str) -> dict[str, list[Any]]:
    """Check a grid; return all values as lists, without repetitions.

    Args:
        grid: by setting, with ``-`` or ``_`` in its name, a value or several.
        source: where it comes from, for messages.

    Raises:
        ConfigError: there is no such setting, or a value is of the wrong kind.
    """
    from bhfast.config import kind_of

    names = [entry.name for entry in fields(bhfast.TrainConfig) if entry.name not in FIXED]
    checked: dict[str, list[Any]] = {}
    for key, given in grid.items():
        name = key.replace("-", "_")
        if name not in names:
            raise ConfigError(f"{source}: there is no setting {key!r}; there are {', '.join(names)}")
        if name in checked:
            raise ConfigError(f"{source}: {name} stands twice")
        kind = kind_of(name)
        values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        taken = (int, float) if kind is float else kind
        if not values or not all(isinstance(value, taken) and not isinstance(value, bool) for value in values):
            what = {int: "an integer", float: "a number", str: "a text"}[kind]
            raise ConfigError(f"{source}: {name} must be {what}, or a list of such, got {given!r}")
        checked[name] = list(dict.fromkeys(map(kind, values)))
    return checked


def read_grid_file(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Read a grid from a TOML file, see :func:`read_grid`.

    Raises:
        ConfigError: it is not there, no TOML, or not a grid.
    """
    try:
        with open(path, "rb") as file:
            grid = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the grid {path}: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError included
        raise ConfigError(f"the grid {path} is no TOML: {error}") from None
    return read_grid(grid, str(path))


def plan(grid: Mapping[str, list[Any]], out_dir: str | os.PathLike[str]) -> list[Run]:
    """Return the runs of a grid, in its order: the last setting varies fastest.

    Args:
        grid: as :func:`read_grid` returns it. The order of settings is that of :class:`bhfast.TrainConfig`.

    Raises:
        ConfigError: a setting is out of range, nothing would be recorded, or two runs would have one name.
    """
    if 0 in grid.get("record_every", ()):
        raise ConfigError("record_every must be at least 1 in a sweep, got 0: what it leaves are its traces")
    order = [entry.name for entry in fields(bhfast.TrainConfig) if entry.name in grid]
    varied = [*ALWAYS_NAMED, *(name for name in order if name not in ALWAYS_NAMED and len(grid[name]) > 1)]
    runs: dict[str, Run] = {}
    for values in itertools.product(*(grid[name] for name in order)):
        config = bhfast.TrainConfig(**{**DEFAULTS, **dict(zip(order, values, strict=True))}, quiet=True)
        settings = {name: getattr(config, name) for name in varied}
        name = "_".join(f"{setting}{_in_a_name(value)}" for setting, value in settings.items())
        if name in runs:
            raise ConfigError(f"two runs would be called {name}; give files with different names, or sweep twice")
        runs[name] = Run(name, settings, replace(config, out=str(Path(out_dir) / f"{name}.safetensors")))
    return list(runs.values())


def _in_a_name(value: Any) -> str:
    if isinstance(value, str):
        return re.sub(r"[^\w.+-]", "-", Path(value).stem)
    return repr(value).removesuffix(".0")


def plain(value: Any) -> Any:
    """Return a value for JSON, which knows no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def rank_and_world(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return which of how many processes this is, as torchrun, a Slurm array or srun tells it; else 0 of 1.

    Raises:
        ConfigError: what they tell makes no sense.
    """
    for rank_name, world_name, first_name, step_name in (
        ("RANK", "WORLD_SIZE", "", ""),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "", ""),
    ):
        if rank_name not in environment or world_name not in environment:
            continue
        number, world = environment[rank_name], environment[world_name]
        first, step = environment.get(first_name, "0"), environment.get(step_name, "1")
        try:
            rank, rest = divmod(int(number) - int(first), int(step))
            fits = rest == 0 and 0 <= rank < int(world)
        except (ValueError, ZeroDivisionError):
            fits = False
        if not fits:
            raise ConfigError(
                f"{rank_name}={number} and {world_name}={world} name no share of the runs"
                + (f" (from {first} in steps of {step})" if first_name else "")
            )
        return rank, int(world)
    return 0, 1
