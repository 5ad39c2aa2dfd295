"""A headless Chromium, driven over the DevTools protocol through a pipe.

See https://chromedevtools.github.io/devtools-protocol/. With ``--remote-debugging-pipe`` the browser reads messages,
JSON that a zero byte ends, from file descriptor 3, and writes its own to 4.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT = 60.0  # seconds that an answer may take
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--no-first-run", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars"),
)


def find_chromium() -> str | None:
    """Return the path of a Chromium; None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """A browser with one page.

    Args:
        program: the path of a Chromium.
        profile: an empty folder for its profile.

    Attributes:
        problems: what the page has written to the console as a warning or an error, and exceptions that it did not
            catch.
        requests: the addresses that it has asked for, but for those of files and data.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._last_id = 0
        self._unread = b""
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        high = [
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)
        ]  # out of the way of 3 and 4
        output = os.open(profile / "log", os.O_WRONLY | os.O_CREAT)
        actions = [
            (os.POSIX_SPAWN_DUP2, fd, target) for fd, target in zip([*high, output, output], (3, 4, 1, 2), strict=True)
        ]
        arguments = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        environment = {**os.environ, "HOME": str(profile)}
        self._pid = os.posix_spawn(program, arguments, environment, file_actions=actions, setpgroup=0)
        for fd in (theirs_in, theirs_out, *high, output):
            os.close(fd)
        self._session: str | None = None
        target = next(x for x in self.call("Target.getTargets")["targetInfos"] if x["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._from], [], [], TIMEOUT)[0], f"Chromium has not answered for {TIMEOUT} s"
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "Chromium has ended"
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str([x.get("value", x.get("description")) for x in params["args"]]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:")):
                self.requests.append(url)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, which may be a promise."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        until = time.monotonic() + TIMEOUT
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"{expression} is not true after {TIMEOUT} s; {self.problems}"
            time.sleep(0.02)

    def open(self, page: Path) -> None:
        """Open a file."""
        self.problems.clear()
        self.requests.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(page.resolve().as_uri())}")

    def resize(self, width: int, height: int, *, dark: bool = False, ratio: float = 1) -> None:
        """Give the page a size, in CSS pixels, and a color scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=ratio,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key; see KeyboardEvent.key."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        for kind, more in (("keyDown", text), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, modifiers=8 * shift, **more)

    def mouse(self, kind: str, x: float, y: float, *, buttons: int = 0) -> None:
        """Send ``Moved``, ``Pressed`` or ``Released`` with the left button, at a place in the window."""
        button = "left" if buttons or kind != "Moved" else "none"
        self.call(
            "Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button=button, buttons=buttons, clickCount=1
        )

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save what the page looks like; ``whole``: beyond the window as well."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """End the browser."""
        os.close(self._to)
        os.close(self._from)
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
