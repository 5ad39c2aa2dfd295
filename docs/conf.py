"""The documentation site: `make docs` builds it from these pages, the docstrings, and the parsers of the programs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import MockFinder

from bhfast.__main__ import PROGRAMS
from bhfast.version import __version__

sys.meta_path.insert(0, MockFinder(["lightning", "transformers"]))  # which take seconds, and need not be installed

HERE = Path(__file__).parent
PAGES = {  # which show a file that lies elsewhere
    HERE.parent / "README.md": HERE / "index.md",
    HERE.parent / "CHANGELOG.md": HERE / "changelog.md",
    HERE.parent / "CONTRIBUTING.md": HERE / "contributing.md",
    HERE.parent / "data" / "README.md": HERE / "corpus.md",
}
PROGRAM = """
```{{eval-rst}}
.. sphinx_argparse_cli::
   :module: bhfast.{0}
   :func: main
   :hook:
   :prog: bhfast {0}
   :title: bhfast {0}
```
"""

project = "bhfast"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
exclude_patterns = ["**/__pycache__"]
myst_heading_anchors = 3
nitpicky = True
OTHERS = "argparse|collections|np|numpy|nn|os|pathlib|re|signal|torch|transformers|lightning|L"
nitpick_ignore_regex = [("py:.*", rf"({OTHERS})\..+|Tensor|Optimizer")]
nitpick_ignore = [
    ("py:class", "bhfast.lattice.motion.Result"),  # a type variable
    *(("py:class", name) for name in ("SharedLaunches", "bhfast.engines.launches.SharedLaunches")),  # of a sweep alone
]
napoleon_use_ivar = True
napoleon_use_rtype = False  # what a function returns begins with dtype and shape rather than a class

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"bhfast {__version__}"
html_copy_source = False
html_show_sourcelink = False


def relinked(text: str, file: Path, page: Path) -> str:
    """Return the text of ``file`` with its relative links as they must be in ``page``."""

    def link(match: re.Match[str]) -> str:
        path, *heading = match[1].split("#", 1)
        target = Path(os.path.normpath(file.parent / path))
        return f"]({'#'.join([os.path.relpath(PAGES.get(target, target), page.parent), *heading])})"

    return re.sub(r"\]\((?!#|\w+:)([^)\s]+)\)", link, text)


def setup(app: Sphinx) -> None:
    """Let links between files of the repository lead to the pages that show them."""

    def source_read(app: Sphinx, name: str, text: list[str]) -> None:
        page = Path(app.env.doc2path(name))
        text[0] = relinked(text[0], page, page)
        if name == "reference/programs":
            text[0] += "".join(map(PROGRAM.format, PROGRAMS))

    def include_read(app: Sphinx, file: Path, page: str, text: list[str]) -> None:
        text[0] = relinked(text[0], Path(app.srcdir, file).resolve(), Path(app.env.doc2path(page)))

    app.connect("autodoc-skip-member", lambda *about: "Alias for field number" in (about[3].__doc__ or "") or None)
    app.connect("source-read", source_read)
    app.connect("include-read", include_read)
