"""The pages of docs/how-to/: their Python runs, and prints what the comments after it say."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import distributed_run
import pytest
import torch
from children import fork, status_of
from ranks import run_ranks

HOW_TO = Path(__file__).parents[1] / "docs" / "how-to"
PAGES = sorted(path.stem for path in HOW_TO.glob("*.md"))
OF_RANKS = ("ddp", "sharded-models")
NEEDS: dict[str, tuple[Callable[[], object], str]] = {  # what a page needs, and why it is skipped without
    "accelerate": (lambda: find_spec("accelerate"), "accelerate is not installed; it comes with bhfast[hf]"),
    "hugging-face-trainer": (lambda: find_spec("accelerate"), "accelerate is not installed; it comes with bhfast[hf]"),
    "lightning": (lambda: find_spec("lightning"), "lightning is not installed; it comes with bhfast[lightning]"),
    "other-recordings": (lambda: find_spec("h5py"), "h5py is not installed; it comes with bhfast[import]"),
    "several-optimizers": (lambda: hasattr(torch.optim, "Muon"), "this torch has no Muon"),
    "sharded-models": (lambda: distributed_run.SHARDS_ON_CPU, "this torch's fully_shard does not run on a CPU"),
}


def python_of(page: str) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (HOW_TO / f"{page}.md").read_text(), re.M | re.S))


def run(page: str, folder: Path) -> None:
    """Run a page in the folder, which gets what it prints."""
    os.chdir(folder)
    torch.compile = partial(torch.compile, backend="eager")  # the code is traced, but nothing is built from it
    torch.manual_seed(0)
    printed: list[str] = []
    names = {"__name__": "__main__", "print": lambda *values: printed.append(" ".join(map(str, values)))}
    exec(compile(python_of(page), f"{page}.md", "exec"), names)
    (folder / f"printed.{os.environ.get('RANK', 0)}").write_text("\n".join(printed))


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What the pages import takes long to import: once, before they are forked."""
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401

    import bhfast.recording.recorder  # noqa: F401

    for name, module in (("accelerate", "bhfast.hf"), ("lightning", "bhfast.lightning")):
        if find_spec(name):
            import_module(module)


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, tmp_path: Path) -> None:
    is_possible, reason = NEEDS.get(page, (lambda: True, ""))
    if not is_possible():
        pytest.skip(reason)
    said = re.findall(r"^ *print\(.*\)  # (.*)$", python_of(page), re.M)
    assert said
    if page in OF_RANKS:
        run_ranks(partial(run, page, tmp_path), tmp_path)
    else:
        errors = tmp_path / "errors"
        status = status_of(fork(partial(run, page, tmp_path), errors))
        assert status == 0, errors.read_text()
    assert (tmp_path / "printed.0").read_text().splitlines() == said


@pytest.mark.skipif(not PAGES, reason="this copy of the tree has no docs/")
def test_links_between_pages() -> None:
    links = [
        (page, link) for page in PAGES for link in re.findall(r"\]\(([^)#]+)\)", (HOW_TO / f"{page}.md").read_text())
    ]
    assert links
    for page, link in links:
        assert (HOW_TO / link).exists(), f"{page} links to {link}"
