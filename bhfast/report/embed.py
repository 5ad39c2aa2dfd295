"""The player as part of an HTML page that needs no other file."""

from __future__ import annotations

import base64
from importlib.resources import files

SCRIPTS = ("data.js", "cloud.js", "plots.js", "tokens.js", "player.js", "page.js")


def player_html(packed: bytes | None) -> str:
    """Return the player, with its style and scripts; they may stand anywhere in the body of a page.

    The page has it as ``player``, of the class ``Player`` in ``web/player.js``.

    Args:
        packed: what it shows: :meth:`bhfast.report.player.PlayerData.pack`. None: it stays hidden until ``player.load``
            is called.
    """
    data = (
        ""
        if packed is None
        else f'<script type="text/plain" id="player-data">{base64.b64encode(packed).decode()}</script>'
    )
    scripts = [f"<script>\n{_web(name)}</script>" for name in SCRIPTS]
    return "\n".join(
        [f"<style>\n{_web('player.css')}</style>", '<section id="player" hidden></section>', data, *scripts]
    )


def _web(name: str) -> str:
    return (files("bhfast.report") / "web" / name).read_text(encoding="utf-8")
