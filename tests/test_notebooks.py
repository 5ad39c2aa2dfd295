"""The notebooks of examples/: their cells run in order, small and without Jupyter; what they store is of one run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from children import fork, status_of
from test_sweep import work_here

NOTEBOOKS = Path(__file__).parents[1] / "examples"
MOST_BYTES = 300 << 10

Names = dict[str, Any]  # what the cells have defined


def check_vocabulary(names: Names) -> None:
    counts, life = names["trace"]["token_counts"], names["life"]
    dead = int((counts == 0).sum())
    assert dead > 256  # besides bytes
    assert [len(last) for last in life] == [dead] * 3
    assert names["at_end"].multiplicity.tolist() == [dead]  # sigma is 0: one black hole
    assert len(life.last_late_step.unique()) == 1
    assert names["last_move"].amax(1).equal(life.last_late_step)
    assert all(
        names["strings"][row] == word for row, word in zip(names["trace"]["wte.rows"], names["words"], strict=True)
    )


def check_sigma_sweep(names: Names) -> None:
    assert set(names["holes"][0.0]) == {1}  # all dead tokens are one black hole
    assert names["distinct"][0.0].unique().tolist() == [1]
    assert set(names["holes"][1e-3]) == {0}
    records = names["traces"][1e-5]["embeddings"][:, names["dead"]].float()
    counts = [x.unique(dim=0, return_counts=True)[1] for x in records]
    assert names["holes"][1e-5] == [int((n > 1).sum()) for n in counts]
    assert names["distinct"][1e-5].tolist() == [len(n) for n in counts]
    assert names["distinct"][1e-3].unique().tolist() == [int(names["dead"].sum())]
    first = names["traces"][1e-3]["embeddings"][0].double()
    rms = (first - first.mean(0)).square().sum(1).mean().sqrt()
    assert math.isclose(names["of_all"][1e-3][0], rms, rel_tol=1e-12)


def check_two_seeds(names: Names) -> None:
    firsts = {name: found.first()[0].first.step for name, found in names["found"].items()}
    assert firsts == {"other data": 1, "other start": 0}
    first = [names["w"][name][0].double() for name in ("reference", "other start")]
    assert math.isclose(names["apart"]["other start"].l2[0], (first[0] - first[1]).norm(), rel_tol=1e-12)
    for heat in names["heat"].values():
        torch.testing.assert_close(heat.total, heat.bulk + heat.thermal, rtol=1e-12, atol=0)
    for heat in names["heat_of_dead"].values():  # sigma is 0: they move as one
        torch.testing.assert_close(heat.bulk_share, torch.ones(len(heat.bulk), dtype=torch.float64), rtol=1e-12, atol=0)
    assert [rho.pooled()[0] for rho in names["motion"].values()] == [1] * 3


SMALL: dict[str, tuple[Names, Callable[[Names], None]]] = {  # parameters, and a check of what is found
    "sigma_sweep": ({"sigmas": [0.0, 1e-5, 1e-3], "steps": 20}, check_sigma_sweep),
    "two_seeds": ({"steps": 30, "sigma": 0.0, "max_lag": 20}, check_two_seeds),
    "vocabulary": (
        {"vocab_size": 2_000, "modules": 20, "steps": 4, "batch_size": 1, "sigma": 0.0},
        check_vocabulary,
    ),
}


def cells_of(name: str) -> list[dict[str, Any]]:
    """Return the code cells of a notebook."""
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(name: str, folder: Path) -> None:
    """Run a notebook in the folder, its parameters replaced by small ones after their cell, as papermill does it."""
    os.chdir(folder)
    small, check = SMALL[name]
    names: Names = {"__name__": "__main__"}
    for cell in cells_of(name):
        exec(compile("".join(cell["source"]), f"{name}.ipynb, {cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert small.keys() <= names.keys()
            names.update(small)
    check(names)
    names["folder"].cleanup()


@pytest.fixture(scope="module")
def imported() -> None:
    """What the notebooks import takes long to import: once, before they are forked."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; it comes with bhfast[report]").use("Agg")
    for module in ("matplotlib.pyplot", "bhfast.diff", "bhfast.train"):
        import_module(module)


def test_every_notebook_is_run_here() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == SMALL.keys()


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("name", SMALL)
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "vocabulary":
        pytest.importorskip("tokenizers", reason="tokenizers is not installed; examples/vocabulary.ipynb needs it")
    work_here(monkeypatch)  # no processes of a sweep, which would import torch again
    errors = tmp_path / "errors"
    status = status_of(fork(partial(run, name, tmp_path), errors))
    assert status == 0, errors.read_text()


@pytest.mark.parametrize("name", SMALL)
def test_stored_outputs_are_of_one_run(name: str) -> None:
    cells = cells_of(name)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size <= MOST_BYTES
