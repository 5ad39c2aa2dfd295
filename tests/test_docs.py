"""README and the pages of docs/: their Python and their commands run, and print what the comments after them say."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import distributed_run
import pytest
import torch
from children import fork, status_of
from ranks import run_ranks
from test_sweep import work_here
from torch import Tensor, nn

import bhfast
import bhfast.__main__ as console
import bhfast.train
from bhfast import tokens
from bhfast.config import TrainConfig
from bhfast.trace import open_trace
from bhfast.train import TrainResult

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"^(bhfast|git|make|pip|python\S*|torchrun) ", re.M)
NOT_RUN = 5  # blocks that say why they are not


class Block(NamedTuple):
    """A fenced block of a page; ``why`` it is not run, if it is not."""

    why: str | None
    language: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    return [Block(**found.groupdict()) for found in FENCE.finditer(document.read_text())]


DOCUMENTS = [path for pattern in ("*.md", "data/*.md", "docs/**/*.md") for path in sorted(ROOT.glob(pattern))]
BLOCKS = {str(path.relative_to(ROOT).with_suffix("")): blocks_of(path) for path in DOCUMENTS}
PAGES = [
    page for page, blocks in BLOCKS.items() if any(own.language in ("python", "sh") and not own.why for own in blocks)
]

# ---------------------------------------------------------------------------------------------------------------------
# What pages need


class Model(nn.Module):
    """A model with token vectors, whose output is its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(8, 4)

    def forward(self, batch: Tensor) -> Tensor:
        return self.wte(batch).square().mean()


def of_readme(run: TrainResult) -> dict[str, Any]:
    return {"model": Model(), "batches": torch.randint(8, (3, 16))}


def with_a_run(run: TrainResult) -> None:
    os.symlink(run.path, "run.safetensors")


def of_experiments(run: TrainResult) -> None:
    text = tokens.builtin_path().read_text()
    Path("large.txt").write_text(text[:40_000])
    Path("part.txt").write_text(text[:10_000])


def of_two_traces(run: TrainResult) -> None:
    for seed in (42, 43):
        bhfast.train(TrainConfig(sigma=1e-3, steps=5, seed=seed, out=f"tensors/seed{seed}.safetensors", quiet=True))


def of_other_recordings(run: TrainResult) -> None:
    import h5py

    def record(name: str, names: Mapping[str, str], **settings: Any) -> None:
        """Record a run of bhfast as another program would have."""
        trace = open_trace(bhfast.train(TrainConfig(steps=20, out="its", overwrite=True, quiet=True, **settings)).path)
        with h5py.File(name, "w") as file:
            for own in ("embeddings", "grads", "momentum", "variance", "recorded_steps"):
                values = trace[own][:]
                file[names.get(own, own)] = values.view(torch.uint16) if values.ndim > 1 else values

    record("old.h5", {"embeddings": "W"}, lr_schedule="constant", max_grad_norm=float("inf"))
    record("odd.h5", {"embeddings": "E7", "grads": "dE"}, lr_schedule="constant", max_grad_norm=float("inf"))
    record("clipped.h5", {})
    command("bhfast import clipped.h5 --out clipped.safetensors".split())


BEFORE: dict[str, Callable[[TrainResult], dict[str, Any] | None]] = {  # makes files; returns what else a page names
    "README": of_readme,
    "docs/export": with_a_run,
    "docs/lattice": with_a_run,
    "docs/how-to/experiments": of_experiments,
    "docs/how-to/other-recordings": of_other_recordings,
    "docs/how-to/two-traces": of_two_traces,
}
FEWER_RUNS = {"1e-5 1e-4 1e-3 1e-2 --seed 42 43": "1e-3 --seed 42"}
SMALL = {  # what the test makes smaller in a page
    "README": {"2000": "20", "steps=200)": "steps=20)", "[200]": "[20]", **FEWER_RUNS},
    "docs/sweep": {"2000": "20", **FEWER_RUNS},
    "docs/tutorial": {"2000": "20", "2001": "21", "1900": "10"},
    "docs/how-to/experiments": {"10000": "300", "5000": "5"},
    "docs/how-to/other-recordings": {"10000": "20"},
}
STATUSES = {"diff": 1}  # of traces that differ
EXTRAS = {  # pages that need a package, and where it comes from
    "README": ("matplotlib", "report"),
    "docs/sweep": ("matplotlib", "report"),
    "docs/tutorial": ("matplotlib", "report"),
    "docs/how-to/accelerate": ("accelerate", "hf"),
    "docs/how-to/experiments": ("tokenizers", "hf"),
    "docs/how-to/hugging-face-trainer": ("accelerate", "hf"),
    "docs/how-to/lightning": ("lightning", "lightning"),
    "docs/how-to/other-recordings": ("h5py", "import"),
    "docs/how-to/two-traces": ("matplotlib", "report"),
}


def why_skipped(page: str) -> str | None:
    package, extra = EXTRAS.get(page, ("bhfast", ""))
    if find_spec(package) is None:
        return f"{package} is not installed; it comes with bhfast[{extra}]"
    if page == "docs/how-to/several-optimizers" and not hasattr(torch.optim, "Muon"):
        return "this torch has no Muon"
    if page == "docs/how-to/sharded-models" and not distributed_run.SHARDS_ON_CPU:
        return "this torch's fully_shard does not run on a CPU"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Running them


def code_of(page: str) -> list[Block]:
    """Return the blocks of a page that run, made small."""
    blocks = [own for own in BLOCKS[page] if own.language in ("python", "sh") and not own.why]
    for large, small in SMALL.get(page, {}).items():
        assert any(large in own.text for own in blocks), f"{page} has no {large}"
        blocks = [own._replace(text=own.text.replace(large, small)) for own in blocks]
    return blocks


def command(words: list[str]) -> None:
    """Run a command in this process."""
    assert words[0] == "bhfast", f"{shlex.join(words)} cannot run here: say why it is not run"
    sys.argv[1:] = words[1:]
    expected = STATUSES.get(words[1], 0)
    assert console.main() == expected, shlex.join(words)


def run_page(page: str, trace: TrainResult, folder: Path) -> None:
    """Run a page in the folder, which gets what its Python prints."""
    os.chdir(folder)
    torch.compile = partial(torch.compile, backend="eager")  # the code is traced, but nothing is built from it
    torch.manual_seed(0)
    printed: list[str] = []
    names = {"__name__": "__main__", **(BEFORE.get(page, lambda trace: None)(trace) or {})}
    names["print"] = lambda *values: printed.append(" ".join(map(str, values)))
    for block in code_of(page):
        if block.language == "python":
            exec(compile(block.text, f"{page}.md", "exec"), names)
        else:
            for line in block.text.replace("\\\n", " ").splitlines():
                command(shlex.split(line, comments=True))
    (folder / f"printed.{os.environ.get('RANK', 0)}").write_text("\n".join(printed))


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What the pages import takes long to import: once, before they are forked."""
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401

    import bhfast.diff
    import bhfast.recording.recorder  # noqa: F401

    for name, module in (("accelerate", "hf"), ("lightning", "lightning"), ("matplotlib", "report.pictures")):
        if find_spec(name):
            import_module(f"bhfast.{module}")


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, run: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_skipped(page):
        pytest.skip(reason)
    work_here(monkeypatch)  # no processes of a sweep, which would import torch again
    if find_spec("matplotlib"):  # to draw everything, and in full, takes seconds
        monkeypatch.setattr("bhfast.report.page.DPI", 20)
        for name in ("run_pictures", "sweep_pictures"):
            monkeypatch.setattr(f"bhfast.report.pictures.{name}", lambda survey: [])
    python = "".join(block.text for block in code_of(page) if block.language == "python")
    said = re.findall(r"^ *print\(.*?\)(?:  # (.*))?$", python, re.M)
    assert any(said) or "how-to" not in page
    work = partial(run_page, page, run, tmp_path)
    if page in ("docs/how-to/ddp", "docs/how-to/sharded-models"):
        run_ranks(work, tmp_path)
    else:
        errors = tmp_path / "errors"
        status = status_of(fork(work, errors))
        assert status == 0, errors.read_text()
    printed = (tmp_path / "printed.0").read_text().splitlines()
    assert len(printed) == len(said)
    assert [line for line, expected in zip(printed, said, strict=True) if expected] == [*filter(None, said)]


# ---------------------------------------------------------------------------------------------------------------------
# All of them

needs_documents = pytest.mark.skipif(len(PAGES) < 2, reason="this copy of the tree has no docs/")


@needs_documents
def test_blocks_run_or_say_why_not() -> None:
    blocks = [(page, own) for page, all_blocks in BLOCKS.items() for own in all_blocks]
    reasons = [own.why for _, own in blocks if own.why]
    assert len(reasons) == NOT_RUN, reasons
    for page, own in blocks:
        if own.language in ("python", "sh"):
            assert own.text.strip(), page
        else:
            assert not COMMAND.search(own.text), f"{page}: these are commands, so say ```sh:\n{own.text}"
            assert own.language in ("", "text") or own.language.startswith("{"), f"{page}: {own.language}"


@needs_documents
def test_no_code_is_hidden_from_these_tests() -> None:
    """As an indented block would be, or a fence that is indented or has no end."""
    for document in DOCUMENTS:
        rest = FENCE.sub("", document.read_text())
        assert "```" not in rest, document
        assert not re.search(r"\n\n    (?!\S*[-*\d])", rest), document


@needs_documents
def test_every_public_name_is_in_the_reference() -> None:
    named = re.findall(r"auto\w+:: ([\w.]+)", (ROOT / "docs" / "reference" / "python.md").read_text())
    for name in {*bhfast.__all__} - {"__version__"}:
        assert {f"bhfast.{name}", f"bhfast.{name}.{name}"} & {*named}, name


@needs_documents
def test_links_between_pages() -> None:
    how_to = ROOT / "docs" / "how-to"
    links = [(page, link) for page in how_to.glob("*.md") for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
    assert links
    for page, link in links:
        assert (how_to / link).exists(), f"{page} links to {link}"
