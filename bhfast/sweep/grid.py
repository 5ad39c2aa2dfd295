"""The runs of a grid, and this process's share of them."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import bhfast
from bhfast.errors import ConfigError

NOT_IN_GRID = ("out", "overwrite", "quiet")  # the sweep sets these itself
# For one run after another, streaming is faster and needs less memory: benchmarks/results/cpu.json
SWEEP_DEFAULTS = {"storage": "stream"}
ALWAYS_NAMED = ("sigma", "seed")
RESULT_FIELDS = ("first_loss", "last_loss", "mean_loss", "steps_per_second", "seconds")


@dataclass(frozen=True)
class Run:
    """One experiment of a grid.

    Attributes:
        name: of the trace, without its suffix.
        settings: those that are part of the name.
        config: all settings.
    """

    name: str
    settings: dict[str, Any]
    config: bhfast.TrainConfig

    @property
    def path(self) -> Path:
        """The trace file."""
        return self.config.path

    def waiting_entry(self) -> dict[str, Any]:
        """Return the entry of this run in ``sweep.json`` before it is run."""
        return {
            "name": self.name,
            "file": self.path.name,
            "settings": {name: json_value(value) for name, value in self.settings.items()},
            "state": "waiting",
            "error": None,
            "steps": self.config.steps,
            **dict.fromkeys(RESULT_FIELDS),
        }


def parse_grid(grid: Mapping[str, Any], source: str) -> dict[str, list[Any]]:
    """Check a grid; return the values of each setting as a list without repetitions.

    Args:
        grid: for each setting a value or a sequence of values. Names may have ``-`` in place of ``_``.
        source: where the grid comes from, for error messages.

    Raises:
        ConfigError: a setting is unknown, or a value has the wrong type.
    """
    from bhfast.config import TYPE_NAMES, by_setting, has_setting_type, setting_type

    names = [entry.name for entry in fields(bhfast.TrainConfig) if entry.name not in NOT_IN_GRID]
    checked: dict[str, list[Any]] = {}
    for name, value in by_setting(grid, names, source).items():
        values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        wanted = setting_type(name)
        if not values or not all(has_setting_type(name, value) for value in values):
            raise ConfigError(f"{source}: {name} must be {TYPE_NAMES[wanted]}, or a list of such values, got {value!r}")
        checked[name] = list(dict.fromkeys(map(wanted, values)))
    return checked


def read_grid_file(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Read a grid from a TOML file, see :func:`parse_grid`.

    Raises:
        ConfigError: the file is missing, is not TOML, or is not a grid.
    """
    from bhfast.config import read_toml

    return parse_grid(read_toml(path, "grid"), str(path))


def expand_grid(grid: Mapping[str, list[Any]], out_dir: str | os.PathLike[str]) -> list[Run]:
    """Return a run for every combination of values.

    Settings are in the order of :class:`bhfast.TrainConfig`; the last one varies fastest.

    Args:
        grid: as :func:`parse_grid` returns it.
        out_dir: folder for the traces.

    Raises:
        ConfigError: a setting is out of range, nothing would be recorded, or two runs would have the same name.
    """
    if 0 in grid.get("record_every", ()):
        raise ConfigError("record_every must be at least 1 in a sweep, got 0: a sweep keeps nothing but its traces")
    order = [entry.name for entry in fields(bhfast.TrainConfig) if entry.name in grid]
    varied = [*ALWAYS_NAMED, *(name for name in order if name not in ALWAYS_NAMED and len(grid[name]) > 1)]
    runs: dict[str, Run] = {}
    for values in itertools.product(*(grid[name] for name in order)):
        config = bhfast.TrainConfig(**{**SWEEP_DEFAULTS, **dict(zip(order, values, strict=True))}, quiet=True)
        settings = {name: getattr(config, name) for name in varied}
        name = "_".join(f"{setting}{_file_name_part(value)}" for setting, value in settings.items())
        if name in runs:
            raise ConfigError(f"two runs would be called {name}; use files with different names, or two sweeps")
        runs[name] = Run(name, settings, replace(config, out=str(Path(out_dir) / f"{name}.safetensors")))
    return list(runs.values())


def _file_name_part(value: Any) -> str:
    if isinstance(value, str):
        return re.sub(r"[^\w.+-]", "-", Path(value).stem)
    return repr(value).removesuffix(".0")


def json_value(value: Any) -> Any:
    """Return a setting as JSON can hold it: infinities and NaN as strings."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def rank_and_world(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as set by torchrun, a Slurm array or srun.

    Without any of these, that is 0 of 1.

    Raises:
        ConfigError: the variables contradict each other.
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
                f"{rank_name}={number} and {world_name}={world} do not determine a share of the runs"
                + (f" (from {first} in steps of {step})" if first_name else "")
            )
        return rank, int(world)
    return 0, 1
