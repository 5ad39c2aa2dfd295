"""A self-contained HTML page: a table, text, and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bhfast.errors import BhfastError
from bhfast.report.embed import player_html
from bhfast.report.pictures import DPI, Picture
from bhfast.version import __version__

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.3; overflow-wrap: anywhere; }
h1 + p { margin-top: -0.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { width: 100%; min-width: 36rem; height: auto; background: white; border-radius: 4px; }
figure { margin: 0; } figcaption, footer { opacity: 0.75; font-size: 0.9rem; }
.wide { overflow-x: auto; } pre { font-size: 0.85rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid var(--line); text-align: left; }
td { white-space: nowrap; } th { vertical-align: bottom; }
td + td, th + th { text-align: right; }
"""


@dataclass(frozen=True)
class Page:
    """The content of a report, from top to bottom.

    Attributes:
        title: the heading, or what stands below the headline.
        summary: a sentence or two.
        text: preformatted lines; None for none.
        table: rows of cells. The first row has the headings, the first column the names of the rows.
        pictures: saved one at a time, so an iterator need not hold them all.
        headline: the answer, in a sentence; None for none.
        player: what the player shows, see :meth:`bhfast.report.player.PlayerData.pack`; None for no player.
        notes: what was left out, a line each.
    """

    title: str
    summary: str
    text: str | None
    table: Sequence[Sequence[str]]
    pictures: Iterable[Picture]
    headline: str | None = None
    player: bytes | None = None
    notes: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        """Write ``index.html``, with all pictures inside, and each picture as a PNG; replace older ones.

        Raises:
            BhfastError: the folder cannot be written to.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            parts = [self._head()]
            for picture in self.pictures:
                buffer = io.BytesIO()
                picture.figure.savefig(buffer, dpi=DPI)
                (folder / f"{picture.name}.png").write_bytes(buffer.getvalue())
                parts.append(_section(picture, buffer.getvalue()))
            parts.append(f"<footer>bhfast {__version__}</footer>\n</body></html>\n")
            (folder / "index.html").write_bytes("\n".join(parts).encode(errors="backslashreplace"))
        except OSError as error:
            raise BhfastError(f"cannot write the report to {folder}: {error.strerror}; choose another --out") from None

    def _head(self) -> str:
        title = escape(self.title)
        head, *body = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.table]
        rows = [f"<thead><tr>{head.replace('td>', 'th>')}</tr></thead>", *(f"<tr>{row}</tr>" for row in body)]
        lines = [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>" if self.headline is None else f"<h1>{escape(self.headline)}</h1>\n<p>{title}</p>",
            *([] if self.player is None else [player_html(self.player)]),
            f"<p>{escape(self.summary)}</p>",
            '<div class="wide"><table>',
            *rows,
            "</table></div>",
            *(f"<p>{escape(note)}</p>" for note in self.notes),
        ]
        if self.text is not None:
            lines.append(f'<h2>Verification figures</h2>\n<div class="wide"><pre>{escape(self.text)}</pre></div>')
        return "\n".join(lines)


def _section(picture: Picture, png: bytes) -> str:
    title, caption = escape(picture.title), escape(picture.caption)
    return (
        f'<h2 id="{picture.name}">{title}</h2>\n<figure><div class="wide"><img alt="{title}. {caption}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></div><figcaption>{caption}</figcaption></figure>'
    )
