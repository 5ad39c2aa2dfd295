"""CSV: ``steps.csv`` has a line for each step, ``tokens.csv`` one for each token at each step."""

from __future__ import annotations

import csv
from pathlib import Path

from bhfast.export.values import TOKEN_VALUES, Source


def write(source: Source, folder: Path) -> list[str]:
    """Write the folder; return what was left out, a line each."""
    folder.mkdir()
    with open(folder / "steps.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, (steps, values) in enumerate(source.step_blocks()):
            if number == 0:
                writer.writerow(["step", *values])
            writer.writerows(zip(steps.tolist(), *(x.tolist() for x in values.values()), strict=True))
    if source.found is None:
        return []
    with open(folder / "tokens.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "row", "name", *TOKEN_VALUES])
        rows = source.found.rows.tolist()
        for steps, values in source.token_blocks():
            for i, step in enumerate(steps.tolist()):
                columns = (values[name][i].tolist() for name in TOKEN_VALUES)
                writer.writerows(
                    (step, row, name, *own[:-1], int(own[-1]))
                    for row, name, *own in zip(rows, source.names, *columns, strict=True)
                )
    return []
