"""Serves the page of a run to browsers on this machine, and nothing else."""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import asdict
from functools import partial
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from bhfast.errors import BhfastError
from bhfast.report.embed import player_html
from bhfast.watch.follower import Follower

ADDRESS = "127.0.0.1"
HEADERS = {  # of every answer
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
SECONDS = 10.0  # that a client may take to ask, or to read an answer


class WatchServer(ThreadingHTTPServer):
    """Answers ``/`` with the page, ``/state`` with the state of the run, and ``/data`` with what the player shows.

    Args:
        follower: of the run.
        title: of the page.
        port: 0 for one that is free.

    Attributes:
        url: the address of the page.

    Raises:
        BhfastError: the port cannot be had.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, follower: Follower, title: str, port: int = 0) -> None:
        page = _page(title).encode(errors="backslashreplace")
        try:
            super().__init__((ADDRESS, port), partial(_Handler, follower, page))
        except OSError as error:
            raise BhfastError(f"cannot listen on port {port}: {error.strerror}; choose another --port") from None
        self.url = f"http://{ADDRESS}:{self.server_port}/"

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own looks up the name of this machine, which may take seconds
        self.server_port = self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a browser that went away
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server_version = "bhfast"
    sys_version = ""
    timeout = SECONDS

    def __init__(
        self, follower: Follower, page: bytes, request: socket.socket, client: Any, server: WatchServer
    ) -> None:
        self._follower = follower
        self._page = page
        self._hosts = [f"{name}:{server.server_port}" for name in (ADDRESS, "localhost")]
        super().__init__(request, client, server)

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self._hosts:
            self._answer(403, b"This page is for browsers on this machine.\n")  # another site's name for this address
            return
        asked = urlsplit(self.path)
        if asked.path == "/":
            self._answer(200, self._page, "text/html; charset=utf-8")
        elif asked.path == "/state":
            self._answer(200, json.dumps(asdict(self._follower.look())).encode(), "application/json")
        elif asked.path == "/data":
            self._answer_data(parse_qs(asked.query).get("have", [""])[0])
        else:
            self._answer(404, b"There is no such page.\n")

    def _answer_data(self, have: str) -> None:
        try:
            data = self._follower.data(have)
        except BhfastError as error:
            self._answer(409, str(error).encode(errors="backslashreplace"))
            return
        if data is None:
            self._answer(204, b"")
        else:
            self._answer(200, data.packed, "application/octet-stream", {"X-Version": data.version})

    def _answer(
        self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        own = {"Content-Type": kind, **HEADERS, **(headers or {})}
        for name, text in ({**own, "Content-Length": str(len(body))} if status != 204 else own).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def _page(title: str) -> str:
    name = escape(title)
    script = (files("bhfast.watch") / "web" / "watch.js").read_text(encoding="utf-8")
    style = (files("bhfast.watch") / "web" / "watch.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>{name}</title><style>{style}</style></head><body>",
            f'<h1>{name}</h1>\n<p><span id="state">waiting</span> <span id="note"></span></p>',
            player_html(None),
            f"<script>\n{script}</script>\n</body></html>\n",
        ]
    )
